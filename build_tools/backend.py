"""PEP 517/660 build back end: setuptools, built against the torch of the environment installed into.

An isolated build hides site-packages, so a plain ``requires = ["torch"]`` would download a second torch of
perhaps another version. ``sysconfig`` still names the target's platlib: a torch found there is put on the path
of the build, and only where there is none is the version pinned in constraints.txt asked for.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

ROOT = Path(__file__).resolve().parent.parent
OLDEST_TORCH = (2, 10)

Settings = dict[str, Any] | None


def target_site() -> str | None:
    """The site-packages of the target environment that hold a torch new enough to build against."""
    candidates = [sysconfig.get_path("platlib")]
    settings = Path(sys.prefix, "pyvenv.cfg")
    if settings.is_file() and re.search(r"include-system-site-packages\s*=\s*true", settings.read_text()):
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        candidates.append(sysconfig.get_path("platlib", vars=base))
    for site in candidates:
        for found in importlib.metadata.distributions(name="torch", path=[site]):
            version = re.match(r"(\d+)\.(\d+)", found.version)
            if version and (int(version[1]), int(version[2])) >= OLDEST_TORCH:
                return site
    return None


def pinned_torch() -> str:
    """The requirement of constraints.txt on torch."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pin = re.search(r"^torch==[^\s;#]+", text, re.MULTILINE)
    return pin[0] if pin else "torch>=" + ".".join(map(str, OLDEST_TORCH))


def _torch_requirement() -> list[str]:
    return [] if target_site() else [pinned_torch()]


def _use_target_torch() -> None:
    site = target_site()
    if site and site not in sys.path:
        sys.path.append(site)  # last: the build's own setuptools stays in front


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_requirement()


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    _use_target_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    _use_target_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
