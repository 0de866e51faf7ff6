"""From few instances to many: a stage ends when the validation loss stops improving."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from fastris.training.config import TrainConfig


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        instances: the most instances to look for in an image; 0 for all of them.
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

    The first stage has few instances and the last has the most. With ``growth``, those between grow: their number of
    instances rises by that at each plateau, and where it would reach the next stage's, that stage begins. A plateau is
    ``patience`` validations in a row that do not lower the loss by the share ``plateau`` of it.

    Args:
        config: the settings.
        most: the most instances in an image of the data: how far a stage grows before one of all instances.

    Attributes:
        stages: all of them, as they begin.
        index: the current one's.
        grown: by how many instances it has grown.
        best: the lowest validation loss since the number of instances last changed.
        level: the loss that the next must improve on by the share ``plateau``.
        stale: validations that have not.

    Source: Romera-Paredes & Torr, ECCV 2016: two instances until the training converges, then more and more.
    """

    def __init__(self, config: TrainConfig, most: int = 0) -> None:
        self.stages = [
            Stage(instances, crop, batch_size, round(limit * config.max_steps))
            for instances, crop, batch_size, limit in zip(
                config.instances, config.crop, config.batch_size, config.stage_limit, strict=True
            )
        ]
        self.most = most
        self.patience, self.plateau, self.growth = config.patience, config.plateau, config.growth
        self.max_steps = config.max_steps
        self.index = self.grown = 0
        self._begin()

    def _begin(self) -> None:
        self.best = self.level = math.inf
        self.stale = 0

    @property
    def stage(self) -> Stage:
        """The current stage, as far as it has grown."""
        stage = self.stages[self.index]
        return replace(stage, instances=stage.instances + self.grown)

    def update(self, loss: float) -> bool:
        """Take a validation loss; True if it is the lowest so far."""
        improved = loss < self.best
        self.best = min(self.best, loss)
        if math.isinf(self.level) or loss < self.level - self.plateau * abs(self.level):
            self.level, self.stale = loss, 0
        else:
            self.stale += 1
        return improved

    def advance(self, step: int) -> bool:
        """Go on if the stage has stopped improving or has used its share of the steps; True if so."""
        used_up = self.stage.last_step <= step < self.max_steps
        if self.index == len(self.stages) - 1 or (self.stale < self.patience and not used_up):
            return False
        more = self.stage.instances + self.growth
        if self.growth and self.index and not used_up and more < (self.stages[self.index + 1].instances or self.most):
            self.grown += self.growth
        else:
            self.index, self.grown = self.index + 1, 0
        self._begin()
        return True

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state."""
        started = not math.isinf(self.level)
        return {
            "index": self.index,
            "grown": self.grown,
            "best": self.best if started else None,
            "level": self.level if started else None,
            "stale": self.stale,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state from :meth:`state_dict`; one without growth or level is of a run that had neither."""
        self.index, self.grown, self.stale = int(state["index"]), int(state.get("grown", 0)), int(state["stale"])
        self.best = math.inf if state["best"] is None else float(state["best"])
        self.level = float(state["level"]) if state.get("level") is not None else self.best
