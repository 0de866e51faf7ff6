"""How ``fastris._C`` is built: one abi3 module over LibTorch's stable ABI, with CUDA where nvcc is found.

torch is never imported here: its headers and ``libtorch`` are found by path, so a CPU-only torch serves for CUDA too.

    FASTRIS_CUDA=1      fail where the CUDA sources cannot be built        =0  leave them out
    FASTRIS_CUDA_ARCHS  architectures, by default 8.0;9.0+PTX
    FASTRIS_SANITIZE=1  build for AddressSanitizer and UndefinedBehaviorSanitizer
    FASTRIS_WERROR=1    warnings of the compilers are errors
    FASTRIS_OBJECTS     folder that keeps what was compiled, by default build/objects: the same is not compiled twice
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent.parent
SOURCES = Path("csrc")
TORCH_TARGET_VERSION = "0x020a000000000000"
PYTHON_LIMITED_API = "0x030a0000"
DEFAULT_ARCHS = "8.0;9.0+PTX"
INSTRUCTION_SETS = {
    "_avx2": ["-mavx2"],
    "_avx512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw"],
}
"""Flags for the sources with such a suffix, which run only where the machine has the instructions."""
UNCONTRACTED = "assignment"
"""The operator whose arithmetic must be SciPy's to the bit: a product and a sum are never one instruction in it."""
TESTED = "assignment_emulated"
"""What only tests run, and need not be fast."""
WARNINGS_ARE_ERRORS = os.environ.get("FASTRIS_WERROR") == "1"
SANITIZED = os.environ.get("FASTRIS_SANITIZE") == "1"
BUILDING = {"bdist_wheel", "build", "build_ext", "editable_wheel", "install"}


def native_extensions() -> list[Extension]:
    """``fastris._C``, or nothing with one warning where there is no way to compile it."""
    reason = _why_not()
    if reason:
        if BUILDING & set(sys.argv):
            print(
                f"\nWARNING: fastris is installed without its native operators: {reason}. "
                "The reference back end serves instead; `fastris info` says what that means.\n",
                file=sys.stderr,
            )
        return []
    sources = [*SOURCES.glob("*.cpp"), *SOURCES.glob("cpu/*.cpp")]
    return [
        Extension(
            "fastris._C",
            sources=sorted(map(str, sources)),
            depends=sorted(map(str, [*SOURCES.glob("**/*.h"), *SOURCES.glob("cuda/*.cu")])),
            language="c++",
            py_limited_api=True,
        )
    ]


def _why_not() -> str | None:
    if _torch_root() is None:
        return "torch is not visible to the build (install torch first, or build with isolation)"
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "probe.cpp")
        source.write_text("#include <Python.h>\n#include <vector>\nint main() { return 0; }\n")
        include = f"-I{sysconfig.get_path('include')}"
        command = [*_compiler(), "-std=c++17", include, "-c", str(source), "-o", f"{source}.o"]
        try:
            probe = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            return f"no C++ compiler ({command[0]}: {error.strerror})"
    if probe.returncode:
        lines = probe.stderr.strip().splitlines() or [f"exit code {probe.returncode}"]
        return f"no working C++ compiler ({command[0]}: {lines[0]})"
    return None


def _torch_root() -> Path | None:
    spec = importlib.util.find_spec("torch")
    locations = spec.submodule_search_locations if spec else None
    root = Path(locations[0]) if locations else None
    return root if root and (root / "include/torch/csrc/stable/library.h").is_file() else None


def _compiler() -> list[str]:
    named = os.environ.get("CXX")
    if named:
        return shlex.split(named)
    return [next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), "c++")]


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    beside = [str(Path(home, "bin"))] if home else []
    for path in (*beside, None, "/usr/local/cuda/bin"):
        found = shutil.which("nvcc", path=path)
        if found:
            return found
    return None


def _cuda_root(nvcc: str) -> Path:
    """The toolkit nvcc itself uses: the file on PATH may be a wrapper elsewhere."""
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
    for line in dry.stderr.splitlines():
        name, _, value = line.removeprefix("#$ ").partition("=")
        if name == "TOP":
            return Path(value).resolve()
    raise RuntimeError(f"{nvcc} does not say where its toolkit is: {dry.stderr.strip()[:200]}")


def _gencode(archs: str) -> list[str]:
    flags = []
    for arch in archs.replace(" ", ";").split(";"):
        number = arch.removesuffix("+PTX").replace(".", "")
        if number:
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def _own_flags(source: Path) -> list[str]:
    """What one source is compiled with beyond the flags of all."""
    flags = [f"-ffp-contract={'off' if source.stem.startswith(UNCONTRACTED) else 'fast'}"]
    if source.stem == TESTED:
        flags += ["-O2"]
    if platform.machine().lower() in ("x86_64", "amd64"):
        flags += next((more for suffix, more in INSTRUCTION_SETS.items() if source.stem.endswith(suffix)), [])
    return flags


