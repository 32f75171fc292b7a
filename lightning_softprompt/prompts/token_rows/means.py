"""Rows of new tokens that are means of existing rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.tokenization.added_rows import AddedRow
from lightning_softprompt.backbones.tokenization.extended_tables import mean_of_rows
from lightning_softprompt.prompts.token_rows.base import TokenRowsInit, subwords_of


@dataclass(frozen=True)
class MeanOfSubwords(TokenRowsInit):
    """The mean of the rows of the subwords, as in fast vocabulary transfer (Gee et al. 2022, arXiv 2402.09977).

    Args:
        outputs: Rows of the head: the mean, or the row of the first subword. With the first row, the new token is
            about as likely as its first subword, and takes half of the probability of all words that begin with it.
    """

    outputs: Literal["mean", "first"] = "mean"

    def __call__(self, backbone: Backbone, tables: Sequence[Tensor], tokens: Sequence[AddedRow]) -> list[Tensor]:
        """See `TokenRowsInit`."""
        subwords = subwords_of(tokens)
        output_subwords = [ids[:1] for ids in subwords] if self.outputs == "first" else subwords
        return [mean_of_rows(table, ids) for table, ids in zip(tables, (subwords, output_subwords), strict=False)]


@dataclass(frozen=True)
class MeanOfVocabulary(TokenRowsInit):
    """The mean of all rows, which bounds the change of the model's distribution (Hewitt 2021).

    Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021. With `noise`, rows are drawn from
    the normal distribution with the mean and the covariance of all rows, as transformers' `resize_token_embeddings`
    does.

    Args:
        noise: Scale of the covariance.
    """

    noise: float = 0.0

    def __call__(self, backbone: Backbone, tables: Sequence[Tensor], tokens: Sequence[AddedRow]) -> list[Tensor]:
        """See `TokenRowsInit`."""
        return [self._draw(table.float(), len(tokens)) for table in tables]

    def _draw(self, rows: Tensor, count: int) -> Tensor:
        mean = rows.mean(0)
        if not self.noise:
            return mean.repeat(count, 1)
        centered = rows - mean
        # A product with independent normal numbers has the covariance of the rows, without an [H, H] matrix.
        weights = torch.randn(count, len(rows)).to(rows) / len(rows) ** 0.5
        return mean + self.noise**0.5 * (weights @ centered)
