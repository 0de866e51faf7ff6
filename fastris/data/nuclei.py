"""Data Science Bowl 2018 nuclei, as the directory or the zip that Kaggle ships."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from fastris.data.dataset import InstanceDataset, check_split, select_split
from fastris.data.sample import Sample, sample_from_arrays
from fastris.errors import InputError

_BROKEN = (OSError, SyntaxError, ValueError, IndexError, struct.error)  # what Pillow raises on damaged files
_LAYOUT = "<id>/images/<id>.png with <id>/masks/*.png, as in stage1_train.zip of the 2018 Data Science Bowl"


class NucleiDataset(InstanceDataset):
    """Nuclei of the 2018 Data Science Bowl (BBBC038): one binary PNG per nucleus.

    Args:
        root: the zip, or the directory it was unpacked to.
        split: "train", "validation" (the tenth of the ids for which :func:`fastris.data.in_validation` holds;
            at least one of a handful) or "all".
        max_instances: keep only images with at most this many mask files.
        size: keep only images of this (H, W) in pixels.
        cache: see :class:`InstanceDataset`.

    Where masks overlap, the first in order of file name keeps the pixel. Empty masks are dropped.

    Raises:
        InputError: no such file, no images in it; and on access, an image without masks, a broken PNG or a
            mask of another size than its image, each naming the file.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        max_instances: int | None = None,
        size: tuple[int, int] | None = None,
        cache: bool | int = True,
    ) -> None:
        check_split(split)
        self.files = _open_files(Path(root))
        self._images: dict[str, str] = {}
        self._masks: dict[str, list[str]] = {}
        for path in self.files.list():
            parts = PurePosixPath(path).parts
            if len(parts) < 3 or parts[-1].startswith(".") or parts[0] == "__MACOSX":
                continue
            folder, kind = parts[-3], parts[-2]
            if kind == "images":
                self._images[folder] = path
            elif kind == "masks":
                self._masks.setdefault(folder, []).append(path)
        if not self._images:
            raise InputError(f"{root}: no images found; expected {_LAYOUT}")
        names = select_split(sorted(self._images), split)
        if max_instances is not None:
            names = [name for name in names if len(self._masks.get(name, ())) <= max_instances]
        if size is not None:
            names = [name for name in names if self._size(name) in (None, tuple(size))]
        super().__init__(names, cache)

    def _size(self, name: str) -> tuple[int, int] | None:
        """(H, W) from the image's header, None where it is broken: reading it will say so."""
        from PIL import Image

        try:
            with Image.open(io.BytesIO(self.files.read(self._images[name]))) as image:
                return image.height, image.width
        except (OSError, SyntaxError, InputError, Image.DecompressionBombError):
            return None

    def _read(self, index: int) -> Sample:
        name = self.names[index]
        path = self._images[name]
        image = self._image(path)
        mask_paths = self._masks.get(name)
        if not mask_paths:
            raise InputError(f"{self.files.describe(path)}: image without masks; expected {_LAYOUT}")
        labels = np.zeros(image.shape[:2], np.int32)
        for label, mask_path in enumerate(sorted(mask_paths), start=1):
            mask = self._decode(mask_path, "L")
            if mask.shape != labels.shape:
                sizes = "a mask of {1}x{0} pixels for an image of {3}x{2}".format(*mask.shape, *labels.shape)
                raise InputError(f"{self.files.describe(mask_path)}: {sizes}")
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            if rows.size:
                box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
                view = labels[box]
                view[(mask[box] != 0) & (view == 0)] = label
        return sample_from_arrays(image, labels, name)

    def _image(self, path: str) -> np.ndarray:
        """RGB uint8 (H, W, 3), without alpha."""
        if isinstance(self.files, _DirectoryFiles):
            from fastris.imageio import read_image

            return read_image(self.files.root / path)
        return self._decode(path, "RGB")

    def _decode(self, path: str, mode: str) -> np.ndarray:
        """A file's pixels: "RGB" uint8 (H, W, 3), or "L" uint8 (H, W)."""
        from PIL import Image

        try:
            with Image.open(io.BytesIO(self.files.read(path))) as image:
                if image.mode[0] not in "IF":
                    return np.asarray(image.convert(mode))
                deep = np.asarray(image)
        except (*_BROKEN, Image.DecompressionBombError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{self.files.describe(path)}: cannot read this image: {error}") from error
        if mode == "RGB":
            raise InputError(f"{self.files.describe(path)}: expected 8 bits a channel, got more")
        return (deep != 0).astype(np.uint8)


class _DirectoryFiles:
    """The files below a directory, by path relative to it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def list(self) -> list[str]:
        return sorted(path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file())

    def read(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def describe(self, path: str) -> str:
        return str(self.root / path)


class _ZipFiles:
    """The members of a zip, with a handle per process: one shared across a fork would mix up its seeks."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._handle: zipfile.ZipFile | None = None
        self._owner = -1
        self._zip()

    def _zip(self) -> zipfile.ZipFile:
        if self._handle is None or self._owner != os.getpid():
            try:
                self._handle, self._owner = zipfile.ZipFile(self.root), os.getpid()
            except (OSError, zipfile.BadZipFile) as error:
                raise InputError(f"{self.root}: cannot open zip ({error})") from error
        return self._handle

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "_handle": None, "_owner": -1}

    def list(self) -> list[str]:
        return [info.filename for info in self._zip().infolist() if not info.is_dir()]

    def read(self, path: str) -> bytes:
        try:
            return self._zip().read(path)
        except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise InputError(f"{self.describe(path)}: cannot read ({error})") from error

    def describe(self, path: str) -> str:
        return f"{self.root}:{path}"


def _open_files(root: Path) -> _DirectoryFiles | _ZipFiles:
    if root.is_dir():
        return _DirectoryFiles(root)
    if not root.exists():
        raise InputError(f"{root}: no such file or directory; expected {_LAYOUT}")
    return _ZipFiles(root)
