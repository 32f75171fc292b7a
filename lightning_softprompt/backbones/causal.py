"""Decoder-only language models: Llama, GPT-2, Qwen, SmolLM and their like."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, cast, final

import torch
from platformdirs import user_cache_path
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lightning_softprompt.backbones.base import Backbone, answer_positions
from lightning_softprompt.backbones.execution.context_cache import ContextCache, Prefilled
from lightning_softprompt.backbones.execution.lm_head import States
from lightning_softprompt.backbones.execution.packed_attention import PackingUnsupportedError, register
from lightning_softprompt.backbones.execution.path_trial import Extent, select_path
from lightning_softprompt.backbones.execution.paths import Alone, Path, PathFactory, candidate_paths
from lightning_softprompt.backbones.execution.row_batch import RowBatch
from lightning_softprompt.backbones.generation.generate import uses_speculation
from lightning_softprompt.backbones.generation.path_choice import Generator
from lightning_softprompt.backbones.insertion.embeddings import Entry
from lightning_softprompt.backbones.insertion.key_values import check_like_text, watch
from lightning_softprompt.backbones.insertion.layers import starting_at
from lightning_softprompt.backbones.insertion.splice import Spliced
from lightning_softprompt.backbones.kernels.prepacked_linear import plain_products
from lightning_softprompt.backbones.tokenization.codec import Codec, Run, StartToken
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.types import IGNORE, Batch, Encoded, Piece, Slot, SoftPrompt

log = logging.getLogger(__name__)
register()


@final
class CausalCodec(Codec):
    """The answer follows the source. Text after the answer cannot be seen when it is predicted, and is left out.

    Args:
        tokenizer: The backbone's own.
        padding_side: Where shorter rows of a batch are padded.
        start_token: What opens rows, as `BackboneSpec` has it. Whatever it is, a row whose template begins with the
            same tokens, such as a chat form, does not get them twice, and a row without text before its answer begins
            with one token, so that every target has a state before it.

    Raises:
        ValueError: If the tokenizer is not a fast one.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, padding_side: str = "right", start_token: StartToken = "auto"
    ) -> None:
        super().__init__(tokenizer, padding_side)
        self.start_token = start_token

    def with_start(self, start_token: StartToken) -> Codec:
        """The codec with another choice of the token that opens rows."""
        return type(self)(self.tokenizer, self.padding_side, start_token)

    @cached_property
    def start(self) -> tuple[int, ...]:  # type: ignore[override]
        """Special tokens that open every row."""
        own, bos = super().start, self.tokenizer.bos_token_id
        if self.start_token == "auto":
            return own or (() if bos is None else (bos,))
        return {"bos": (self._first,), "tokenizer": own, "none": ()}[self.start_token]

    @property
    def _first(self) -> int:
        """BOS, else EOS, else padding."""
        named = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.pad_id)
        return next(id for id in named if id is not None)

    def opening(self, before: Sequence[Run]) -> tuple[int, ...]:
        """As elsewhere; a row without any text begins with BOS or EOS."""
        return super().opening(before) if any(before) else self.start or (self._first,)

    @property
    def remark(self) -> str | None:
        """What opens rows, if the tokenizer by itself would do otherwise."""
        if self.start == super().start:
            return None
        names = self.tokenizer.convert_ids_to_tokens(list(self.start))
        return (
            f"rows begin with {''.join(names)!r}, which the tokenizer itself does not add, unless the template does; "
            f"backbone.start_token=tokenizer leaves it out"
        )

    @property
    def end(self) -> tuple[int, ...]:
        """Nothing: the answer comes last."""
        return ()

    def heard_after(self, pieces: Sequence[Piece]) -> Sequence[Piece]:
        """Nothing: a causal model has said its answer by then.

        Raises:
            ValueError: If a soft block stands there, since it could never learn.
        """
        if any(isinstance(piece, Slot) for piece in pieces):
            raise ValueError("a causal backbone never hears {soft} behind {target}; put it before")
        return ()

    def check_words(self, row: Encoded) -> None:
        """As elsewhere; soft blocks behind all words could never learn either."""
        super().check_words(row)
        if min(row.slots) > max(row.words):
            raise ValueError("words of a causal backbone never hear {soft} behind them; put it before")

    def assemble(self, before: Sequence[int], after: Sequence[int], answer: Sequence[int]) -> tuple[list[int], range]:
        """What stands before the answer, then the answer."""
        return [*before, *answer], range(len(before), len(before) + len(answer))


