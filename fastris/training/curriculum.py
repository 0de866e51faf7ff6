"""From few instances to many: a stage ends when the validation loss stops improving."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fastris.training.config import TrainConfig


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        instances: the most instances in a crop.
        crop: side of the crop, pixels.
        batch_size: crops in a batch.
        last_step: the stage ends after this many steps of the run at the latest.
    """

    instances: int
    crop: int
    batch_size: int
    last_step: int


class Curriculum:
    """Which stage a run is in.

    Attributes:
        stages: all of them.
        index: the current one's.
        best: the lowest validation loss of the current stage.
        stale: validations since then.

    Source: Romera-Paredes & Torr, ECCV 2016, section 3.4: two instances until the validation loss stops improving,
    then all.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.stages = [
            Stage(instances, crop, batch_size, round(limit * config.max_steps))
            for instances, crop, batch_size, limit in zip(
                config.instances, config.crop, config.batch_size, config.stage_limit, strict=True
            )
        ]
        self.patience = config.patience
        self.index = 0
        self.best = math.inf
        self.stale = 0

    @property
    def stage(self) -> Stage:
        """The current stage."""
        return self.stages[self.index]

    def update(self, loss: float) -> bool:
        """Take a validation loss; True if it is the stage's lowest so far."""
        improved = loss < self.best
        self.best = min(self.best, loss)
        self.stale = 0 if improved else self.stale + 1
        return improved

    def advance(self, step: int) -> bool:
        """Go to the next stage if this one has stopped improving or has used its share; True if so."""
        last = self.index == len(self.stages) - 1
        if last or (self.stale < self.patience and step < self.stage.last_step):
            return False
        self.index += 1
        self.best, self.stale = math.inf, 0
        return True

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state."""
        return {"index": self.index, "best": None if math.isinf(self.best) else self.best, "stale": self.stale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state from :meth:`state_dict`."""
        self.index, self.stale = int(state["index"]), int(state["stale"])
        self.best = math.inf if state["best"] is None else float(state["best"])