class _Objects:
    """Compiled sources, each under a name made of all that went into it, for other builds of the same."""

    day = 24 * 60 * 60.0  # in seconds; what no build has used for so long goes
    environment = (
        *("CPATH", "CPLUS_INCLUDE_PATH", "MACOSX_DEPLOYMENT_TARGET", "SDKROOT"),
        *("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN"),
    )

    def __init__(self, torch_root: Path, otherwise: str) -> None:
        named = os.environ.get("FASTRIS_OBJECTS")
        folder = Path(named or ROOT / "build/objects").resolve()
        if not (named or _can_write(folder)):
            folder = Path(otherwise).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        # Isolated builds have their torch somewhere else each time.
        self.names = {str(torch_root): (torch_root / "version.py").read_text(), str(ROOT): "fastris"}
        compilers = {" ".join(one): _version(one) for one in (_compiler(), [_nvcc() or ""])}
        variables = {name: os.environ.get(name) for name in self.environment}
        self.surroundings = platform.uname(), compilers, variables
        for old in folder.glob("*.o"):
            try:
                if time.time() - old.stat().st_mtime > self.day:
                    old.unlink()
            except FileNotFoundError:  # another build was first
                pass

    def compile(self, command: Sequence[str], source: str, run: Callable[[Sequence[str]], None]) -> Path:
        """The object that ``command -c source`` makes, or made."""
        target = self._target(command, source)
        try:
            os.utime(target)
            return target
        except FileNotFoundError:
            pass
        with tempfile.TemporaryDirectory(dir=self.folder) as directory:
            made = Path(directory, "made.o")
            run([*command, "-c", source, "-o", str(made)])
            if self._target(command, source) != target:
                raise RuntimeError(f"{source} or a header was changed while it was compiled: build again")
            made.replace(target)
        return target

    def _target(self, command: Sequence[str], source: str) -> Path:
        said = "\0".join(command)
        for path, name in self.names.items():
            said = said.replace(path, name)
        files = [ROOT / source, *sorted((ROOT / SOURCES).glob("**/*.h"))]
        texts = [(str(path.relative_to(ROOT)), path.read_bytes()) for path in files]
        key = hashlib.sha256(repr((said, self.surroundings, texts)).encode()).hexdigest()
        return self.folder / f"{Path(source).as_posix().replace('/', '_')}.{key[:32]}.o"


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _version(compiler: Sequence[str]) -> bytes:
    """What a compiler says of itself; nothing where there is none."""
    try:
        return subprocess.run([*compiler, "--version"], capture_output=True).stdout
    except OSError:
        return b""


class BuildNative(build_ext):
    """Compile the C++ and CUDA sources with one set of flags and link them against ``libtorch`` alone."""

    def build_extension(self, ext: Extension) -> None:
        torch_root = _torch_root()
        assert torch_root is not None  # native_extensions() has looked
        kept = _Objects(torch_root, self.build_temp)
        includes = ["-I", str(ROOT / SOURCES), "-isystem", str(torch_root / "include")]
        python = ["-isystem", sysconfig.get_path("include")]
        defines = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", f"-DPy_LIMITED_API={PYTHON_LIMITED_API}"]
        flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden"]
        flags += ["-Wall", "-Wextra", "-DNDEBUG", *(["-Werror"] if WARNINGS_ARE_ERRORS else [])]
        flags += ["-Wno-psabi"]  # vectors wider than the machine's, none of which cross a call
        link: list[str] = []
        last: list[str] = []  # of the flags, so that its level of optimization is the one that counts
        if SANITIZED:
            sanitize = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer"]
            # Without the last, GCC fuses no product with a sum, as it does elsewhere.
            last += [*sanitize, "-fno-sanitize-recover=all", "-O1", "-g1", "-fexpensive-optimizations"]
            link += sanitize

        def compile_source(source: str) -> Path:
            own = _own_flags(Path(source))
            return kept.compile([*_compiler(), *flags, *own, *last, *defines, *includes, *python], source, self._run)

        module = str(SOURCES / "module.cpp")  # it says what the CUDA kernels were compiled for
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiling = [pool.submit(compile_source, source) for source in ext.sources if source != module]
            objects, cuda_root, archs = self._cuda_objects(kept, includes, defines)
        objects += [job.result() for job in compiling]
        if cuda_root:
            defines.append(f'-DFASTRIS_CUDA_ARCHS="{archs}"')
            link += [f"-L{cuda_root / 'lib64'}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        objects.append(compile_source(module))

        # libtorch.so itself must be a dependency: it brings libtorch_cuda where there is one, and with it the
        # symbols that csrc/stable_abi.h declares weak.
        if sys.platform == "darwin":
            link += ["-undefined", "dynamic_lookup"]
        else:
            link += [f"-L{torch_root / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-Wl,--exclude-libs,ALL"]
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        self._run([*_compiler(), "-shared", *map(str, objects), *link, "-o", str(output)])

    def _cuda_objects(
        self, kept: _Objects, includes: list[str], defines: list[str]
    ) -> tuple[list[Path], Path | None, str]:
        wanted = os.environ.get("FASTRIS_CUDA", "auto")
        archs = os.environ.get("FASTRIS_CUDA_ARCHS", DEFAULT_ARCHS)
        nvcc = _nvcc()
        if wanted == "0" or SANITIZED:
            return [], None, ""
        if nvcc is None:
            if wanted == "1":
                raise SystemExit("FASTRIS_CUDA=1, but no nvcc: put it on PATH or set CUDA_HOME")
            return [], None, ""
        flags = ["-std=c++17", "-O3", "--fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra", "-DNDEBUG"]
        flags += [*_gencode(archs), *(["-Werror=all-warnings", "-Xcompiler=-Werror"] if WARNINGS_ARE_ERRORS else [])]
        objects = []
        try:
            root = _cuda_root(nvcc)
            for source in sorted((ROOT / SOURCES).glob("cuda/*.cu")):
                command = [nvcc, *flags, *defines, *includes]
                objects.append(kept.compile(command, str(source.relative_to(ROOT)), self._run))
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            if wanted == "1":
                raise SystemExit(f"FASTRIS_CUDA=1, but the CUDA sources do not build: {error}") from error
            print(f"\nWARNING: fastris is built without its CUDA kernels: {error}\n", file=sys.stderr)
            return [], None, ""
        return objects, root, archs

    def _run(self, command: Sequence[str]) -> None:
        print(shlex.join(command), flush=True)
        subprocess.run(command, check=True, cwd=ROOT)
