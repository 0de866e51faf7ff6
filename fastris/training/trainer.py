"""The training loop."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from fastris import __version__
from fastris.data import (
    Batch,
    Compose,
    Fit,
    IntensityJitter,
    RandomCrop,
    RandomFlip,
    RandomRotation,
    Sample,
    Transform,
    collate,
    open_dataset,
)
from fastris.errors import InputError
from fastris.imageio import make_output_directory
from fastris.loading import load, save
from fastris.metrics import InstanceMetrics
from fastris.nn.fcn8s import FCN8s
from fastris.nn.loss import LossTerms, RISLoss
from fastris.nn.model import RecurrentInstanceSegmenter
from fastris.nn.pretrained import load_pretrained
from fastris.training.ahead import batches_ahead
from fastris.training.checkpoints import list_checkpoints, load_checkpoint, read_state, save_checkpoint
from fastris.training.config import TrainConfig
from fastris.training.curriculum import Curriculum, Stage
from fastris.training.distributed import (
    gather,
    main_process,
    own_part,
    parallel,
    rank,
    total,
    wait_for_all,
    world_size,
)
from fastris.training.graphed import GraphedStep, Readback, can_be_graphed, new_adam, set_learning_rate
from fastris.training.log import RunLog

_TRAIN, _VALIDATION = 0, 1  # streams of random numbers


class DivergedError(RuntimeError):
    """The loss became NaN or infinite."""


class Trainer:
    """Trains a model and keeps everything about the run in one folder.

    The folder gets ``model.safetensors`` (the lowest validation loss since the curriculum last went on),
    ``checkpoints/`` and the files of a :class:`~fastris.training.log.RunLog`. A batch depends on the seed and the step
    only, so a resumed run is the run that was not interrupted; on the CPU bit for bit. In a process group each rank
    trains on its part of the batch and rank 0 alone writes: the run is the same but for the order of sums. All ranks
    read ``out`` to resume.

    Args:
        config: the settings.
        out: the run's folder, created where needed.
        device: where to train.
        resume: go on from the newest checkpoint in ``out``.

    Raises:
        InputError: unusable data or folder, a damaged checkpoint, ``resume`` without a checkpoint, a checkpoint
            without ``resume``, or a batch of fewer crops than there are processes.
    """

    def __init__(
        self, config: TrainConfig, out: Path, device: torch.device | str = "cpu", resume: bool = False
    ) -> None:
        if min(config.batch_size) < world_size():
            raise InputError(
                f"batch_size: {world_size()} processes need as many crops in a batch, got {list(config.batch_size)}"
            )
        self.config = config
        self.out = make_output_directory(out)
        self.device = torch.device(device)
        self.precision = config.precision if config.precision != "auto" else fastest_precision(self.device)
        self.checkpoints = make_output_directory(self.out / "checkpoints")
        written = list_checkpoints(self.checkpoints)
        if resume and not written:
            raise InputError(f"{self.checkpoints}: no checkpoint to resume from")
        if written and not resume:
            raise InputError(f"{out}: holds a run already; continue it with --resume, or choose another --out")
        chosen: dict[str, Any] = {"data_class": config.data_class, "min_instances": 1} if config.data_class else {}
        self.train_data = open_dataset(config.data, "train", **chosen)
        self.validation_data = open_dataset(config.data, "validation", **chosen)
        for split, data in (("train", self.train_data), ("validation", self.validation_data)):
            if not len(data):
                raise InputError(f"{config.data}: no images in split '{split}'")
            data.preload()  # a broken file is better found now than in an hour
        torch.manual_seed(config.seed)
        self.model = self._new_model(resume).to(self.device)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = AveragedModel(self.model) if config.ema else None
        self.loss = RISLoss(
            config.loss_variant, config.confidence_weight, config.place_weight, config.per_instance,
            config.loss_resolution, config.dense_weight,
        )  # fmt: skip
        self.optimizer = new_adam(self.model.parameters(), config.learning_rate, self.device)
        graphed = config.cuda_graph and can_be_graphed(self.device) and world_size() == 1
        self._graphed_update = GraphedStep(self._update, self.device) if graphed else None
        self._readback = Readback(("loss", "mask", "confidence", "place", "dense", "gradient_norm"))
        most = 0
        if not config.instances[-1]:
            most = max(sample.count for data in (self.train_data, self.validation_data) for sample in data)
        self.curriculum = Curriculum(config, most)
        self.step = 0
        if written:
            self._restore(written[-1])
        self.parallel = parallel(self.model)
        self._validation_batches: tuple[Stage, list[Batch]] | None = None
        self._ahead: tuple[Stage, Iterator[Batch]] | None = None

    def run(self) -> Path:
        """Train to the last step; returns the path of the model.

        Raises:
            DivergedError: the loss is not finite; the last checkpoint and the model file stay.
        """
        log = RunLog(self.out, self.step) if main_process() else None
        bar = tqdm(
            total=self.config.max_steps,
            initial=self.step,
            unit="step",
            smoothing=0.05,
            disable=None if main_process() else True,
            file=sys.stderr,
        )
        try:
            while self.step < self.config.max_steps:
                self._train_step()
                due = self.step % self.config.validate_every == 0 or self.step == self.config.max_steps
                for row in self._complete_rows(everything=due):
                    if log is not None:
                        log.train(row)
                    bar.update()
                    bar.set_postfix_str(f"stage {row['stage']} loss {row['loss']:.3f}", refresh=False)
                if due:
                    row = self._validate()
                    if log is not None:
                        log.validation(row)
                        bar.write(
                            f"step {self.step}  stage {row['stage']}  validation loss {row['loss']:.4f}  "
                            f"SBD {row['sbd']:.3f}  |DiC| {row['dic']:.2f}",
                            file=sys.stderr,
                        )
                    self._keep(row)
        finally:
            self._ahead = None  # ends the workers
            bar.close()
            if log is not None:
                log.close()
        return self.out / "model.safetensors"

    @property
    def product(self) -> RecurrentInstanceSegmenter:
        """The model that is validated and saved: the moving average where there is one."""
        return cast(RecurrentInstanceSegmenter, self.average.module) if self.average is not None else self.model

    def _new_model(self, resume: bool) -> RecurrentInstanceSegmenter:
        """One of random weights, or ``initial``, with the backbone as the settings ask."""
        config = self.config
        if config.initial:
            model = load(config.initial)
            if model.config != config.model:
                raise InputError(f"initial: {config.initial} is of another architecture than this run")
        else:
            model = RecurrentInstanceSegmenter(config.model)
        if isinstance(model.backbone, FCN8s):
            if config.backbone_weights and not resume:
                load_pretrained(model.backbone, config.backbone_weights)
            model.backbone.freeze(config.frozen)
        return model

    def learning_rate(self, step: int) -> float:
        """The rate of optimiser step `step`, counted from 0."""
        config = self.config
        warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
        return config.learning_rate * warm * (1 - step / config.max_steps if config.decay else 1.0)

    def batch(self, step: int, stage: Stage) -> Batch:
        """The training batch of a step."""
        config = self.config
        view = self._view(stage, self.config.zoom)
        turns: list[Transform] = [RandomFlip(config.vertical_flip), RandomRotation(config.rotation or None)]
        transforms = [view, *turns] if config.image_size is None else [*turns, view]  # what pads comes last
        if config.jitter or config.grey_probability or config.invert_probability:
            jitter = IntensityJitter(
                0.1 * config.jitter, 0.2 * config.jitter, 0.2 * config.jitter, config.invert_probability,
                config.grey_probability,
            )  # fmt: skip
            transforms.append(jitter)
        transform = Compose(transforms)
        generator = _generator(config.seed, _TRAIN, step)
        chosen = torch.randint(len(self.train_data), (stage.batch_size,), generator=generator).tolist()
        return self._collate([transform(self.train_data[index], generator) for index in chosen])

    def _view(self, stage: Stage, zoom: float = 1.0) -> Transform:
        """What of an image a stage looks at."""
        if self.config.image_size is not None:
            return Fit(self.config.image_size)
        return RandomCrop(stage.crop, stage.instances or None, zoom=zoom)

    def _collate(self, samples: list[Sample]) -> Batch:
        return collate(samples, multiple=1 if self.config.image_size else 8)

    def _next_batch(self, stage: Stage) -> Batch:
        """The batch of this step, from the workers where there are any."""
        config = self.config
        if not config.workers:
            return self.batch(self.step, stage)
        if self._ahead is None or self._ahead[0] != stage:
            steps = range(self.step, config.max_steps)
            self._ahead = stage, batches_ahead(partial(self.batch, stage=stage), steps, config.workers)
        return next(self._ahead[1])

    def _train_step(self) -> None:
        """Queue a step; :meth:`_complete_rows` says how it went."""
        start = time.perf_counter()
        rate = self.learning_rate(self.step)
        set_learning_rate(self.optimizer, rate)
        whole = self._next_batch(self.curriculum.stage)
        sizes = self._sizes(whole)
        self.model.train()
        if self._graphed_update is not None:
            values = self._graphed_update(whole.pin_memory(), *sizes)
        else:
            part = own_part(whole)
            values = self._update(part.to(self.device), *sizes, share=len(part) / len(whole))
        if self.average is not None:
            _update_average(self.average, self.model, max(1 - self.config.ema, 1 / (self.step + 1)))
        self.step += 1
        row = {
            "step": self.step,
            "stage": self.curriculum.index + 1,
            "learning_rate": rate,
            "images_per_second": len(whole) / (time.perf_counter() - start),
        }
        self._readback.put(row, values)

    def _update(self, batch: Batch, most: int, steps: int, share: float = 1.0) -> Tensor:
        """One step of the weights without a host sync; (6,): the terms of the loss and the norm of the gradient.

        The batch is this rank's `share` of all images, and the results are those of all.
        """
        self.optimizer.zero_grad(set_to_none=True)
        terms = self._loss(self.parallel, batch, most, steps)
        (terms.total * (share * world_size())).backward()  # DistributedDataParallel divides by world_size()
        norm = self._limit_gradients()
        self.optimizer.step()
        return torch.cat([total(torch.stack(terms).detach() * share), norm.detach().unsqueeze(0)])

    def _complete_rows(self, everything: bool) -> Iterator[dict[str, Any]]:
        """Rows for the log; all of them, or those whose numbers have come from the device."""
        for row in self._readback.take(everything):
            if not all(math.isfinite(value) for value in row.values()):
                kept = list_checkpoints(self.checkpoints)
                remedy = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
                raise DivergedError(f"the loss is not finite ({row['loss']}) at step {row['step'] - 1}; {remedy}")
            yield row

    def _sizes(self, batch: Batch) -> tuple[int, int]:
        """The most instances in an image of a batch on the host, and the recurrent steps that it gets.

        A batch without instances counts as one with an instance, so that all parameters have a gradient.
        """
        most, limit = max(int(batch.counts.max()), 1), self.curriculum.stage.instances
        steps = most + self.config.extra_steps
        if self.config.image_size is not None and limit:
            steps = min(steps, limit)
        return most, steps

    def _loss(self, model: nn.Module, batch: Batch, most: int, steps: int) -> LossTerms:
        images = batch.images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            output = model(images, steps)
        return self.loss(output, batch.labels, batch.counts, most)

    def _limit_gradients(self) -> Tensor:
        """Clamp and scale the gradients; returns their norm before."""
        parameters = list(self.model.parameters())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        torch.nn.utils.clip_grad_value_(parameters, self.config.gradient_clamp)
        if self.config.gradient_norm:
            torch.nn.utils.clip_grad_norm_(parameters, self.config.gradient_norm)
        return norm

    def _validate(self) -> dict[str, Any]:
        """Loss and metrics on the same held-out crops each time."""
        model = self.product.eval()
        metrics = InstanceMetrics()
        losses: list[float] = []
        for batch in self._held_out():
            with torch.no_grad():
                terms = self._loss(model, batch.to(self.device), *self._sizes(batch))
            losses += [float(terms.total)] * len(batch)
            for image, labels, name in zip(batch.images, batch.labels, batch.names, strict=True):
                instances = model.predict(image)
                assert not isinstance(instances, list)
                metrics.update(instances.label_map(), labels, name)
        losses = gather(losses)
        loss = math.fsum(losses) / len(losses)  # in any order
        means = metrics.compute()
        kept = {name: means[name] for name in ("sbd", "dic", "map", "ap50", "images")}
        return {"step": self.step, "stage": self.curriculum.index + 1, "loss": loss, **kept}

    def _held_out(self) -> list[Batch]:
        """This rank's part of the batches that a validation looks at."""
        stage = self.curriculum.stage
        if self._validation_batches is None or self._validation_batches[0] != stage:
            view, size, number = self._view(stage), stage.batch_size, self.config.validation_crops
            if self.config.image_size is not None:  # whole images, of which each is there once
                number = min(number, len(self.validation_data))
            batches = []
            for start in range(0, number, size)[rank() :: world_size()]:
                samples: list[Sample] = []
                for k in range(start, min(start + size, number)):
                    sample = self.validation_data[k % len(self.validation_data)]
                    samples.append(view(sample, _generator(self.config.seed, _VALIDATION, k)))
                batches.append(self._collate(samples))
            self._validation_batches = stage, batches
        return self._validation_batches[1]

    def _keep(self, row: dict[str, Any]) -> None:
        """Write the model if it is the stage's best, go on in the curriculum, write a checkpoint."""
        if not math.isfinite(row["loss"]):
            raise DivergedError(f"the validation loss is not finite ({row['loss']}) at step {self.step}")
        if self.curriculum.update(row["loss"]) and main_process():
            settings = self.config.to_dict()
            for name in ("data", "initial", "backbone_weights"):
                settings[name] = Path(settings[name]).name  # not where on this machine
            facts = {"training": settings, "validation": row, "fastris": __version__}
            save(self.out / "model.safetensors", self.product, facts)
        if self.curriculum.advance(self.step) and self._graphed_update is not None:
            self._graphed_update.forget()
        state = {
            "config": self.config.to_dict(),
            "curriculum": self.curriculum.state_dict(),
            "versions": {"fastris": __version__, "torch": torch.__version__},
        }
        if main_process():
            save_checkpoint(self.checkpoints, self.step, self.model, self.optimizer, state, self.average)
        wait_for_all()

    def _restore(self, path: Path) -> None:
        state = read_state(path)
        load_checkpoint(path, self.model, self.optimizer, self.average)
        try:
            self.step = int(state["step"])
            self.curriculum.load_state_dict(state["curriculum"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path / 'state.json'}: damaged: {error!r}") from None


def fastest_precision(device: torch.device) -> str:
    """What ``precision = "auto"`` stands for on a device; a CPU that cannot multiply bf16 takes many times as long."""
    if device.type == "cuda":
        multiplies = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        multiplies = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if multiplies else "fp32"


@torch.no_grad()
def _update_average(average: AveragedModel, model: RecurrentInstanceSegmenter, share: float) -> None:
    """Move a moving average by a share of the way. AveragedModel's own update reads its count from the device."""
    torch._foreach_lerp_(list(average.module.parameters()), list(model.parameters()), share)
    average.n_averaged += 1


def _generator(seed: int, stream: int, number: int) -> torch.Generator:
    """A generator of its own for each number of a stream."""
    mixed = (seed * 2 + stream) * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03
    return torch.Generator().manual_seed(mixed % 2**63)
