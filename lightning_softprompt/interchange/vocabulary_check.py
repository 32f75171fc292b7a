"""Compares a folder with soft tokens in its vocabulary with the prompts that it holds, with transformers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.core.types import Encoded, SoftPrompt
from lightning_softprompt.interchange.soft_rows import SoftRows

TEXTS = (
    "The model reads this text, which has 2 sentences. It predicts the next tokens: one, two and three.",
    "a warm and funny film that never loses its way",
    "I ordered the blue kettle on Monday, and it arrived broken. Can I return it?",
    "In 1969, two people walked on the moon for the first time; 600 million watched them on television.",
    "def area(radius):\n    return 3.14159 * radius ** 2\n",
    "What is the capital of Portugal, and how many people live there?",
    "too long, too loud, and not half as clever as it thinks",
    "Patients who took the drug twice a day had fewer headaches (12 % against 31 %).",
)
ODD_TEXTS = (
    "",
    " leading",
    "trailing ",
    "two  spaces",
    "a line\nand another\n",
    "caf\u00e9 \U0001f642",
    "{braces}",
    "'\"\\",
)
ANSWER = "good"  # of the rows whose logits are computed
NEW_TOKENS = 16  # tokens of the answers that are compared
LOGITS, WORDS = 1e-5, 1e-6  # relative to the largest logit; float32


@dataclass(frozen=True)
class RowCheck:
    """How a folder agrees with a prompt.

    Args:
        logits: Largest difference of the logits of old tokens on rows of the prompt, relative to the largest logit.
        equal_answers: How many greedy answers have the same tokens.
        answers: How many answers were compared.
        without_prompt: Largest difference of logits on texts without soft tokens, relative to the largest logit.
    """

    logits: float
    equal_answers: int
    answers: int
    without_prompt: float


@torch.no_grad()
def text_logits(backbone: Backbone, rows: SoftRows | None, text: str) -> Tensor:
    """Returns the logits [T, V] that predict a text alone, or the part of a row after its soft tokens.

    Args:
        backbone: The backbone.
        rows: The prompt whose template is used; None for the text alone.
        text: The text of the main column.
    """
    codec = backbone.codec
    if rows is None:
        row = Encoded((*codec.start, *codec.ids(text)), (), (), (0,))
    else:
        row = rows.encode(codec, rows.fields(text), ANSWER)
    first = max(1, row.slots[-1])  # after the last slot, so that their states are next to each other
    predicted = row._replace(answers=tuple(range(first, len(row.ids))), targets=row.ids[first:])
    batch = codec.collate([predicted]).to(backbone.word_embeddings.device)
    return backbone(batch, SoftPrompt() if rows is None else rows.soft)[0]


@torch.no_grad()
def plain_logits(model: PreTrainedModel, backbone: Backbone) -> list[Tensor]:
    """Returns the logits [T, V] of transformers on texts without soft tokens."""
    rows = [[*backbone.codec.start, *backbone.codec.ids(text)] for text in TEXTS]
    return [model(input_ids=torch.tensor([ids])).logits[0] for ids in rows]


@torch.no_grad()
def check_folder(
    folder: Path,
    rows: Sequence[SoftRows],
    ids: Mapping[str, range],
    backbone: Backbone,
    expected_plain: Sequence[Tensor],
) -> dict[str, RowCheck]:
    """Loads a folder with transformers, and compares its logits and answers with those of its prompts.

    Args:
        folder: The folder.
        rows: The prompts.
        ids: The ids of their tokens.
        backbone: Their backbone.
        expected_plain: `plain_logits` of the model without the soft tokens.

    Raises:
        ValueError: If the tokens of a row, the logits or the answers differ, or a soft token is generated.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=backbone.model.dtype).eval()
    num_words = min(of_prompt.start for of_prompt in ids.values())
    pairs = zip(plain_logits(model, backbone), expected_plain, strict=True)
    without_prompt = max(_relative(logits, expected, num_words) for logits, expected in pairs)
    if backbone.model.dtype == torch.float32 and not without_prompt <= WORDS:
        raise ValueError(f"texts without soft tokens have other logits, by {without_prompt:.1e} of the largest one")
    checks = {}
    for of_prompt in rows:
        _check_tokens(tokenizer, of_prompt, ids[of_prompt.name], backbone)
        logits = max(_difference(model, of_prompt, ids[of_prompt.name], backbone, text) for text in TEXTS[:2])
        if backbone.model.dtype == torch.float32 and not logits <= LOGITS:
            raise ValueError(f"{of_prompt.name}: the logits differ by {logits:.1e} of the largest one")
        equal = _equal_answers(model, tokenizer, of_prompt, backbone, [*ids.values()])
        if backbone.model.dtype == torch.float32 and equal < len(TEXTS):
            raise ValueError(f"{of_prompt.name}: {len(TEXTS) - equal} of {len(TEXTS)} greedy answers differ")
        checks[of_prompt.name] = RowCheck(logits, equal, len(TEXTS), without_prompt)
    return checks


