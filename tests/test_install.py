"""Installing: with torch already there, with no compiler, editable, and what the wheel holds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SITE = Path(sysconfig.get_path("platlib"))
NVCC = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
NO_CUDA = {"FASTRIS_CUDA": "0"}
CXX = next(filter(None, map(shutil.which, ("c++", "g++"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not run from a source tree"),
    pytest.mark.skipif(not (SITE / "torch").is_dir(), reason="torch is not in this environment's site-packages"),
]
needs_compiler = pytest.mark.skipif(CXX is None, reason="no C++ compiler")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workshop")


@pytest.fixture(autouse=True)
def quick_compiler(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is built here need not be fast: the last ``-O`` counts, and ``-O0`` compiles in a quarter of the time. The
    tests share what they compile."""
    monkeypatch.setenv("FASTRIS_OBJECTS", str(workshop / "objects"))
    if CXX:
        script = workshop / "c++"
        script.write_text(f'#!/bin/sh\nexec {CXX} "$@" -O0\n')
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )


def passed(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def pip(python: Path, *arguments: str | Path, cwd: Path, **environment: str) -> str:
    command = (sys.executable, "-m", "pip", "--python", python, *arguments)
    result = run(*command, cwd=cwd, **environment)
    return passed(result) + result.stderr


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the source tree, so that builds leave nothing behind."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("build_tools", "csrc", "fastris", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("LICENSE", "README.md", "constraints.txt", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, copy)
    return copy


def environment(path: Path, with_torch: bool) -> Path:
    """A virtual environment; with torch, everything installed here is linked into it, except fastris."""
    venv.create(path, with_pip=False)
    python = path / "bin/python"
    if with_torch:
        query = "import sysconfig; print(sysconfig.get_path('platlib'))"
        site = Path(passed(run(python, "-c", query, cwd=path)).strip())
        for entry in SITE.iterdir():
            if "fastris" not in entry.name and entry.name != "__pycache__":
                (site / entry.name).symlink_to(entry)
    return python


@pytest.fixture
def python(tmp_path: Path) -> Path:
    return environment(tmp_path / "venv", with_torch=True)


USE = """
import torch, fastris, fastris.kernels
from fastris import backend
assert fastris.assignment(torch.eye(2)[None]).col_of_row.tolist() == [[1, 0]]
print(backend.native_error(), backend.cuda_archs(), sep="|")
"""

LOADED = "from fastris import backend; print(backend.native_error(), backend.cuda_archs(), sep='|')"


def test_torch_is_asked_for_only_where_there_is_none(tmp_path: Path, python: Path) -> None:
    bare = environment(tmp_path / "bare", with_torch=False)
    code = f"import sys; sys.path.append({str(SITE)!r}); import backend; print(backend.get_requires_for_build_wheel())"
    where = {"cwd": ROOT, "PYTHONPATH": str(ROOT / "build_tools")}
    assert "torch" not in passed(run(python, "-c", code, **where))
    assert "torch==" in passed(run(bare, "-c", code, **where))


@needs_compiler
def test_an_isolated_install_builds_against_the_torch_that_is_there(source: Path, python: Path, tmp_path: Path) -> None:
    try:
        pip(python, "download", "--no-deps", "-d", tmp_path / "wheels", "setuptools>=77", cwd=tmp_path)
    except AssertionError:
        pytest.skip("no package index to take setuptools from")
    options = ("--no-deps", "--no-index", "--find-links", tmp_path / "wheels")
    pip(python, "install", *options, ".", cwd=source, **NO_CUDA)
    assert passed(run(python, "-c", USE, cwd=tmp_path)).strip() == "None|"


@needs_compiler
def test_the_wheel_is_abi3_and_holds_the_library_and_nothing_else(source: Path, python: Path, tmp_path: Path) -> None:
    pip(python, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, ".", cwd=source, **NO_CUDA)
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp310-abi3-" in wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "fastris/_C.abi3.so",
        "fastris/py.typed",
        "fastris/kernels/__init__.py",
        "fastris/ops/assignment.py",
        "fastris/reference/assignment.py",
    } <= names
    shipped = {f"fastris/{path.relative_to(ROOT / 'fastris')}" for path in (ROOT / "fastris").rglob("*.py")}
    shipped |= {f"fastris/{kind}/{path.name}" for kind in ("weights", "samples") for path in files(kind)}
    assert shipped <= names
    assert {name.split("/")[0] for name in names} == {"fastris", "fastris-0.1.0.dist-info"}

    pip(python, "install", "--no-deps", wheel, cwd=tmp_path)
    assert passed(run(python, "-c", USE, cwd=tmp_path)).strip() == "None|"


