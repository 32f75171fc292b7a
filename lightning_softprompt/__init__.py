"""Lightning SoftPrompt: soft-prompt tuning of frozen language models in PyTorch Lightning.

Public names are imported from their modules at their first use, so that `import lightning_softprompt` is fast.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_softprompt import moved

if TYPE_CHECKING:
    from lightning_softprompt.analysis.attention_mass import measure_attention
    from lightning_softprompt.backbones.base import Backbone
    from lightning_softprompt.backbones.generation.decoding import Decoding
    from lightning_softprompt.backbones.loading import load_backbone
    from lightning_softprompt.backbones.prompted_lm import PromptedLM
    from lightning_softprompt.backbones.requirements import takes_keys_and_values, takes_late_tokens
    from lightning_softprompt.backbones.tokenization.codec import Codec
    from lightning_softprompt.checkpoints.prompt_sources import report_prompt_source
    from lightning_softprompt.core.backbone_spec import BackboneSpec
    from lightning_softprompt.core.chat_format import ChatFormat
    from lightning_softprompt.core.template import Template
    from lightning_softprompt.core.types import Batch, Classes, Example, OptionExample, SoftPrompt, options_of
    from lightning_softprompt.data.classification import ClassificationDataModule
    from lightning_softprompt.data.corpus.datamodule import CorpusDataModule
    from lightning_softprompt.data.corpus.sentence_pairs import SentencePairDataModule
    from lightning_softprompt.data.datamodule import SoftPromptDataModule
    from lightning_softprompt.data.images.datamodule import ImageClassificationDataModule
    from lightning_softprompt.data.instruction.datamodule import InstructionDataModule
    from lightning_softprompt.data.multiple_choice import MultipleChoiceDataModule
    from lightning_softprompt.data.multitask import MultitaskDataModule
    from lightning_softprompt.data.preference import PreferenceDataModule
    from lightning_softprompt.data.prompts import PromptDataModule
    from lightning_softprompt.data.summarization import SummarizationDataModule
    from lightning_softprompt.data.tagging import TaggingDataModule
    from lightning_softprompt.evaluation.base import Evaluation
    from lightning_softprompt.evaluation.classification import ClassificationEvaluation
    from lightning_softprompt.evaluation.instruction import InstructionEvaluation
    from lightning_softprompt.evaluation.likelihood import LikelihoodEvaluation
    from lightning_softprompt.evaluation.options import OptionEvaluation
    from lightning_softprompt.evaluation.policy.reward_evaluation import RewardEvaluation
    from lightning_softprompt.evaluation.preferences.pairs import PreferenceEvaluation
    from lightning_softprompt.inference.prompt import Prompt, load_prompt, save_prompt
    from lightning_softprompt.interchange.past_export import to_past
    from lightning_softprompt.interchange.peft_export import to_peft
    from lightning_softprompt.interchange.peft_import import from_peft
    from lightning_softprompt.interchange.vocabulary_export import to_vocabulary
    from lightning_softprompt.methods import (
        ATTEMPT,
        DPT,
        IDPG,
        MPT,
        ULPT,
        ADePT,
        Cartridge,
        CoCoOp,
        Combined,
        ContextAware,
        CoOp,
        DePT,
        Folded,
        FullFineTuning,
        InContext,
        LatePromptTuning,
        LoRA,
        MaPLe,
        NewTokens,
        NoPrompt,
        PrefixTuning,
        PromptBank,
        PromptTuning,
        PTMoE,
        PTuning,
        PTuningV2,
        ResidualPromptTuning,
        SMoP,
        Spring,
        TransPrompt,
        VisualPromptTuning,
        XPrompt,
    )
    from lightning_softprompt.methods.base import SoftPromptModule
    from lightning_softprompt.objectives.base import Objective, Outcome
    from lightning_softprompt.objectives.classification import Classification
    from lightning_softprompt.objectives.context_distillation import ContextDistillation
    from lightning_softprompt.objectives.distillation import Distillation
    from lightning_softprompt.objectives.language_modeling import LanguageModeling
    from lightning_softprompt.objectives.penalties import Penalty
    from lightning_softprompt.objectives.policy.grpo import GRPO
    from lightning_softprompt.objectives.policy.ppo import PPO
    from lightning_softprompt.objectives.policy.rloo import RLOO
    from lightning_softprompt.objectives.preference.dpo import DPO
    from lightning_softprompt.objectives.preference.ipo import IPO
    from lightning_softprompt.objectives.preference.kto import KTO
    from lightning_softprompt.objectives.preference.orpo import ORPO
    from lightning_softprompt.objectives.preference.simpo import SimPO
    from lightning_softprompt.objectives.reward_modeling import RewardModeling
    from lightning_softprompt.prompts.init import FromText, Init, SampleVocabulary
    from lightning_softprompt.rag.answer_form import AnswerForm
    from lightning_softprompt.rag.passage_selection import PassageNoise, PassageSettings
    from lightning_softprompt.rag.qa_datamodule import RagQaDataModule
    from lightning_softprompt.rag.relevance_datamodule import RelevanceDataModule
    from lightning_softprompt.readouts.auto import AutoReadout
    from lightning_softprompt.readouts.base import Readout, WordReadout
    from lightning_softprompt.readouts.calibrated import Calibrated
    from lightning_softprompt.readouts.class_head import ClassHead
    from lightning_softprompt.readouts.image_head import ImageHead
    from lightning_softprompt.readouts.label_words import LabelWords
    from lightning_softprompt.readouts.ranked import RankedChoices
    from lightning_softprompt.readouts.ranked_options import RankedOptions
    from lightning_softprompt.readouts.reward_head import RewardHead
    from lightning_softprompt.readouts.token_head import TokenHead
    from lightning_softprompt.readouts.value_head import ValueHead
    from lightning_softprompt.retrieval.passages.documents import Passage
    from lightning_softprompt.retrieval.reranker import Reranker
    from lightning_softprompt.retrieval.retriever import Retriever
    from lightning_softprompt.retrieval.search.settings import IndexSettings
    from lightning_softprompt.rewards.base import Reward
    from lightning_softprompt.runs.run_spec import RunSpec
    from lightning_softprompt.training.trainer import Trainer

__version__ = "0.2.0"

__all__ = [
    "ATTEMPT",
    "DPO",
    "DPT",
    "GRPO",
    "IDPG",
    "IPO",
    "KTO",
    "MPT",
    "ORPO",
    "PPO",
    "RLOO",
    "ULPT",
    "ADePT",
    "AnswerForm",
    "AutoReadout",
    "Backbone",
    "BackboneSpec",
    "Batch",
    "Calibrated",
    "Cartridge",
    "ChatFormat",
    "ClassHead",
    "Classes",
    "Classification",
    "ClassificationDataModule",
    "ClassificationEvaluation",
    "CoCoOp",
    "CoOp",
    "Codec",
    "Combined",
    "ContextAware",
    "ContextDistillation",
    "CorpusDataModule",
    "DePT",
    "Decoding",
    "Distillation",
    "Evaluation",
    "Example",
    "Folded",
    "FromText",
    "FullFineTuning",
    "ImageClassificationDataModule",
    "ImageHead",
    "InContext",
    "IndexSettings",
    "Init",
    "InstructionDataModule",
    "InstructionEvaluation",
    "LabelWords",
    "LanguageModeling",
    "LatePromptTuning",
    "LikelihoodEvaluation",
    "LoRA",
    "MaPLe",
    "MultipleChoiceDataModule",
    "MultitaskDataModule",
    "NewTokens",
    "NoPrompt",
    "Objective",
    "OptionEvaluation",
    "OptionExample",
    "Outcome",
    "PTMoE",
    "PTuning",
    "PTuningV2",
    "Passage",
    "PassageNoise",
    "PassageSettings",
    "Penalty",
    "PreferenceDataModule",
    "PreferenceEvaluation",
    "PrefixTuning",
    "Prompt",
    "PromptBank",
    "PromptDataModule",
    "PromptTuning",
    "PromptedLM",
    "RagQaDataModule",
    "RankedChoices",
    "RankedOptions",
    "Readout",
    "RelevanceDataModule",
    "Reranker",
    "ResidualPromptTuning",
    "Retriever",
    "Reward",
    "RewardEvaluation",
    "RewardHead",
    "RewardModeling",
    "RunSpec",
    "SMoP",
    "SampleVocabulary",
    "SentencePairDataModule",
    "SimPO",
    "SoftPrompt",
    "SoftPromptDataModule",
    "SoftPromptModule",
    "Spring",
    "SummarizationDataModule",
    "TaggingDataModule",
    "Template",
    "TokenHead",
    "Trainer",
    "TransPrompt",
    "ValueHead",
    "VisualPromptTuning",
    "WordReadout",
    "XPrompt",
    "from_peft",
    "load_backbone",
    "load_prompt",
    "measure_attention",
    "options_of",
    "report_prompt_source",
    "save_prompt",
    "takes_keys_and_values",
    "takes_late_tokens",
    "to_past",
    "to_peft",
    "to_vocabulary",
]

HOMES = {  # the module of each public name that is not a method
    "AnswerForm": "rag.answer_form",
    "AutoReadout": "readouts.auto",
    "Backbone": "backbones.base",
    "BackboneSpec": "core.backbone_spec",
    "Batch": "core.types",
    "Calibrated": "readouts.calibrated",
    "ChatFormat": "core.chat_format",
    "ClassHead": "readouts.class_head",
    "Classes": "core.types",
    "Classification": "objectives.classification",
    "ClassificationDataModule": "data.classification",
    "ClassificationEvaluation": "evaluation.classification",
    "Codec": "backbones.tokenization.codec",
    "ContextDistillation": "objectives.context_distillation",
    "CorpusDataModule": "data.corpus.datamodule",
    "DPO": "objectives.preference.dpo",
    "Decoding": "backbones.generation.decoding",
    "Distillation": "objectives.distillation",
    "Evaluation": "evaluation.base",
    "Example": "core.types",
    "FromText": "prompts.init",
    "GRPO": "objectives.policy.grpo",
    "IPO": "objectives.preference.ipo",
    "ImageClassificationDataModule": "data.images.datamodule",
    "ImageHead": "readouts.image_head",
    "IndexSettings": "retrieval.search.settings",
    "Init": "prompts.init",
    "InstructionDataModule": "data.instruction.datamodule",
    "InstructionEvaluation": "evaluation.instruction",
    "KTO": "objectives.preference.kto",
    "LabelWords": "readouts.label_words",
    "LanguageModeling": "objectives.language_modeling",
    "LikelihoodEvaluation": "evaluation.likelihood",
    "MultipleChoiceDataModule": "data.multiple_choice",
    "MultitaskDataModule": "data.multitask",
    "ORPO": "objectives.preference.orpo",
    "Objective": "objectives.base",
    "OptionEvaluation": "evaluation.options",
    "OptionExample": "core.types",
    "Outcome": "objectives.base",
    "PPO": "objectives.policy.ppo",
    "Passage": "retrieval.passages.documents",
    "PassageNoise": "rag.passage_selection",
    "PassageSettings": "rag.passage_selection",
    "Penalty": "objectives.penalties",
    "PreferenceDataModule": "data.preference",
    "PreferenceEvaluation": "evaluation.preferences.pairs",
    "Prompt": "inference.prompt",
    "PromptDataModule": "data.prompts",
    "PromptedLM": "backbones.prompted_lm",
    "RLOO": "objectives.policy.rloo",
    "RagQaDataModule": "rag.qa_datamodule",
    "RankedChoices": "readouts.ranked",
    "RankedOptions": "readouts.ranked_options",
    "Readout": "readouts.base",
    "RelevanceDataModule": "rag.relevance_datamodule",
    "Reranker": "retrieval.reranker",
    "Retriever": "retrieval.retriever",
    "Reward": "rewards.base",
    "RewardEvaluation": "evaluation.policy.reward_evaluation",
    "RewardHead": "readouts.reward_head",
    "RewardModeling": "objectives.reward_modeling",
    "RunSpec": "runs.run_spec",
    "SampleVocabulary": "prompts.init",
    "SentencePairDataModule": "data.corpus.sentence_pairs",
    "SimPO": "objectives.preference.simpo",
    "SoftPrompt": "core.types",
    "SoftPromptDataModule": "data.datamodule",
    "SoftPromptModule": "methods.base",
    "SummarizationDataModule": "data.summarization",
    "TaggingDataModule": "data.tagging",
    "Template": "core.template",
    "TokenHead": "readouts.token_head",
    "Trainer": "training.trainer",
    "ValueHead": "readouts.value_head",
    "WordReadout": "readouts.base",
    "from_peft": "interchange.peft_import",
    "load_backbone": "backbones.loading",
    "load_prompt": "inference.prompt",
    "measure_attention": "analysis.attention_mass",
    "options_of": "core.types",
    "report_prompt_source": "checkpoints.prompt_sources",
    "save_prompt": "inference.prompt",
    "takes_keys_and_values": "backbones.requirements",
    "takes_late_tokens": "backbones.requirements",
    "to_past": "interchange.past_export",
    "to_peft": "interchange.peft_export",
    "to_vocabulary": "interchange.vocabulary_export",
}


def __getattr__(name: str) -> Any:
    """The public object of a name, imported now."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{HOMES.get(name, 'methods')}")
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


moved.install()

# If torchao is installed, transformers imports it, and torchao logs which of its kernels this device lacks.
for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)
