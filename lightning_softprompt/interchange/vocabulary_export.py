"""`to_vocabulary`: prompts as tokens of a plain folder of transformers, which any server can serve."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.location import resolve_location
from lightning_softprompt.checkpoints.backbone_identity import backbone_identity
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.inference.prompt import Prompt
from lightning_softprompt.interchange.chat_template import chat_template
from lightning_softprompt.interchange.head_rows import least_likely_word, put_rows, untied_head
from lightning_softprompt.interchange.soft_rows import SoftRows, soft_rows
from lightning_softprompt.interchange.vocabulary_card import vocabulary_card
from lightning_softprompt.interchange.vocabulary_check import TEXTS, RowCheck, check_folder, plain_logits, text_logits
from lightning_softprompt.system.atomic_files import write_folder

Head = Literal["copy", "tied"]
MAX_PROBABILITY = 1e-4  # of all soft tokens together, at any position of the texts that select their rows of the head
LINEAR = 1e-6  # relative to the largest value of the soft tokens; float32
INDEX = "softprompt.json"


@dataclass(frozen=True)
class VocabularyExport:
    """The result of an export.

    Args:
        folder: The folder.
        token_ids: The ids of the soft tokens of each prompt.
        word: The word whose row of the head the soft tokens have; None with a tied head.
        probability: The largest probability of all soft tokens together on the texts that selected the word.
        checks: The comparison of the written folder with each prompt.
    """

    folder: Path
    token_ids: Mapping[str, range]
    word: str | None
    probability: float
    checks: Mapping[str, RowCheck]


def to_vocabulary(
    prompts: Mapping[str, Prompt],
    folder: str | Path,
    head: Head = "copy",
    max_probability: float = MAX_PROBABILITY,
    tasks: Mapping[str, str] | None = None,
) -> VocabularyExport:
    """Writes prompts as new tokens of their backbone, in a folder that transformers loads without this package.

    Soft tokens become rows of the embedding matrix and tokens of the tokenizer, so that a prompt is text. Its chat
    template writes the row of a prompt that a request names. The output head gets rows that are never the most likely
    ones: copies of the row of the least likely word. A head that shares its weights with the embedding is separated
    from it. The folder is loaded with transformers and compared with the prompts before it gets its name.

    Args:
        prompts: The prompts by name. They must have the same backbone, which is a decoder.
        folder: The folder to write, which must not exist.
        head: `copy`, or `tied` to leave a tied head as it is. The file is then smaller, but only servers that obey
            `suppress_tokens` in `generation_config.json`, such as transformers, never generate soft tokens.
        max_probability: Limit of the probability of all soft tokens together.
        tasks: The task of prompts that were trained on several.

    Raises:
        ValueError: If a prompt is not made of soft tokens only, names collide, the backbone cannot be extended, or the
            written folder computes or generates something else.
    """
    path = Path(folder).expanduser()
    if path.exists():
        raise ValueError(f"{path} exists; remove it, or choose another folder")
    of_tasks = tasks or {}
    rows = [soft_rows(name, prompt, of_tasks.get(name)) for name, prompt in prompts.items()]
    backbone = _common_backbone(rows)
    location = resolve_location(backbone.spec)
    tokenizer = AutoTokenizer.from_pretrained(location.name, revision=location.revision)
    model = _load_model(location)
    expected_plain = plain_logits(model, backbone)
    ids = _add_tokens(tokenizer, rows, len(backbone.word_embeddings))
    first, count = next(iter(ids.values())).start, sum(map(len, ids.values()))
    word: str | None = None
    probability = 0.0
    if head == "copy":
        least = least_likely_word(_calibration_logits(rows, backbone), first)
        word, probability = str(tokenizer.convert_ids_to_tokens(least.id)), least.probability * count
        if model.get_output_embeddings().bias is not None:
            probability = 0.0
        if probability > max_probability:
            raise ValueError(
                f"the {count} soft tokens together have a probability of up to {probability:.1e}, above the limit of "
                f"{max_probability:.1e}; raise the limit, or use the tied head, which requires suppress_tokens"
            )
        model.set_output_embeddings(untied_head(model.get_output_embeddings(), first, count, least.id))
    elif not model.config.get_text_config().tie_word_embeddings:
        raise ValueError("the head of the backbone is not tied to the embedding; use the head 'copy'")
    _extend_embedding(model, first, torch.cat([of_prompt.embeddings for of_prompt in rows]), head)
    model.generation_config.suppress_tokens = list(range(first, first + count))
    tokenizer.chat_template = chat_template(rows, backbone.codec)
    checks: dict[str, RowCheck] = {}

    def write(draft: Path) -> None:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        checks.update(check_folder(draft, rows, ids, backbone, expected_plain))
        index = _index(rows, ids, backbone, word, probability, checks)
        (draft / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        (draft / "README.md").write_text(vocabulary_card(rows, ids, backbone, head))

    write_folder(path, write)
    return VocabularyExport(path, ids, word, probability, checks)


def _common_backbone(rows: Sequence[SoftRows]) -> Backbone:
    """Returns the backbone of all prompts."""
    if not rows:
        raise ValueError("no prompts are given")
    first = rows[0].prompt.backbone
    for other in rows[1:]:
        if other.prompt.backbone.fingerprint() != first.fingerprint():
            raise ValueError(f"{other.name} and {rows[0].name} have different backbones; export them separately")
    if first.spec.quantization is not None:
        raise ValueError("a quantized backbone has no plain folder; load the prompts on the full-precision backbone")
    if first.spec.vocabulary is not None:
        raise ValueError("the backbone has additional tokens; write it with softprompt merge first")
    return first


def _load_model(location: BackboneSpec) -> Any:
    """Loads the backbone as transformers does, without the kernels of this package."""
    return AutoModelForCausalLM.from_pretrained(
        location.name, revision=location.revision, dtype=getattr(torch, location.dtype), use_safetensors=True
    ).eval()


def _add_tokens(tokenizer: PreTrainedTokenizerBase, rows: Sequence[SoftRows], matrix_rows: int) -> dict[str, range]:
    """Adds the soft tokens to the tokenizer, and returns the ids of each prompt."""
    known = tokenizer.get_vocab()
    first = len(tokenizer)
    if first > matrix_rows:
        raise ValueError(f"the tokenizer has {first} tokens, but the embedding only {matrix_rows} rows")
    ids: dict[str, range] = {}
    for of_prompt in rows:
        taken = [token for token in of_prompt.tokens if token in known]
        if taken:
            raise ValueError(f"the tokenizer already has a token {taken[0]!r}; choose another name for the prompt")
        start = len(tokenizer)
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in of_prompt.tokens], True)
        ids[of_prompt.name] = range(start, start + len(of_prompt.tokens))
        if tokenizer.convert_tokens_to_ids(of_prompt.tokens) != list(ids[of_prompt.name]):
            raise ValueError("the tokenizer does not number new tokens after its last one")
    return ids


def _calibration_logits(rows: Sequence[SoftRows], backbone: Backbone) -> Any:
    """Yields the logits at all positions of texts with and without each prompt."""
    for of_prompt in rows:
        for text in TEXTS:
            yield text_logits(backbone, of_prompt, text)
    for text in TEXTS:
        yield text_logits(backbone, None, text)


def _extend_embedding(model: PreTrainedModel, first: int, embeddings: Tensor, head: Head) -> None:
    """Writes soft tokens into the embedding, such that it returns them for their ids.

    Raises:
        ValueError: If the embedding is not a multiple of its rows.
    """
    module = cast(nn.Embedding, model.get_input_embeddings())
    weight = module.weight.detach()
    sample = torch.arange(min(first, 64))
    with torch.no_grad():
        scale = float(module(sample).float().norm() / weight[sample].float().norm())
        module.weight = put_rows(weight, first, embeddings / scale)
        module.num_embeddings = len(module.weight)
        ids = torch.arange(first, first + len(embeddings))
        error = (module(ids).float() - embeddings).abs().max() / embeddings.abs().max()
    if module.weight.dtype == torch.float32 and not error <= LINEAR:
        raise ValueError(f"the embedding is not a multiple of its rows: soft tokens differ by {error:.1e}")
    config = model.config.get_text_config()
    config.vocab_size = len(module.weight)
    config.tie_word_embeddings = model.config.tie_word_embeddings = head == "tied"
    if head == "tied":
        output = model.get_output_embeddings()
        output.weight, output.out_features = module.weight, len(module.weight)


def _index(
    rows: Sequence[SoftRows],
    ids: Mapping[str, range],
    backbone: Backbone,
    word: str | None,
    probability: float,
    checks: Mapping[str, RowCheck],
) -> dict[str, Any]:
    """Returns what programs need to use the folder."""
    prompts = {}
    for of_prompt in rows:
        classes = of_prompt.prompt.view(None).classes if not of_prompt.prompt.tasks else None
        prompts[of_prompt.name] = {
            "ids": list(ids[of_prompt.name]),
            "template": of_prompt.row_format.template,
            "message_column": of_prompt.message_column,
            "fields": [name for name in of_prompt.row_format.parsed.columns if name != of_prompt.message_column],
            "classes": None if classes is None else {name: list(words) for name, words in classes.words.items()},
            "check": vars(checks[of_prompt.name]),
        }
    return {
        "backbone": backbone_identity(backbone),
        "head": {"copied_word": word, "max_probability": probability},
        "prompts": prompts,
    }
