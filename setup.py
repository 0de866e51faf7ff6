"""The part of the build that pyproject.toml cannot say: the package mapping and the native extension."""

import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_tools"))

from native import BuildNative, native_extensions  # noqa: E402

setup(
    packages=[*find_packages(include=["fastris", "fastris.*"]), "fastris.kernels"],
    package_dir={"fastris": "fastris", "fastris.kernels": "kernels"},
    ext_modules=native_extensions(),
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
