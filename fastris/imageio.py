"""Reading images and label maps, and writing files whole or not at all."""

from __future__ import annotations

import io
import os
import struct
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastris.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

PathLike = str | os.PathLike[str]

MAX_LABEL = 65535  # what a 16-bit PNG holds
VOID = -1  # the label of pixels that count neither way
_PALETTE_VOID = 255


def read_image(path: PathLike) -> np.ndarray:
    """An image file as RGB, uint8 (H, W, 3).

    Grey becomes three equal channels, a palette its colours; alpha is dropped, not blended. More than 8 bits a pixel
    (16-bit, 32-bit and floating greys) are stretched from the image's own minimum..maximum to 0..255. The orientation
    in a photograph's EXIF data is applied.

    Raises:
        InputError: no such file, not an image, damaged, cut short or too large; the message names the file.
    """
    return to_rgb(_open(path, upright=True))


def to_rgb(image: Image.Image) -> np.ndarray:
    """A Pillow image of any mode as RGB, uint8 (H, W, 3), by the rules of :func:`read_image`."""
    if image.mode[0] in "IF":
        return np.repeat(stretch(np.asarray(image))[:, :, None], 3, axis=2)
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # straight to RGB, Pillow warns about a palette with transparency
    elif image.mode == "La":
        image = image.convert("LA")  # Pillow's only way from premultiplied grey
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def stretch(values: np.ndarray) -> np.ndarray:
    """Numbers of any range and shape as uint8, the smallest finite one to 0 and the largest to 255."""
    values = values.astype(np.float64)
    values = np.where(np.isfinite(values), values, 0.0)
    low, high = values.min(), values.max()
    return np.round((values - low) * (255.0 / (high - low) if high > low else 0.0)).astype(np.uint8)


def read_label_map(path: PathLike) -> np.ndarray:
    """A label map file as instance ids, int32 (H, W), 0 = background, −1 = void.

    8-, 16- and 32-bit greys and palette images hold the ids themselves; 255 in a palette image, as in Pascal VOC, is
    void. In a colour image every distinct colour is an instance and black is background; ids then follow the colours'
    order as hexadecimal numbers. Alpha is dropped.

    Raises:
        InputError: as for :func:`read_image`, or values that are not instance ids.
    """
    image = _open(path)
    if image.mode in ("P", "PA"):
        indices = np.asarray(image if image.mode == "P" else image.getchannel(0)).astype(np.int32)
        return np.where(indices == _PALETTE_VOID, VOID, indices)
    if _holds_numbers(image):
        return _whole_numbers(path, image)
    colours = np.asarray(image if image.mode == "RGB" else image.convert("RGB")).astype(np.int32)
    packed = colours[:, :, 0] << 16 | colours[:, :, 1] << 8 | colours[:, :, 2]
    ids, values = np.unique(np.append(packed.ravel(), 0), return_inverse=True)  # 0 first: background
    return values[:-1].reshape(packed.shape).astype(np.int32)


def read_indices(path: PathLike) -> np.ndarray:
    """The numbers that a grey or palette image file holds, int32 (H, W), as they are.

    Raises:
        InputError: as for :func:`read_image`, a colour image, or numbers that are negative or not whole.
    """
    image = _open(path)
    if image.mode == "P":
        return np.asarray(image).astype(np.int32)
    if not _holds_numbers(image):
        raise InputError(f"{path}: expected a grey or palette image, got one of mode {image.mode}")
    return _whole_numbers(path, image)


def write_label_map(path: PathLike, labels: np.ndarray) -> None:
    """Write instance ids (H, W), 0 to 65535, as a 16-bit grey PNG, whole or not at all.

    Raises:
        InputError: ids out of range, or the directory cannot be written.
    """
    from PIL import Image

    labels = np.asarray(labels)
    if labels.ndim != 2 or not (np.issubdtype(labels.dtype, np.integer) or labels.dtype == bool):
        raise InputError(f"write_label_map: expected integer (H, W), got {labels.dtype} {labels.shape}")
    if labels.size and (labels.min() < 0 or labels.max() > MAX_LABEL):
        raise InputError(f"{path}: a 16-bit PNG holds ids 0 to {MAX_LABEL}, got {labels.min()} to {labels.max()}")
    write_image(path, Image.fromarray(labels.astype(np.uint16)))


def write_image(path: PathLike, image: Image.Image | np.ndarray) -> None:
    """Write a Pillow image, or a uint8 (H, W, 3) or (H, W) array, as a PNG, whole or not at all.

    Raises:
        InputError: the directory cannot be written.
    """
    if isinstance(image, np.ndarray):
        from PIL import Image

        image = Image.fromarray(image)
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG")


@contextmanager
def atomic_write(path: PathLike) -> Iterator[Path]:
    """A temporary path beside `path` to write to, which becomes `path` if the block succeeds and vanishes if not.

    Raises:
        InputError: the directory is missing or cannot be written, or `path` is a directory.
    """
    path = Path(path)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:40]}.", suffix=path.suffix)
    except OSError as error:
        raise InputError(f"{path.parent}: cannot write to this directory: {error.strerror}") from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        try:
            os.replace(temporary, path)
        except OSError as error:
            raise InputError(f"{path}: cannot write this file: {error.strerror}") from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def make_output_directory(path: PathLike) -> Path:
    """Create `path` with its parents if needed, and make sure that files can be written in it.

    Raises:
        InputError: it cannot be created or written; the message names it.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot write to this directory: {error.strerror}") from None
    return path


def _open(path: PathLike, upright: bool = False) -> Image.Image:
    """The decoded first frame of an image file, turned as its EXIF data says if `upright`."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: expected an image file, this is a directory")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # unreadable metadata and sizes that Pillow finds suspicious but reads
            image = Image.open(io.BytesIO(path.read_bytes()))
            image.load()
            return ImageOps.exif_transpose(image) if upright else image
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise InputError(f"{path}: not an image, or damaged") from None
    except Image.DecompressionBombError:
        raise InputError(
            f"{path}: too large an image (more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels)"
        ) from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, MemoryError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: cannot read this image: {reason}") from None


def _holds_numbers(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I")


def _whole_numbers(path: PathLike, image: Image.Image) -> np.ndarray:
    """The values of a grey image as int32."""
    values = np.asarray(image.getchannel(0) if image.mode == "LA" else image)
    if image.mode == "F" and (not np.isfinite(values).all() or (values != np.round(values)).any()):
        raise InputError(f"{path}: a label map holds whole numbers, this has fractions")
    if values.size and (values.min() < 0 or values.max() > np.iinfo(np.int32).max):
        raise InputError(f"{path}: a label map holds ids from 0, this has {values.min():g} to {values.max():g}")
    return values.astype(np.int32)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
