"""Full fine-tuning, as a baseline."""

from __future__ import annotations

from torch import nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.methods.base import SoftPromptModule


class FullFineTuning(SoftPromptModule):
    """Full fine-tuning of all weights of the backbone, as a baseline.

    Checkpoints contain all weights. `prompted=False` uses the fine-tuned backbone, not the original one.

    Paper: none
    Enters: all weights
    Parameters: the parameters of the backbone
    """

    default_rate = 2e-5
    changes_backbone = True

    def build(self, backbone: Backbone) -> None:
        """Registers the backbone's weights as `weights`, without copying them."""
        backbone.unfreeze()
        weights = backbone.model.requires_grad_().named_parameters()
        self.weights = nn.ParameterDict({name.replace(".", "/"): weight for name, weight in weights})

    def merge(self) -> None:
        """Does nothing, since the trained weights are those of the model."""

    def prompt(self, batch: Batch) -> SoftPrompt:
        """Returns an empty prompt."""
        return SoftPrompt()
