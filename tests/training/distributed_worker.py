"""What ``test_distributed.py`` starts by torchrun: in fp64, so that only the order of sums can tell the runs apart.

torchrun … distributed_worker.py SETTINGS FOLDER    a run in FOLDER/many, the gradients of its first step in
                                                    FOLDER/many.safetensors; FOLDER/one resumed; and a run
                                                    in which one image of rank 1 is NaN
torchrun … distributed_worker.py SETTINGS           rank 1 fails while rank 0 waits for it
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from fastris.data import Batch
from fastris.training import DivergedError, Stage, TrainConfig, Trainer
from fastris.training.config import read_config
from fastris.training.distributed import main_process, process_group, rank


def save_first_gradients(trainer: Trainer, path: Path) -> None:
    limit = trainer._limit_gradients

    def limit_and_save() -> torch.Tensor:
        if trainer.step == 0 and main_process():
            save_file({name: p.grad.contiguous() for name, p in trainer.model.named_parameters()}, path)
        return limit()

    trainer._limit_gradients = limit_and_save  # type: ignore[method-assign]


def poison(trainer: Trainer) -> None:
    make = trainer.batch

    def poisoned(step: int, stage: Stage) -> Batch:
        batch = make(step, stage)
        batch.images[1] = torch.nan
        return batch

    trainer.batch = poisoned  # type: ignore[method-assign]


def main(settings: Path, folder: Path | None = None) -> None:
    torch.set_default_dtype(torch.float64)
    config = TrainConfig.from_dict(read_config(settings))
    with process_group(torch.device("cpu")) as device:
        if folder is None:
            trainer = Trainer(config, settings.parent / "failing", device)
            if rank() == 1:
                trainer.batch = None  # type: ignore[assignment, method-assign]
            trainer.run()
            return
        trainer = Trainer(config, folder / "many", device)
        save_first_gradients(trainer, folder / "many.safetensors")
        trainer.run()
        Trainer(config, folder / "one", device, resume=True).run()
        trainer = Trainer(config, folder / "poisoned", device)
        poison(trainer)
        try:
            trainer.run()
        except DivergedError:
            (folder / f"diverged-{rank()}").touch()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
