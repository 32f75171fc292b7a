"""Template paraphrases: another frame of the same row in each epoch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import final

from lightning_softprompt.data.augmentation.base import Augmentation, Draft, RowText
from lightning_softprompt.data.sampling.epoch_indexed import Rng


@final
@dataclass(frozen=True)
class Templates(Augmentation):
    """Writes each training row with one of several templates, drawn per row and epoch.

    Validation and test use the template of the data module. A template of `InstructionDataModule` is the text of the
    user turn, with `{instruction}` and `{input}`.

    Args:
        templates: The templates. Add that of the data module if it is one of them.

    Raises:
        ValueError: If there are no templates.
    """

    templates: Sequence[str]

    def __post_init__(self) -> None:
        if not self.templates:
            raise ValueError("Templates requires at least one template")

    def check(self, text: RowText) -> None:
        """Refuses templates that cannot replace that of the data module."""
        for template in self.templates:
            text.check_template(template)

    def apply(self, draft: Draft, rng: Rng, draw_other: Callable[[], Draft], fits: Callable[[Draft], bool]) -> Draft:
        """Returns the row with a random template."""
        return replace(draft, template=self.templates[int(rng.integers(len(self.templates)))])
