"""Collates rows with images: reads the images, cuts out the part that is shown, and computes pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, cast, final

import torch
from torch import Tensor

from lightning_softprompt.backbones.contrastive.pixels import PixelCodec
from lightning_softprompt.core.types import Batch, Encoded, Example, ImageExample, ImageRef, ImageView
from lightning_softprompt.data.images.image_files import read_image
from lightning_softprompt.data.prepared import Collate
from lightning_softprompt.data.sampling.epoch_indexed import EpochIndexedRows, Item, Rng

if TYPE_CHECKING:
    from PIL.Image import Image

MIN_RATIO, MAX_RATIO = 3 / 4, 4 / 3  # of the width and height of a random part, as in torchvision


@dataclass(frozen=True)
class ImageCollate(Collate):
    """Collates rows with images into a batch.

    Pixels of whole images are kept in memory up to a limit, so that few images are decoded only once.

    Args:
        codec: The codec of texts.
        pixels: Converts images to pixels.
        max_pixels: Maximum pixels of an image.
        memory: Maximum bytes of the pixels in memory.
    """

    pixels: PixelCodec
    max_pixels: int
    memory: int
    stored: dict[ImageRef, tuple[Tensor, str]] = field(default_factory=dict, compare=False, repr=False)

    def __call__(self, items: Sequence[tuple[int, Encoded, Example]]) -> Batch:
        """Returns the batch, with its images and their hashes."""
        examples = [cast(ImageExample, example) for _, _, example in items]
        pairs = [self._pixels(example) for example in examples]
        keys = tuple(key for _, key in pairs)
        images = torch.stack([pixels for pixels, _ in pairs])
        return replace(super().__call__(items), images=images, image_keys=keys if all(keys) else ())

    def _pixels(self, example: ImageExample) -> tuple[Tensor, str]:
        """The pixels [3, h, w] of an image, and their hash; no hash for a random part."""
        if example.view is not None:
            image = cut_out(read_image(example.image, self.max_pixels), example.view, self.pixels.size)
            return self.pixels([image])[0], ""
        if example.image in self.stored:
            return self.stored[example.image]
        pixels = self.pixels([read_image(example.image, self.max_pixels)])[0]
        entry = pixels, blake2b(pixels.numpy().tobytes(), digest_size=16).hexdigest()
        if (len(self.stored) + 1) * pixels.nbytes <= self.memory:
            self.stored[example.image] = entry
        return entry


def cut_out(image: Image, view: ImageView, size: tuple[int, int]) -> Image:
    """Returns a part of an image, resized to height and width."""
    from PIL import Image as Pillow
    from PIL import ImageOps

    width, height = image.width, image.height
    if view.ratio is not None:
        target = view.area * width * height
        width = min(width, max(1, round((target * view.ratio) ** 0.5)))
        height = min(height, max(1, round((target / view.ratio) ** 0.5)))
    left = round(view.left * (image.width - width))
    top = round(view.top * (image.height - height))
    box = (left, top, left + width, top + height)
    part = image.resize((size[1], size[0]), Pillow.Resampling.BICUBIC, box=box) if view.ratio is not None else image
    return ImageOps.mirror(part) if view.is_mirrored else part


@final
@dataclass(frozen=True)
class ViewedRows(EpochIndexedRows):
    """Training rows with another random part of their image in each epoch.

    Args:
        rows: The rows.
        seed: Seed of the parts.
        min_area: Smallest share of the area of an image; 1 shows the whole image.
        mirrors: Whether half of the images are mirrored.
    """

    min_area: float
    mirrors: bool

    def draw(self, row: int, rng: Rng) -> Item:
        """Returns a row with a part of its image."""
        area, ratio, left, top, mirror = rng.random(5).tolist()
        is_cut = self.min_area < 1
        view = ImageView(
            area=self.min_area + area * (1 - self.min_area),
            ratio=MIN_RATIO * (MAX_RATIO / MIN_RATIO) ** ratio if is_cut else None,
            left=left,
            top=top,
            is_mirrored=self.mirrors and mirror < 0.5,
        )
        example = cast(ImageExample, self.rows.examples[row])
        return row, self.rows.encoded[row], replace(example, view=view)
