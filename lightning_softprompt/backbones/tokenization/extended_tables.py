"""Extends the embedding table and the head of a model by the tokens of an extended tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lightning_softprompt.backbones.fingerprint import tokenizer_digest
from lightning_softprompt.backbones.tokenization.added_rows import AddedRow, Vocabulary


@torch.no_grad()
def extend_tables(model: PreTrainedModel, rows: Sequence[AddedRow]) -> None:
    """Adds rows for new tokens, which are the means of the rows of the tokens that they replace.

    Tables with unused rows at their end, as those that are padded to a multiple of 64, keep their size if these rows
    are enough.

    Args:
        model: The model; it is changed.
        rows: The new tokens, with consecutive ids after those of the tokenizer.
    """
    size = rows[-1].id + 1
    table = cast(Tensor, model.get_input_embeddings().weight)
    if len(table) < size:
        transformers_logging.disable_progress_bar()
        model.resize_token_embeddings(size, mean_resizing=False)
    head = model.get_output_embeddings()
    tables = [cast(Tensor, model.get_input_embeddings().weight)]
    if head is not None:
        bias = getattr(head, "bias", None)
        tables += [head.weight] if bias is None else [head.weight, bias]
    means = [mean_of_rows(table, [row.base for row in rows]) for table in tables]
    for table, mean in zip(tables, means, strict=True):  # a tied head gets the same rows twice
        table.data[rows[0].id : size] = mean.to(table.dtype)


def mean_of_rows(table: Tensor, ids: Sequence[Sequence[int]]) -> Tensor:
    """Returns the mean of some rows of a table for each sequence of ids, in float32: [N, ...] of a table [V, ...]."""
    means = [table[list(row_ids)].float().mean(0) for row_ids in ids]
    return torch.stack(means)


def check_base(tokenizer: AutoTokenizer, vocabulary: Vocabulary, name: str) -> None:
    """Refuses an extended tokenizer whose base is not the tokenizer of the backbone.

    Raises:
        ValueError: Naming both.
    """
    if tokenizer_digest(tokenizer) != vocabulary.digest:
        raise ValueError(
            f"backbone.vocabulary extends the tokenizer of {vocabulary.base!r}, and {name!r} has another tokenizer; "
            f"extend it with softprompt vocabulary extend --base {name}"
        )
