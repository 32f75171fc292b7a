"""Generated answers as rows of a batch, and what is measured of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.types import IGNORE, Batch


@torch.no_grad()
def generate_answers(lm: PromptedLM, questions: Batch, count: int, decoding: Decoding, prompted: bool = True) -> Batch:
    """Generates answers to each question.

    The answers are the generated tokens, up to and including the first token that stops generation. They are not
    decoded and tokenized again, which could change them.

    Args:
        lm: The language model.
        questions: The questions, of which answers are ignored.
        count: Number of answers to each question.
        decoding: How answers are generated.
        prompted: Whether the trained prompt is used.

    Returns:
        The questions with their answers: rows of a question are adjacent, and have the same number in `groups`.
    """
    codec = lm.backbone.codec
    returned = {"num_return_sequences": count} if count > 1 else {}
    ids = lm.generate(questions, prompted=prompted, **decoding.options, **returned)
    answers = [cut_at_stop(row, codec.stop) for row in ids.tolist()]
    grouped = [answers[start : start + count] for start in range(0, len(answers), count)]
    batch = codec.with_answers(questions, grouped)
    numbers = torch.arange(len(questions), device=batch.targets.device)
    batch.groups = numbers.repeat_interleave(count)
    batch.row_ids = tuple(row for row in questions.row_ids for _ in range(count))
    batch.global_row_ids = tuple(row for row in questions.global_row_ids for _ in range(count))
    if questions.examples is not None:
        batch.examples = tuple(example for example in questions.examples for _ in range(count))
    return batch


def cut_at_stop(ids: Sequence[int], stop: Sequence[int]) -> list[int]:
    """Returns the tokens up to and including the first one that stops generation.

    The token that pads answers is often the same, so that what follows is not part of the answer.

    >>> cut_at_stop([5, 2, 2], [2]), cut_at_stop([5, 6], [2])
    ([5, 2], [5, 6])
    """
    for position, token in enumerate(ids):
        if token in stop:
            return list(ids[: position + 1])
    return list(ids)


def draw_seed() -> int:
    """Returns a seed of sampling from the random state of the run, different on each process.

    A resumed run restores the state, and therefore samples the same answers.
    """
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if is_distributed else 0
    return int(torch.randint(2**31, ())) + rank


def answer_texts(lm: PromptedLM, batch: Batch) -> list[str]:
    """Returns the answers of a batch as text."""
    codec = lm.backbone.codec
    return codec.decode(batch.targets.masked_fill(batch.targets == IGNORE, codec.pad_id))


def answer_lengths(batch: Batch) -> Tensor:
    """Returns the number of tokens [B] of each answer, with the token that ends it."""
    return (batch.targets != IGNORE).sum(1)


def are_finished(lm: PromptedLM, batch: Batch) -> Tensor:
    """Returns whether each answer [B] ends with the token that stops generation."""
    last = (answer_lengths(batch) - 1).clamp(min=0)
    last_tokens = batch.targets.gather(1, last[:, None]).squeeze(1)
    return torch.isin(last_tokens, torch.tensor(lm.backbone.codec.stop, device=last_tokens.device))