def _check_tokens(tokenizer: Any, rows: SoftRows, ids: Sequence[int], backbone: Backbone) -> None:
    """Compares the tokens of rows with those of the package.

    Raises:
        ValueError: Naming the first text that has other tokens.
    """
    codec = backbone.codec
    for text in (*TEXTS, *ODD_TEXTS):
        fields = rows.fields(text)
        expected = rows.splice(rows.encode(codec, fields), ids)
        tokens = tokenizer(rows.text(codec, fields), add_special_tokens=False)["input_ids"]
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], prompt=rows.name, fields=fields, return_dict=True
        )["input_ids"]
        for name, got in (("the tokenizer", tokens), ("the chat template", chat)):
            if list(got) != expected:
                raise ValueError(f"{rows.name}: {name} gives other tokens than the codec for the text {text!r}")


def _difference(model: PreTrainedModel, rows: SoftRows, ids: Sequence[int], backbone: Backbone, text: str) -> float:
    """Returns the largest difference of the logits on a row, relative to the largest logit."""
    expected = text_logits(backbone, rows, text)
    row = rows.encode(backbone.codec, rows.fields(text), ANSWER)
    tokens = rows.splice(row, ids)
    logits = model(input_ids=torch.tensor([tokens])).logits[0]
    num_old = expected.shape[-1]
    last = logits[len(logits) - len(expected) - 1 : -1, :num_old]  # the last position predicts no token of the row
    return _relative(last, expected.cpu(), min(ids))


def _relative(logits: Tensor, expected: Tensor, num_words: int) -> float:
    difference = (logits[:, :num_words].float() - expected[:, :num_words].float()).abs().max()
    return float(difference / expected.abs().max())


def _equal_answers(
    model: Any,
    tokenizer: Any,
    rows: SoftRows,
    backbone: Backbone,
    ids: Sequence[range],
) -> int:
    """Returns how many greedy answers of one left-padded batch have the tokens of the package.

    Raises:
        ValueError: If a soft token is generated.
    """
    codec = backbone.codec
    fields = [rows.fields(text) for text in TEXTS]
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    expected = []
    for of_row in fields:
        batch = codec.collate([rows.encode(codec, of_row)]).to(backbone.word_embeddings.device)
        expected.append(_until_end(backbone.generate(batch, rows.soft, **options)[0].tolist(), codec.stop))
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = [rows.text(codec, of_row) for of_row in fields]
    inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    generated = model.generate(**inputs, **options, pad_token_id=codec.pad_id)[:, inputs["input_ids"].shape[1] :]
    answers = [_until_end(answer, codec.stop) for answer in generated.tolist()]
    soft_ids = {token for of_prompt in ids for token in of_prompt}
    if soft_ids & {token for answer in answers for token in answer}:
        raise ValueError(f"{rows.name}: a soft token was generated")
    return sum(answer == other for answer, other in zip(answers, expected, strict=True))


def _until_end(tokens: list[int], stop: Sequence[int]) -> list[int]:
    """Returns the tokens of an answer before the token that ends it."""
    ends = [tokens.index(token) for token in stop if token in tokens]
    return tokens[: min(ends)] if ends else [token for token in tokens if token >= 0]
