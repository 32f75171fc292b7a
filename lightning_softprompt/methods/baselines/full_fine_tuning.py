"""Full fine-tuning, the baseline."""

from __future__ import annotations

from torch import nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.methods.base import SoftPromptModule


class FullFineTuning(SoftPromptModule):
    """Every weight of the backbone is trained, to compare with.

    Its checkpoints hold all weights. `prompted=False` is the backbone as it has become, not as it was.

    Paper: none
    Enters: all weights
    Parameters: those of the backbone
    """

    default_rate = 2e-5
    changes_backbone = True

    def build(self, backbone: Backbone) -> None:
        """Takes the backbone's weights for its own, as `weights`."""
        backbone.unfreeze()
        weights = backbone.model.requires_grad_().named_parameters()
        self.weights = nn.ParameterDict({name.replace(".", "/"): weight for name, weight in weights})

    def prompt(self, batch: Batch) -> SoftPrompt:
        """An empty prompt."""
        return SoftPrompt()
