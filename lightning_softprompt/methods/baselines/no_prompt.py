"""The frozen backbone without a prompt."""

from __future__ import annotations

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.methods.base import SoftPromptModule


class NoPrompt(SoftPromptModule):
    """No soft prompt: the zero-shot backbone, as a baseline.

    Paper: none
    Enters: nowhere
    Parameters: 0
    """

    trains = False

    def build(self, backbone: Backbone) -> None:
        """Creates no parameters."""

    def prompt(self, batch: Batch) -> SoftPrompt:
        """Returns an empty prompt."""
        return SoftPrompt()
