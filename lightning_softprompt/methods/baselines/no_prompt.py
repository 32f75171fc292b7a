"""The frozen backbone by itself."""

from __future__ import annotations

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.methods.base import SoftPromptModule


class NoPrompt(SoftPromptModule):
    """No soft prompt: the zero-shot backbone, to compare with.

    Paper: none
    Enters: nowhere
    Parameters: 0
    """

    trains = False

    def build(self, backbone: Backbone) -> None:
        """Nothing to train."""

    def prompt(self, batch: Batch) -> SoftPrompt:
        """An empty prompt."""
        return SoftPrompt()
