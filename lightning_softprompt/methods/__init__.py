"""Soft-prompt methods, one `LightningModule` per file."""

from lightning_softprompt.methods.baselines.full_fine_tuning import FullFineTuning
from lightning_softprompt.methods.baselines.in_context import InContext
from lightning_softprompt.methods.baselines.lora import LoRA
from lightning_softprompt.methods.baselines.no_prompt import NoPrompt
from lightning_softprompt.methods.combined import Combined
from lightning_softprompt.methods.image_prompts.cocoop import CoCoOp
from lightning_softprompt.methods.image_prompts.coop import CoOp
from lightning_softprompt.methods.image_prompts.maple import MaPLe
from lightning_softprompt.methods.image_prompts.vpt import VisualPromptTuning
from lightning_softprompt.methods.input_prompts.adept import ADePT
from lightning_softprompt.methods.input_prompts.context_aware import ContextAware
from lightning_softprompt.methods.input_prompts.dept import DePT
from lightning_softprompt.methods.input_prompts.dpt import DPT
from lightning_softprompt.methods.input_prompts.new_tokens import NewTokens
from lightning_softprompt.methods.input_prompts.p_tuning import PTuning
from lightning_softprompt.methods.input_prompts.prompt_tuning import PromptTuning
from lightning_softprompt.methods.input_prompts.residual_prompt_tuning import ResidualPromptTuning
from lightning_softprompt.methods.input_prompts.spring import Spring
from lightning_softprompt.methods.input_prompts.ulpt import ULPT
from lightning_softprompt.methods.input_prompts.xprompt import XPrompt
from lightning_softprompt.methods.layer_prompts.cartridge import Cartridge
from lightning_softprompt.methods.layer_prompts.late_prompt_tuning import LatePromptTuning
from lightning_softprompt.methods.layer_prompts.p_tuning_v2 import PTuningV2
from lightning_softprompt.methods.layer_prompts.prefix_tuning import PrefixTuning
from lightning_softprompt.methods.row_prompts.idpg import IDPG
from lightning_softprompt.methods.row_prompts.pt_moe import PTMoE
from lightning_softprompt.methods.row_prompts.smop import SMoP
from lightning_softprompt.methods.task_prompts.attempt import ATTEMPT
from lightning_softprompt.methods.task_prompts.mpt import MPT
from lightning_softprompt.methods.task_prompts.transprompt import TransPrompt
from lightning_softprompt.methods.trained.folded import Folded
from lightning_softprompt.methods.trained.prompt_bank import PromptBank

__all__ = [
    "ATTEMPT",
    "DPT",
    "IDPG",
    "MPT",
    "ULPT",
    "ADePT",
    "Cartridge",
    "CoCoOp",
    "CoOp",
    "Combined",
    "ContextAware",
    "DePT",
    "Folded",
    "FullFineTuning",
    "InContext",
    "LatePromptTuning",
    "LoRA",
    "MaPLe",
    "NewTokens",
    "NoPrompt",
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
    "VisualPromptTuning",
    "XPrompt",
]
