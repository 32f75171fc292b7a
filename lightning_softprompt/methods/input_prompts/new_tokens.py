"""Training of the rows of new tokens in the embedding table and the head."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.insertion.token_rows import TokenSlots, replace_embeddings_of
from lightning_softprompt.backbones.tokenization.added_rows import AddedRow, read_vocabulary
from lightning_softprompt.checkpoints.initial_values import are_initial_values_needed
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.prompts.token_rows.base import TokenRowsInit
from lightning_softprompt.prompts.token_rows.means import MeanOfSubwords


class NewTokens(SoftPromptModule):
    """Trains the rows of some tokens in the embedding table and the head; all other weights are frozen.

    The tokens are those that `backbone.vocabulary` adds, or existing ones. The tables of the backbone do not change:
    the rows replace the output of the embedding module and the logits of the head for these tokens. Use `Combined` to
    train a soft prompt with them. `prompted=False` uses the backbone with its new rows.

    With `update` set to `occurring`, a step changes the rows of the tokens that its rows or targets contain. The other
    output rows also have a gradient, since each of them should be less likely, and an adaptive optimizer would move
    them by full steps.

    Paper: none; PEFT's TrainableTokens with `update: all`
    Enters: rows of the embedding table and of the head
    Parameters: 2 N H; N H if tied

    Args:
        tokens: Existing tokens to train, as texts of one token or ids (default: the tokens of `backbone.vocabulary`).
        init: Initial rows of new tokens; existing tokens keep their rows.
        tied: Whether input and output rows are the same parameters. Separate rows fit better, also if the backbone
            ties its tables.
        update: Which rows a step changes.
        common: Arguments of every method.

    Raises:
        ValueError: If a text is not one token, or there are no tokens.
    """

    default_rate = 3e-3
    changes_backbone = True
    ids: Tensor

    def __init__(
        self,
        tokens: Sequence[str | int] | None = None,
        init: TokenRowsInit | None = None,
        tied: bool = False,
        update: Literal["occurring", "all"] = "occurring",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if update not in ("occurring", "all"):
            raise ValueError(f"update must be 'occurring' or 'all', got {update!r}")
        if tokens is not None and not tokens:
            raise ValueError("tokens must name at least one token; omit it to train those of backbone.vocabulary")
        self.tokens, self.init, self.tied, self.update = tokens, init or MeanOfSubwords(), tied, update
        self.occurring: Tensor | None = None  # [N] tokens of the current batch
        self._before: dict[str, Tensor] = {}  # rows before the optimizer step

    @property
    def changes_layers(self) -> bool:
        """False: embedding table and head are not among the layers."""
        return False

    def build(self, backbone: Backbone) -> None:
        """Creates the rows [N, H] in float32 and replaces those of the backbone's tables."""
        backbone.allow_changes()
        ids, new = self._find_tokens(backbone)
        table = backbone.word_embeddings
        self.register_buffer("ids", torch.tensor(ids, device=table.device), persistent=False)
        has_head = not backbone.head.headless
        tables = [table, backbone.head.layer.weight] if has_head and not self.tied else [table]
        rows = [nn.Parameter(initial) for initial in self._initial_rows(backbone, tables, new)]
        self.inputs = rows[0]
        self.outputs: nn.Parameter | None = rows[1] if len(rows) == 2 else None
        slots = TokenSlots(self.ids, len(table))
        scale = backbone.embedding_scale
        replace_embeddings_of(backbone.model, slots, lambda: self._current(self.inputs), scale)
        if has_head:
            backbone.head.replace_rows(slots, lambda: self._current(self._output_rows))

    @property
    def _output_rows(self) -> nn.Parameter:
        return self.inputs if self.outputs is None else self.outputs

    def _find_tokens(self, backbone: Backbone) -> tuple[list[int], list[AddedRow]]:
        """Returns the ids of the tokens, and those that `backbone.vocabulary` adds."""
        vocabulary = backbone.spec.vocabulary
        added = {} if vocabulary is None else {row.id: row for row in read_vocabulary(vocabulary).rows}
        if self.tokens is None:
            if not added:
                raise ValueError(
                    "NewTokens requires tokens: set backbone.vocabulary to a folder that softprompt vocabulary extend "
                    "wrote, or model.tokens to existing tokens"
                )
            ids = list(added)
        else:
            ids = [find_token(backbone, token) for token in self.tokens]
            if len(set(ids)) < len(ids):
                raise ValueError(f"tokens names a token twice: {list(self.tokens)}")
        return ids, [added[id] for id in ids if id in added]

    def _initial_rows(self, backbone: Backbone, tables: Sequence[Tensor], new: Sequence[AddedRow]) -> list[Tensor]:
        """Returns the rows of existing tokens, and initial rows of new ones, for each table."""
        rows = [table.detach()[self.ids].float() for table in tables]
        if not new or not are_initial_values_needed():
            return rows
        is_new = torch.isin(self.ids, torch.tensor([token.id for token in new], device=self.ids.device))
        num_existing = read_vocabulary(str(backbone.spec.vocabulary)).rows[0].id
        existing = [table.detach()[:num_existing] for table in tables]
        for current, initial in zip(rows, self.init(backbone, existing, new), strict=True):
            current[is_new] = initial.to(current)
        return rows

    def _current(self, rows: nn.Parameter) -> Tensor:
        """Returns rows for the current batch: those that a training step does not update have no gradient."""
        if self.occurring is None:
            return rows
        return torch.where(self.occurring[:, None], rows, rows.detach())

    @torch.no_grad()
    def merge(self) -> None:
        """Writes the rows into the tables. For separate rows, a head that shares the embedding table gets a copy."""
        table, head = self.loaded.word_embeddings, self.loaded.head.layer
        table.data[self.ids] = self.inputs.to(table.dtype)
        if self.loaded.head.headless:
            return
        if self.outputs is not None and head.weight is table:
            untie(self.loaded.model)
        head.weight.data[self.ids] = self._output_rows.to(head.weight.dtype)

    def prompt(self, batch: Batch) -> SoftPrompt:
        """Returns an empty prompt. In training, it also determines the tokens that the batch contains."""
        is_step = self.training and torch.is_grad_enabled() and self.update == "occurring"
        self.occurring = None
        if is_step:
            self.occurring = torch.isin(self.ids, batch.input_ids) | torch.isin(self.ids, batch.targets)
            self._before = {name: rows.detach().clone() for name, rows in self.named_parameters(recurse=False)}
        return SoftPrompt()

    def project(self) -> None:
        """Restores rows without a gradient, which the momentum of the optimizer moves, too."""
        for name, before in self._before.items():
            rows = self.get_parameter(name)
            if rows.grad is not None:
                is_unused = (rows.grad == 0).all(1, keepdim=True)
                rows.data.copy_(torch.where(is_unused, before, rows.data))


def untie(model: Any) -> None:
    """Copies modules and weights that several modules share, since transformers shares either all or none."""
    seen: set[int] = set()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in seen:
                setattr(parent, name, deepcopy(child))
            seen.add(id(child))
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if id(weight) in seen:
                module.register_parameter(name, nn.Parameter(weight.detach().clone(), requires_grad=False))
            seen.add(id(weight))
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def find_token(backbone: Backbone, token: str | int) -> int:
    """Returns the id of a token of a backbone.

    Raises:
        ValueError: If a text is not one token, or there is no such id.
    """
    size = len(backbone.word_embeddings)
    if isinstance(token, int):
        if not 0 <= token < size:
            raise ValueError(f"the vocabulary of {backbone.spec.name} has {size:,} tokens, and no id {token}")
        return token
    ids = backbone.codec.template_ids(token)
    if len(ids) != 1:
        names = backbone.codec.tokenizer.convert_ids_to_tokens(ids)
        raise ValueError(f"{token!r} is not one token of {backbone.spec.name}, but {names}")
    return ids[0]
