"""CLIP and models of the same structure. The text tower is causal, and a text is read at its end token."""

from __future__ import annotations

import logging
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from lightning_softprompt.backbones.contrastive.base import ContrastiveBackbone
from lightning_softprompt.backbones.execution.packing import pack
from lightning_softprompt.backbones.execution.paths import last_tokenwise_modules, restrict_to_positions
from lightning_softprompt.backbones.execution.row_batch import RowBatch
from lightning_softprompt.backbones.insertion.key_values import check_like_text, inject, kv_by_module
from lightning_softprompt.backbones.insertion.layers import states_before
from lightning_softprompt.backbones.kernels.prepacked_linear import plain_products
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.types import Batch, SoftPrompt

log = logging.getLogger(__name__)
MODEL_TYPES = ("clip", "metaclip_2")
TOLERANCE, HALF_TOLERANCE = 1e-4, 0.1  # relative errors up to which packed and padded texts count as equal


@final
class CLIPBackbone(ContrastiveBackbone):
    """A frozen CLIP model.

    Texts run as one packed sequence: what all of them begin with, such as the start token and the soft tokens of CoOp,
    runs once. A text attends to it and to itself.
    """

    is_causal = True

    def __init__(self, model: PreTrainedModel, codec: Codec, spec: BackboneSpec) -> None:
        super().__init__(model, codec, spec)
        for attention in self.attentions["self"].modules:
            vars(attention)["is_causal"] = True  # the model passes this only as an option
        self.packs_rows: bool | None = None if spec.packed else False
        self.last_modules = last_tokenwise_modules(self.stack)

    @staticmethod
    def claims(config: PreTrainedConfig) -> bool:
        """Whether the model is CLIP or has its structure."""
        return config.model_type in MODEL_TYPES

    def check_attentions(self) -> None:
        """Refuses a model in which the keys and values of a text have another effect than the text.

        Raises:
            InjectionUnsupportedError: With the reason.
        """
        with plain_products():
            check_like_text(self.stack, self.stack, self.attentions, self.injection_tolerance)

    def _pooled_text(self, batch: Batch, prompt: SoftPrompt) -> Tensor:
        spliced = self.splice(batch, prompt)
        rows = RowBatch.of(spliced, batch, prompt)
        self.check_window(rows.longest)
        if self.packs_rows is None and len(batch) > 1:
            self.packs_rows = self._packs_exactly(rows, spliced.order, prompt)
        run = self._run_packed if self.packs_rows else self._run_padded_rows
        ends = run(rows, spliced.order, prompt)
        projection = cast(nn.Module, self.model.text_projection)
        return cast(Tensor, projection(ends))

    @torch.no_grad()
    def _packs_exactly(self, rows: RowBatch, order: Tensor, prompt: SoftPrompt) -> bool:
        """Whether packed texts give the states of padded ones, on the first batch."""
        expected = self._run_padded_rows(rows, order, prompt).float()
        error = (self._run_packed(rows, order, prompt).float() - expected).abs().max() / expected.abs().max()
        limit = TOLERANCE if self.model.dtype in (torch.float32, torch.float64) else HALF_TOLERANCE
        if not error <= limit:
            log.warning("texts run padded, which is slower: packed, their states would differ by %.1e", error)
        return bool(error <= limit)

    def _run_packed(self, rows: RowBatch, order: Tensor, prompt: SoftPrompt) -> Tensor:
        """[B, H] states at the ends of the texts, which run as one sequence."""
        packing = pack(rows.mask, self._shared_prefix(rows, prompt), rows.past)
        columns = packing.columns(_ends(rows))[0]
        origin, numbers = _origins(rows, order)
        packed_origin = packing.pack(origin[..., None])[..., 0]
        packed_rows = packing.pack(numbers[..., None])[..., 0]

        # The text tower as a whole refuses a packed sequence that has more tokens than it has positions.
        tower: Any = self.stack
        hidden = packing.pack(rows.embeds) + tower.embeddings.position_embedding(packing.positions)
        with (
            self.replace_soft_states(prompt.deep, packed_origin, packed_rows),
            restrict_to_positions(self.last_modules, columns.unique(), packing.length),
        ):
            output = tower.encoder(inputs_embeds=hidden, attention_mask=None, is_causal=True, packing=packing)
        return cast(Tensor, tower.final_layer_norm(output.last_hidden_state[0, columns]))

    @staticmethod
    def _shared_prefix(rows: RowBatch, prompt: SoftPrompt) -> int:
        """Tokens that all texts begin with; without the soft tokens if each text has its own states of them."""
        has_own_states = any(len(states) > 1 for states in prompt.deep.values())
        if has_own_states and rows.soft.any():
            return min(rows.shared_prefix, int(rows.soft.int().argmax(1).min()))
        return rows.shared_prefix

    def _run_padded_rows(self, rows: RowBatch, order: Tensor, prompt: SoftPrompt) -> Tensor:
        """[B, H] states at the ends of the texts, which are padded at the end."""
        length = rows.mask.shape[1]
        positions = torch.arange(length, device=rows.mask.device)
        causal = rows.mask.new_ones(1, 1, length, length).tril()

        def run() -> object:
            options = {"attention_mask": causal, "position_ids": rows.first_position[:, None] + positions}
            return self.entry.run(self.stack, rows.embeds, **options)

        kv = kv_by_module(self.attentions, rows.kv_prompt.kv, rows.kv_prompt.kv_mask)
        with self.replace_soft_states(prompt.deep, *_origins(rows, order)), inject(kv):
            states = states_before(self.stack, None, run)
        return states.gather(1, _ends(rows)[..., None].expand(-1, -1, states.shape[2]))[:, 0]

    @property
    def execution_description(self) -> str:
        """See `Backbone`."""
        if self.packs_rows is None:
            return "the first texts determine the execution path"
        return "packed texts; their shared beginning is computed once per step" if self.packs_rows else "padded texts"


def _ends(rows: RowBatch) -> Tensor:
    """[B, 1] position of the end token of each text."""
    return rows.mask.sum(1, keepdim=True) - 1


def _origins(rows: RowBatch, order: Tensor) -> tuple[Tensor, Tensor]:
    """[B, M] index of the soft token at each position, -1 at other tokens; and the row of each position."""
    numbers = torch.arange(len(order), device=order.device)[:, None].expand_as(order)
    return order.where(rows.soft, -1), numbers
