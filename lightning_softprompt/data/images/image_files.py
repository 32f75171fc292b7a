"""Opens images: from files, bytes, arrays or Pillow's images, with errors that name the image."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Mapping
from functools import singledispatch
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lightning_softprompt.core.types import ImageRef

# What Pillow raises for files that are no images, or broken ones.
BROKEN = (UnidentifiedImageError, OSError, SyntaxError, ValueError, struct.error, EOFError, MemoryError)
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@singledispatch
def image_ref(value: object) -> ImageRef:
    """Returns the image of a cell of a row: a path, bytes, an array or an image of Pillow.

    Raises:
        ValueError: If the value is none of these.
    """
    raise ValueError(f"an image must be a path, bytes, a NumPy array or an image of Pillow, got {type(value).__name__}")


@image_ref.register(str)
@image_ref.register(Path)
def _from_path(path: str | Path) -> ImageRef:
    if not str(path).strip():
        raise ValueError("the path of an image is empty")
    return ImageRef(str(Path(path).expanduser()))


@image_ref.register
def _from_bytes(data: bytes) -> ImageRef:
    return ImageRef(digest=blake2b(data, digest_size=12).hexdigest(), data=data)


@image_ref.register
def _from_mapping(value: Mapping) -> ImageRef:  # type: ignore[type-arg]
    """The format of Parquet files of the package `datasets`."""
    if value.get("bytes") is not None:
        return _from_bytes(value["bytes"])
    if value.get("path"):
        return _from_path(value["path"])
    raise ValueError(f"an image requires the key 'bytes' or 'path', got {sorted(map(str, value))}")


@image_ref.register
def _from_image(image: Image.Image) -> ImageRef:
    content = BytesIO()
    image.save(content, format="PNG")
    return _from_bytes(content.getvalue())


@image_ref.register
def _from_array(pixels: np.ndarray) -> ImageRef:  # type: ignore[type-arg]
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
        raise ValueError(
            f"an array of pixels must be [h, w] or [h, w, 3] of the type uint8, got {list(pixels.shape)} of "
            f"{pixels.dtype}"
        )
    return _from_image(Image.fromarray(pixels))


def check_image(ref: ImageRef, max_pixels: int) -> None:
    """Reads the beginning of an image, without its pixels.

    Raises:
        ValueError: If it does not exist, is no image, or has too many pixels.
    """
    with _open(ref, max_pixels):
        pass


def read_image(ref: ImageRef, max_pixels: int) -> Image.Image:
    """Returns an image in RGB, turned as its EXIF data say.

    Raises:
        ValueError: As `check_image`, and if its pixels are broken or incomplete.
    """
    with _open(ref, max_pixels) as image:
        try:
            upright = ImageOps.exif_transpose(image)
            return upright.convert("RGB")
        except BROKEN as error:
            raise ValueError(f"{ref.name} is a broken or incomplete image: {error}; write it again") from error


def _open(ref: ImageRef, max_pixels: int) -> Any:
    if ref.data is None and not Path(ref.path).is_file():
        raise ValueError(f"there is no image {ref.path}; paths are relative to the file of rows")
    source = Path(ref.path) if ref.data is None else BytesIO(ref.data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below replaces it
            image = Image.open(source)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{ref.name} is too large: {error}; scale it down") from None
    except BROKEN as error:
        raise ValueError(f"{ref.name} is no image that Pillow can read, or a broken one; write it again") from error
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        raise ValueError(
            f"{ref.name} has {width} x {height} pixels, more than data.max_pixels={max_pixels:,}; scale it down, or "
            "increase max_pixels"
        )
    return image