@final
class CausalBackbone(Backbone):
    """A frozen decoder-only model. The way in which it runs is tried out on the first batch; see `paths`."""

    codec_class = CausalCodec
    is_causal = True

    def __init__(self, model: PreTrainedModel, codec: Codec, spec: BackboneSpec) -> None:
        super().__init__(model, codec, spec)
        kept = context_cache(self)
        self.contexts = kept
        self.tried = Extent()
        self.path_factories = self._allowed_paths()
        self.prompts = Prefilled(model, kept)
        self.generator = Generator(self)
        self.path: Path | None = None
        self.told_of_reach = False
        self.reasons: list[str] = [] if spec.packed else ["packed rows are switched off"]

    @staticmethod
    def claims(config: PreTrainedConfig) -> bool:
        """Whatever no other family claims."""
        return True

    def states(self, batch: Batch, prompt: SoftPrompt | None = None) -> States:
        """What the targets are said from."""
        prompt = self.hidden_to_kv(prompt)
        spliced = self.splice(batch, prompt)
        columns, first = target_columns(spliced, batch)
        rows = RowBatch.of(spliced, batch, prompt).until(columns)
        self.check_window(rows.longest)
        self._warn_of_tokens_out_of_reach(rows)
        try:
            return self._path_for(rows, columns, first)(rows, columns, first)
        except PackingUnsupportedError as reason:  # as where a later batch is longer than a sliding window
            self.path_factories, self.path = self.path_factories[1:], None
            self.reasons.append(str(reason))
            return self.states(batch, prompt)

    def stack_inputs(self, rows: Spliced, prompt: SoftPrompt | None) -> dict[str, Any]:
        """Rows with their positions, behind those of keys and values from outside."""
        inputs = {**super().stack_inputs(rows, prompt), "use_cache": False}
        if prompt is None or not prompt.kv:  # the model counts by itself
            return inputs
        key, inside = next(iter(prompt.kv["self"].values()))[0], prompt.kv_mask.get("self")
        before = key.shape[2] if inside is None else inside.sum(1, keepdim=True)
        positions = before + torch.arange(rows.mask.shape[1], device=rows.mask.device)[None]
        return {**inputs, "position_ids": positions}

    @property
    def stack(self) -> PreTrainedModel:
        """The decoder without its head; the text part of a model that reads more than text."""
        found = self.model.get_decoder()
        if found is not self.model and isinstance(found, PreTrainedModel):  # some call their head a decoder
            return found
        if self.model.base_model is not self.model:
            return cast(PreTrainedModel, self.model.base_model)
        inner = (child for child in self.model.children() if isinstance(child, PreTrainedModel))
        return next(inner, self.model)

    def check_attentions(self) -> None:
        """As elsewhere; keys and values of a text must act like the text."""
        with plain_products():
            check_like_text(self.model, self.stack, self.attentions, self.injection_tolerance)

    def check_late_tokens(self) -> None:
        """As elsewhere; they reach rows as keys and values."""
        self.check_attentions()
        tokens = self.word_embeddings.new_zeros(1, 2, self.hidden_size)
        with torch.no_grad():
            self.hidden_to_kv(SoftPrompt(hidden={self.depth // 2: tokens}))

    def hidden_to_kv(self, prompt: SoftPrompt | None) -> SoftPrompt | None:
        """Soft tokens that enter at a layer stand before the row and hear only each other: they are keys and values."""
        if prompt is None or not prompt.hidden:
            return prompt
        ((layer, tokens),) = prompt.hidden.items()
        tokens, sites = tokens.to(self.word_embeddings.dtype), self.attentions["self"]
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        with starting_at(self.stack, layer, tokens):
            seen = watch(self.stack, inputs_embeds=tokens, position_ids=positions)
        numbers = {module: number for number, module in enumerate(sites.modules)}
        return replace(prompt, hidden={}, kv={"self": {numbers[s.module]: (s.key, s.value) for s in seen}})

    def adopt_path_of(self, small_copy: Any) -> None:
        """As elsewhere. With a sliding window rows run padded: packed ones could turn out too long at any step."""
        super().adopt_path_of(small_copy)
        if getattr(self.model.config, "sliding_window", None):
            self.reasons, self.path_factories = ["layers have a sliding window"], self.path_factories[-2:-1]
        else:
            self.reasons, self.path_factories = (
                small_copy.reasons,
                self.path_factories[-len(small_copy.path_factories) :][:1],
            )
        self.path = self.path_factories[0](self.model, self.head)
        self.path.enter()

    def _warn_of_tokens_out_of_reach(self, rows: RowBatch) -> None:
        """Says once where the end of a row does not hear soft tokens at its beginning."""
        reach = getattr(self.model.config, "sliding_window", None)
        if self.told_of_reach or reach is None or not rows.soft.any():
            return
        away = rows.mask.sum(1) - rows.soft.int().argmax(1)  # [B] from the first soft token to the end
        if int(away.max()) > reach:
            self.told_of_reach = True
            log.warning(
                "a row's end is %d tokens from its first soft token, but layers of %s with a sliding window hear %d; "
                "put {soft} nearer to {target}, or take keys and values (PrefixTuning), which are always heard",
                int(away.max()), self.spec.name, reach,
            )  # fmt: skip

    def run_padded(self, batch: Batch, prompt: SoftPrompt | None) -> States:
        """As `states`, row by row."""
        spliced = self.splice(batch, prompt)
        columns, first = target_columns(spliced, batch)
        alone = Alone(self.model, self.head, self.attention, self.entry)
        return alone(RowBatch.of(spliced, batch, prompt).until(columns), columns, first)

    def use_entry(self, entry: Entry) -> None:
        """As elsewhere; paths are tried out with it."""
        super().use_entry(entry)
        self.path_factories = self._allowed_paths()

    def _allowed_paths(self) -> list[PathFactory]:
        """The paths that the specification allows, the fastest first."""
        return candidate_paths(self.spec, self.attention, self.contexts, self.entry)

    def _path_for(self, rows: RowBatch, columns: Tensor, first: Tensor) -> Path:
        """The path of a batch, tried out again where the batch goes beyond what was tried."""
        extent = Extent.of(rows)
        if self.path is not None and (len(self.path_factories) == 1 or self.tried.covers(extent)):
            return self.path
        number, reasons = select_path(self.model, self.path_factories, rows, columns, first)
        self.tried = self.tried.join(extent)
        self.reasons += reasons
        if self.path is None or number:
            self.path_factories = self.path_factories[number:]
            self.path = self.path_factories[0](self.model, self.head)
            log.info(self.execution_description)
        self.path.enter()
        return self.path

    @property
    def execution_description(self) -> str:
        """How rows run, and why not faster; a first batch decides it."""
        if self.path is None:
            return "how rows run is decided by the first batch"
        return self.path.description + "".join(f" ({reason})" for reason in self.reasons[:1])

    @property
    def generation_description(self) -> str:
        """How rows are generated, and why not faster; a first batch decides it."""
        return self.generator.execution_description

    def without_answers(self, batch: Batch) -> Batch:
        """The rows up to their answers."""
        return batch if bool((batch.source == batch.mask).all()) else self.codec.questions(batch)

    def language_modeling_view(self, batch: Batch) -> Batch:
        """The rows without their answers, whose targets are all tokens but the first, which nothing comes before."""
        first = batch.mask & (batch.mask.cumsum(1) == 1)
        said = batch.source & ~first
        counts = said.sum(1, keepdim=True)
        places = (~said).int().argsort(dim=1, stable=True)[:, : int(counts.max())]
        targets = batch.input_ids.gather(1, places)
        inside = torch.arange(targets.shape[1], device=said.device) < counts
        return replace(batch, mask=batch.source, source=first, targets=targets.where(inside, IGNORE))

    @torch.no_grad()
    def generate(self, batch: Batch, prompt: SoftPrompt | None = None, **decoding: Any) -> Tensor:
        """Continuations, by the fastest path that the model allows; see `generation_choice`."""
        if uses_speculation(decoding) and len(batch) > 1:
            return self.generate_row_by_row(batch, prompt, decoding)
        questions, prompt = self.without_answers(batch), self.hidden_to_kv(prompt)
        rows = RowBatch.of(self.splice(questions, prompt), questions, prompt)
        self.check_window(rows.longest + decoding.get("max_new_tokens", 0))
        return self.generator(rows, decoding)


def target_columns(rows: Spliced, batch: Batch) -> tuple[Tensor, Tensor]:
    """The positions [B, U] before the targets, and the first of each row [B], also in place of those to ignore."""
    columns = (rows.columns.gather(1, answer_positions(batch)) - 1).clamp(min=0)
    said = batch.targets != IGNORE
    first = columns.where(said, rows.mask.shape[1]).amin(1).where(said.any(1), columns[:, 0])
    return columns.where(said, first[:, None]), first


def context_cache(backbone: Backbone) -> ContextCache:
    """Keeps keys and values of one backbone in one precision."""
    spec = backbone.spec
    if not spec.context_disk:
        return ContextCache(spec.context_memory << 20)
    folder = user_cache_path("lightning-softprompt") / "contexts" / f"{backbone.fingerprint()}-{spec.dtype}"
    return ContextCache(spec.context_memory << 20, spec.context_disk << 20, folder)