def files(kind: str) -> list[Path]:
    return [path for path in (ROOT / "fastris" / kind).glob("*") if path.is_file()]


def test_without_a_compiler_the_install_is_pure_python_and_warns_once(
    source: Path, python: Path, tmp_path: Path
) -> None:
    options = ("-v", "--no-deps", "--no-build-isolation")
    said = pip(python, "install", *options, ".", cwd=source, CXX="/bin/false", CC="/bin/false")
    assert said.count("WARNING: fastris is installed without its native operators") == 1
    assert passed(run(python, "-c", USE, cwd=tmp_path)).startswith("fastris was installed without")
    info = passed(run(python, "-c", "import fastris.environment as i; print(i.format_info())", cwd=tmp_path))
    assert "remedy: install a C++ compiler" in info


@needs_compiler
def test_an_editable_install_finds_the_kernels_and_the_extension(source: Path, python: Path, tmp_path: Path) -> None:
    pip(python, "install", "--no-deps", "--no-build-isolation", "-e", ".", cwd=source, **NO_CUDA)
    where = "import fastris.kernels; print(fastris.kernels.__file__)"
    assert passed(run(python, "-c", where, cwd=tmp_path)).strip() == str(source / "kernels/__init__.py")
    for cwd in (tmp_path, source):
        assert passed(run(python, "-c", USE, cwd=cwd)).strip() == "None|"


@needs_compiler
@needs_nvcc
def test_any_torch_imports_a_build_with_cuda_kernels(source: Path, python: Path, tmp_path: Path) -> None:
    options = ("--no-deps", "--no-build-isolation")
    pip(python, "install", *options, ".", cwd=source, FASTRIS_CUDA="1", FASTRIS_CUDA_ARCHS="9.0+PTX")
    assert passed(run(python, "-c", USE, cwd=tmp_path)).strip() == "None|9.0+PTX"


@needs_compiler
@needs_nvcc
def test_a_failing_cuda_build_is_fatal_only_where_cuda_was_demanded(source: Path, python: Path) -> None:
    build = (python, "setup.py", "build_ext", "--inplace")
    demanded = run(*build, cwd=source, FASTRIS_CUDA="1", FASTRIS_CUDA_ARCHS="1.0")
    assert demanded.returncode != 0 and "FASTRIS_CUDA=1" in demanded.stderr
    welcome = run(*build, cwd=source, FASTRIS_CUDA_ARCHS="1.0")
    assert welcome.returncode == 0 and "without its CUDA kernels" in welcome.stderr
    assert passed(run(python, "-c", LOADED, cwd=source)).strip() == "None|"


@needs_compiler
def test_only_what_changed_is_compiled_again(source: Path, python: Path) -> None:
    def compiled() -> set[str]:
        said = passed(run(python, "setup.py", "build_ext", "--inplace", cwd=source, **NO_CUDA))
        return {word for word in said.split() if word.endswith(".cpp")}

    compiled()
    assert compiled() == set()
    with (source / "csrc/cpu/place_logits.cpp").open("a") as file:
        file.write("// changed\n")
    assert compiled() == {"csrc/cpu/place_logits.cpp"}
    assert passed(run(python, "-c", LOADED, cwd=source)).strip() == "None|"
    with (source / "csrc/module.cpp").open("a") as file:
        file.write("#error wrong\n")
    failed = run(python, "setup.py", "build_ext", "--inplace", cwd=source, **NO_CUDA)
    assert failed.returncode != 0 and "wrong" in failed.stderr


def test_objects_are_kept_for_a_day_and_none_of_a_source_that_changed_meanwhile(source: Path, python: Path) -> None:
    code = """
        import os, time
        from pathlib import Path
        import native

        def compile(command):
            Path(command[-1]).write_text("object")

        def change(command):
            compile(command)
            with open("csrc/module.cpp", "a") as file:
                file.write("// changed")

        objects = native._Objects(native._torch_root(), "elsewhere")
        made = objects.compile(["c++"], "csrc/module.cpp", compile)
        assert objects.compile(["c++"], "csrc/module.cpp", None) == made
        try:
            objects.compile(["c++", "-O1"], "csrc/module.cpp", change)
        except RuntimeError as error:
            print(error)
        assert list(objects.folder.iterdir()) == [made]
        os.utime(made, (time.time() - 2 * objects.day,) * 2)
        native._Objects(native._torch_root(), "elsewhere")
        assert not made.exists()
    """
    where = {"PYTHONPATH": str(source / "build_tools"), "FASTRIS_OBJECTS": str(source / "objects")}
    said = passed(run(python, "-c", textwrap.dedent(code), cwd=source, **where))
    assert said == "csrc/module.cpp or a header was changed while it was compiled: build again\n"
