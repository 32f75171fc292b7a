"""Rows of new tokens with which the model computes the same states as with the tokens that they replace."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.insertion.token_rows import TokenSlots, replace_embeddings_of
from lightning_softprompt.backbones.tokenization.added_rows import AddedRow
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.types import Batch, Encoded
from lightning_softprompt.prompts.token_rows.base import TokenRowsInit
from lightning_softprompt.prompts.token_rows.means import MeanOfSubwords
from lightning_softprompt.vocabulary.corpus_texts import read_pieces
from lightning_softprompt.vocabulary.token_vectors import tokenize_pieces

log = logging.getLogger(__name__)
Snippet = tuple[int, ...]  # token ids of the extended tokenizer


@dataclass(frozen=True)
class Distilled(TokenRowsInit):
    """Input rows with which a model computes the states that it computes for the subwords (Dobler et al. 2025).

    Token distillation, arXiv 2505.20133. For snippets x of the texts, the rows minimize the mean of
    `(h_new(x) - h_old(x))^2` over the positions from the first new token on: h_new are the states with new tokens, and
    h_old the states of the same model at the end of each token's subwords. Only rows whose tokens a batch contains
    change. The paper trains one new token per snippet; here, all new tokens of a snippet are trained together. Output
    rows are those of `start`, since states do not depend on them.

    Args:
        texts: Texts with the new tokens, such as the training texts: files, folders, patterns or hub data sets.
        columns: Columns of the text in rows; the first one that a row has is read.
        snippets: Maximum snippets per new token. A snippet counts for each new token in it.
        length: Tokens of a snippet.
        batch_size: Snippets of a step.
        epochs: How often each snippet is used.
        rate: Learning rate of Adam.
        layer: The layer whose input states are compared (default: the last states).
        start: Rows before the distillation.

    Raises:
        ValueError: If there are no texts, or a number is too small.
    """

    texts: str | Sequence[str]
    columns: Sequence[str] = ("text",)
    snippets: int = 100
    length: int = 50
    batch_size: int = 16
    epochs: int = 1
    rate: float = 1e-3
    layer: int | None = None
    start: TokenRowsInit = field(default_factory=MeanOfSubwords)

    def __post_init__(self) -> None:
        if not self.texts:
            raise ValueError("Distilled requires texts that contain the new tokens")
        for name in ("snippets", "length", "batch_size", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of Distilled must be at least 1, got {getattr(self, name)}")

    def __call__(self, backbone: Backbone, tables: Sequence[Tensor], tokens: Sequence[AddedRow]) -> list[Tensor]:
        """See `TokenRowsInit`."""
        rows, *outputs = self.start(backbone, tables, tokens)
        pieces = read_pieces([self.texts] if isinstance(self.texts, str) else self.texts, self.columns)
        sequences = tokenize_pieces(pieces, backbone.codec.tokenizer)
        snippets = select_snippets(sequences, {token.id for token in tokens}, self.snippets, self.length)
        if not snippets:
            raise ValueError(f"Distilled requires texts that contain the new tokens, and {self.texts} has none of them")
        missing = {token.id for token in tokens}.difference(*snippets)
        if missing:
            log.warning(
                "Distilled: the texts do not contain %d of %d new tokens, whose rows do not change",
                len(missing), len(tokens),
            )  # fmt: skip
        with torch.inference_mode(False), torch.enable_grad():
            distilled = self._train(backbone, rows.clone(), tokens, snippets)
        return [distilled, *outputs]

    def _train(
        self, backbone: Backbone, rows: Tensor, tokens: Sequence[AddedRow], snippets: Sequence[Snippet]
    ) -> Tensor:
        """Returns the rows [N, H] after the distillation."""
        rows = rows.to(backbone.word_embeddings.device).requires_grad_()
        ids = torch.tensor([token.id for token in tokens], device=rows.device)
        slots = TokenSlots(ids, len(backbone.word_embeddings))
        optimizer = torch.optim.Adam([rows], lr=self.rate)
        handles = replace_embeddings_of(backbone.model, slots, lambda: rows, backbone.embedding_scale)
        subwords = {token.id: token.base for token in tokens}
        losses = []
        try:
            for _ in range(self.epochs):
                order = torch.randperm(len(snippets)).tolist()
                for first in range(0, len(order), self.batch_size):
                    batch = [snippets[number] for number in order[first : first + self.batch_size]]
                    loss = state_difference(backbone, batch, subwords, self.layer)
                    [rows.grad] = torch.autograd.grad(loss, [rows])
                    before = rows.detach().clone()
                    optimizer.step()
                    is_unused = (rows.grad == 0).all(1, keepdim=True)
                    rows.data.copy_(torch.where(is_unused, before, rows.data))
                    losses.append(loss.item())
        finally:
            for handle in handles:
                handle.remove()
        part = max(1, len(losses) // 10)
        log.info(
            "Distilled: %d snippets, %d steps, squared difference of states %.4f -> %.4f",
            len(snippets), len(losses), sum(losses[:part]) / part, sum(losses[-part:]) / part,
        )  # fmt: skip
        return rows.detach()


def select_snippets(sequences: Iterable[Sequence[int]], new: set[int], limit: int, length: int) -> list[Snippet]:
    """Returns parts of texts, each with a new token that fewer than `limit` earlier ones contain.

    Args:
        sequences: The token ids of each text.
        new: Ids of the new tokens.
        limit: Maximum snippets per new token.
        length: Tokens of a snippet; the last one of a text can be shorter.
    """
    counts: Counter[int] = Counter()
    snippets: list[Snippet] = []
    for ids in sequences:
        for first in range(0, len(ids), length):
            snippet = tuple(ids[first : first + length])
            tokens = new.intersection(snippet)
            if any(counts[token] < limit for token in tokens):
                counts.update(tokens)
                snippets.append(snippet)
    return snippets


def state_difference(
    backbone: Backbone, snippets: Sequence[Snippet], subwords: Mapping[int, Sequence[int]], layer: int | None = None
) -> Tensor:
    """Returns the mean squared difference of the states with new tokens and with the tokens that they replace.

    It is the mean over the positions of all snippets from the first new token on, for encoders over all positions,
    and over the H values of a state.

    Args:
        backbone: The backbone.
        snippets: Token ids of the extended tokenizer.
        subwords: The existing tokens that each new token replaces.
        layer: The layer whose input states are compared; None for the last states.
    """
    replaced = [[subwords.get(id, (id,)) for id in snippet] for snippet in snippets]
    old_snippets = [tuple(id for ids in snippet for id in ids) for snippet in replaced]
    new_batch, old_batch = (_collate(backbone.codec, rows) for rows in (snippets, old_snippets))
    with torch.no_grad():
        old = backbone.hidden_states(old_batch, layer=layer)
    new = backbone.hidden_states(new_batch, layer=layer)
    offset = len(backbone.codec.start)
    differences = []
    for number, snippet in enumerate(snippets):
        is_new = [id in subwords for id in snippet]
        first = is_new.index(True) if backbone.is_causal else 0
        ends = list(accumulate(len(ids) for ids in replaced[number]))[first:]
        new_places = _columns(new_batch, number)[offset + first :]
        old_places = _columns(old_batch, number)[[offset + end - 1 for end in ends]]
        differences.append(new[number, new_places] - old[number, old_places])
    return torch.cat(differences).float().pow(2).mean()


def _collate(codec: Codec, snippets: Sequence[Snippet]) -> Batch:
    rows = [Encoded((*codec.start, *snippet), answers=(), targets=(), slots=(0,)) for snippet in snippets]
    return codec.collate(rows)


def _columns(batch: Batch, row: int) -> Tensor:
    """Returns the columns of a row that are not padding."""
    return batch.mask[row].nonzero().flatten()
