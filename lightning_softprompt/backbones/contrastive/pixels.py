"""Converts images to the pixels that a backbone reads, with its image processor of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import AutoImageProcessor

from lightning_softprompt.backbones.loading import from_pretrained
from lightning_softprompt.backbones.location import resolve_location
from lightning_softprompt.core.backbone_spec import BackboneSpec

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class PixelCodec:
    """Resizes, crops and normalizes images. Picklable, so that data workers can use it.

    Args:
        processor: The image processor of the backbone.
    """

    processor: Any

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the result."""
        size = self.processor.crop_size if getattr(self.processor, "do_center_crop", False) else self.processor.size
        side = size.get("shortest_edge") or size.get("height")
        return int(size.get("height") or side), int(size.get("width") or side)

    def __call__(self, images: Sequence[Image]) -> Tensor:
        """Returns the pixels [B, 3, h, w] of images in RGB."""
        return self.processor(images=list(images), return_tensors="pt")["pixel_values"]  # type: ignore[no-any-return]


def load_pixel_codec(spec: BackboneSpec) -> PixelCodec:
    """Loads the image processor of a backbone, on Pillow, so that pixels are the same with and without torchvision.

    Raises:
        ValueError: If the backbone has none.
    """
    processor = from_pretrained(
        AutoImageProcessor.from_pretrained,
        resolve_location(spec),
        f"the image processor of {spec.name!r}",
        backend="pil",
    )
    return PixelCodec(processor)
