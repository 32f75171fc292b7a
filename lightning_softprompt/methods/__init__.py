"""The methods of the literature, one `LightningModule` a file."""

from lightning_softprompt.methods.adept import ADePT
from lightning_softprompt.methods.attempt import ATTEMPT
from lightning_softprompt.methods.bare import Bare
from lightning_softprompt.methods.cartridge import Cartridge
from lightning_softprompt.methods.context_aware import ContextAware
from lightning_softprompt.methods.dept import DePT
from lightning_softprompt.methods.dpt import DPT
from lightning_softprompt.methods.folded import Folded
from lightning_softprompt.methods.full_fine_tuning import FullFineTuning
from lightning_softprompt.methods.idpg import IDPG
from lightning_softprompt.methods.late_prompt_tuning import LatePromptTuning
from lightning_softprompt.methods.lora import LoRA
from lightning_softprompt.methods.mpt import MPT
from lightning_softprompt.methods.p_tuning import PTuning
from lightning_softprompt.methods.p_tuning_v2 import PTuningV2
from lightning_softprompt.methods.prefix_tuning import PrefixTuning
from lightning_softprompt.methods.prompt_bank import PromptBank
from lightning_softprompt.methods.prompt_tuning import PromptTuning
from lightning_softprompt.methods.pt_moe import PTMoE
from lightning_softprompt.methods.residual_prompt_tuning import ResidualPromptTuning
from lightning_softprompt.methods.smop import SMoP
from lightning_softprompt.methods.spring import Spring
from lightning_softprompt.methods.transprompt import TransPrompt
from lightning_softprompt.methods.ulpt import ULPT
from lightning_softprompt.methods.xprompt import XPrompt

__all__ = [
    "ATTEMPT",
    "DPT",
    "IDPG",
    "MPT",
    "ULPT",
    "ADePT",
    "Bare",
    "Cartridge",
    "ContextAware",
    "DePT",
    "Folded",
    "FullFineTuning",
    "LatePromptTuning",
    "LoRA",
    "PTMoE",
    "PTuning",
    "PTuningV2",
    "PrefixTuning",
    "PromptBank",
    "PromptTuning",
    "ResidualPromptTuning",
    "SMoP",
    "Spring",
    "TransPrompt",
    "XPrompt",
]
