"""The methods of the literature, one `LightningModule` a file."""

from lightning_softprompt.methods.bare import Bare
from lightning_softprompt.methods.prompt_tuning import PromptTuning

__all__ = ["Bare", "PromptTuning"]
