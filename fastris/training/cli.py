"""The options of ``fastris train`` and what they do."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastris.commands.common import add_run_options, complain, resolve_device, table
from fastris.errors import InputError
from fastris.nn.config import ModelConfig
from fastris.training.checkpoints import list_checkpoints, read_state
from fastris.training.config import PRESETS, TrainConfig, departures, read_config

_RESUME_MAY_CHANGE = ("data", "max_steps", "workers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """An option for every setting, and those that are no settings."""
    parser.add_argument("--preset", choices=sorted(PRESETS), default="default", help="settings to start from (default)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a TOML file of settings; options win over it")
    parser.add_argument("--out", type=Path, default=Path("runs/ris"), metavar="DIR", help="the run's folder (runs/ris)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    add_run_options(parser)
    for cls, prefix, title in (
        (TrainConfig, "", "settings (see fastris.training.TrainConfig; comma-separated: one a stage)"),
        (ModelConfig, "model.", "architecture (see fastris.ModelConfig)"),
    ):
        group = parser.add_argument_group(title)
        for setting in fields(cls):
            default = getattr(cls(), setting.name)
            if setting.name == "model":
                continue
            value = _Value(default)
            group.add_argument(
                f"--{prefix}{setting.name.replace('_', '-')}",
                dest=prefix + setting.name,
                type=value,
                default=argparse.SUPPRESS,
                metavar=value.metavar,
                help=f"({_text(default)})",
            )


def main(args: argparse.Namespace) -> int:
    """Train, and say where the model is."""
    from fastris.training.distributed import main_process, process_group, world_size
    from fastris.training.trainer import DivergedError, Trainer

    config = settings(args)
    with process_group(resolve_device(args.device)) as device:
        trainer = Trainer(config, args.out, device, args.resume)
        if main_process():
            steps = f"steps {trainer.step} to {config.max_steps}"
            images = f"{len(trainer.train_data)} images, {len(trainer.validation_data)} for validation"
            processes = f" by {world_size()} processes" if world_size() > 1 else ""
            print(f"{config.data}: {images}; {steps}{processes}; writing to {args.out}", file=sys.stderr)
            if args.preset != "default" and not args.resume:
                say_departures(config)
        try:
            path = trainer.run()
        except DivergedError as error:
            if main_process():
                complain(error)
            return 1
        if main_process():
            print(f"wrote {path}")
    return 0


def say_departures(config: TrainConfig) -> None:
    """A table on stderr of what a run departs from the paper in; nothing where it does not."""
    paper, rows = departures(config)
    if rows:
        print(f"this run departs from the paper (preset {paper}) in:", file=sys.stderr)
        shown = [(name, _text(value), _text(papers)) for name, value, papers in rows]
        print(table(("setting", "value", "paper"), shown), file=sys.stderr)


def _text(value: Any) -> str:
    """A setting as text, much as an option takes it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def settings(args: argparse.Namespace) -> TrainConfig:
    """Preset, then file, then options; with --resume the checkpoint's, which those must not contradict.

    Raises:
        InputError: an unknown or unusable setting, or one that differs from the run's.
    """
    options: dict[str, Any] = {"model": {}}
    for name, value in vars(args).items():
        if name.startswith("model."):
            options["model"][name.removeprefix("model.")] = value
        elif name in {setting.name for setting in fields(TrainConfig)}:
            options[name] = value
    file = read_config(args.config) if args.config else {}
    if args.resume:
        written = list_checkpoints(args.out / "checkpoints")
        if not written:
            raise InputError(f"{args.out / 'checkpoints'}: no checkpoint to resume from")
        state = read_state(written[-1])
        before = TrainConfig.from_dict(state.get("config", {}))
        config = before.updated(PRESETS[args.preset]).updated(file).updated(options)
        for name in sorted({setting.name for setting in fields(TrainConfig)}.difference(_RESUME_MAY_CHANGE)):
            if getattr(config, name) != getattr(before, name):
                raise InputError(
                    f"--resume: {name} of this run is {getattr(before, name)}, not {getattr(config, name)}; "
                    f"only {', '.join(_RESUME_MAY_CHANGE)} can change"
                )
        return config
    return TrainConfig().updated(PRESETS[args.preset]).updated(file).updated(options)


class _Value:
    """An argparse type after the type of a default; its name is what argparse calls a value it cannot read."""

    def __init__(self, default: Any) -> None:
        self.default = default
        if default is None:
            self.__name__, self.metavar = "size HxW", "HxW"
        elif isinstance(default, tuple):
            self.__name__, self.metavar = "list of numbers" if default else "list of names", "A,B,…"
        else:
            self.__name__, self.metavar = type(default).__name__, type(default).__name__.upper()

    def __call__(self, text: str) -> Any:
        default = self.default
        if default is None:  # a size HxW
            height, width = text.lower().split("x")
            return int(height), int(width)
        if isinstance(default, tuple):
            kind = type(default[0]) if default else str
            return tuple(kind(part) for part in text.split(",") if part)
        if isinstance(default, bool):
            if text.lower() not in ("true", "false"):
                raise ValueError(text)
            return text.lower() == "true"
        return type(default)(text)
