"""Decoder-only language models such as Llama, GPT-2, Qwen and SmolLM."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, cast, final

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.execution.context_cache import ContextCache, PrefilledCache
from lightning_softprompt.backbones.execution.lm_head import States
from lightning_softprompt.backbones.execution.packed_attention import PackingUnsupportedError, register
from lightning_softprompt.backbones.execution.path_trial import Extent, select_path
from lightning_softprompt.backbones.execution.paths import Alone, Path, PathFactory, candidate_paths
from lightning_softprompt.backbones.execution.row_batch import RowBatch
from lightning_softprompt.backbones.generation.generate import uses_speculation
from lightning_softprompt.backbones.generation.path_choice import Generator
from lightning_softprompt.backbones.insertion.attention_probe import (
    AttentionProbe,
    add_groups,
    spliced_groups,
    use_probe,
)
from lightning_softprompt.backbones.insertion.embeddings import Entry
from lightning_softprompt.backbones.insertion.key_values import check_like_text, record_attentions
from lightning_softprompt.backbones.insertion.layers import starting_at
from lightning_softprompt.backbones.insertion.splice import Spliced, answer_positions
from lightning_softprompt.backbones.kernels.prepacked_linear import plain_products
from lightning_softprompt.backbones.tokenization.codec import Codec, Run, StartToken
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.types import IGNORE, Batch, Encoded, Piece, Slot, SoftPrompt
from lightning_softprompt.system.cache_dirs import cache_folder

log = logging.getLogger(__name__)
register()


@final
class CausalCodec(Codec):
    """The answer follows the source. Text after the answer is left out, since the model cannot attend to it.

    Args:
        tokenizer: The backbone's tokenizer.
        padding_side: The side on which shorter rows of a batch are padded.
        start_token: The token at the start of rows, see `BackboneSpec`. A row whose template begins with the same
            tokens, such as a chat template, does not get them twice. A row without text before its answer always begins
            with a token, so that every target has a state before it.

    Raises:
        ValueError: If the tokenizer is not a fast one.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, padding_side: str = "right", start_token: StartToken = "auto"
    ) -> None:
        super().__init__(tokenizer, padding_side)
        self.start_token = start_token

    def with_start(self, start_token: StartToken) -> Codec:
        """A copy of the codec with another start token."""
        return type(self)(self.tokenizer, self.padding_side, start_token)

    @cached_property
    def start(self) -> tuple[int, ...]:  # type: ignore[override]
        """Special tokens at the start of every row."""
        from_tokenizer, bos = super().start, self.tokenizer.bos_token_id
        if self.start_token == "none":
            return ()
        if self.start_token == "bos":
            return (self._bos_or_eos,)
        if self.start_token == "tokenizer" or from_tokenizer:
            return from_tokenizer
        return () if bos is None else (bos,)

    @property
    def _bos_or_eos(self) -> int:
        """The BOS token; without one, the EOS or padding token."""
        candidates = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.pad_id)
        return next(id for id in candidates if id is not None)

    def opening(self, before: Sequence[Run]) -> tuple[int, ...]:
        """See `Codec.opening`. A row without any text begins with BOS or EOS."""
        if any(before):
            return super().opening(before)
        return self.start or (self._bos_or_eos,)

    @property
    def remark(self) -> str | None:
        """The tokens at the start of rows, if the tokenizer does not add them."""
        if self.start == super().start:
            return None
        names = self.tokenizer.convert_ids_to_tokens(list(self.start))
        return (
            f"Each row begins with {''.join(names)!r}, which the tokenizer of the model does not add itself; "
            f"--backbone.start_token tokenizer omits it"
        )

    @property
    def end(self) -> tuple[int, ...]:
        """Empty, since the answer comes last."""
        return ()

    def pieces_after_answer(self, pieces: Sequence[Piece]) -> Sequence[Piece]:
        """Empty, since the answer does not attend to later text.

        Raises:
            ValueError: If there is a soft block after the answer, since it would get no gradient.
        """
        if any(isinstance(piece, Slot) for piece in pieces):
            raise ValueError("a causal model cannot attend to {soft} after {target}; move {soft} before {target}")
        return ()

    def check_words(self, row: Encoded) -> None:
        """See `Codec.check_words`. Soft blocks after all words would get no gradient.

        Raises:
            ValueError: If no word has a token, or none follows a soft block.
        """
        super().check_words(row)
        if min(row.slots) > max(row.words):
            raise ValueError("words of a causal model cannot attend to {soft} after them; move {soft} before the words")

    def answer_span(self, row: Encoded) -> tuple[int, int]:
        """See `Codec.answer_span`. Of the answers of a dialogue, it is the last one."""
        end = row.answers[-1] + 1
        first = end - 1
        answers = set(row.answers)
        while first - 1 in answers:
            first -= 1
        return first, end

    def assemble(self, before: Sequence[int], after: Sequence[int], answer: Sequence[int]) -> tuple[list[int], range]:
        """The text before the answer, then the answer."""
        return [*before, *answer], range(len(before), len(before) + len(answer))


@final
class CausalBackbone(Backbone):
    """A frozen decoder-only model. A trial on the first batch determines its execution path; see `execution.paths`."""

    codec_class = CausalCodec
    is_causal = True

    def __init__(self, model: PreTrainedModel, codec: Codec, spec: BackboneSpec) -> None:
        super().__init__(model, codec, spec)
        self.contexts = context_cache(self)
        self.tried = Extent()  # the maximum over all trials
        self.path_factories = self._list_paths()
        self.prompts = PrefilledCache(model, self.contexts)
        self.generator = Generator(self)
        self.path: Path | None = None
        self._logged_description = ""
        self.has_warned_of_window = False
        self.reasons: list[str] = [] if spec.packed else ["backbone.packed is false"]

    @staticmethod
    def claims(config: PreTrainedConfig) -> bool:
        """True: this family is asked last."""
        return True

    def states(self, batch: Batch, prompt: SoftPrompt | None = None, columns: Tensor | None = None) -> States:
        """See `Backbone.states`."""
        prompt = self.hidden_to_kv(prompt)
        spliced = self.splice(batch, prompt)
        if columns is None:
            positions, first = target_columns(spliced, batch)
        else:
            positions = spliced.columns.gather(1, columns)
            first = positions.amin(1)
        rows = RowBatch.of(spliced, batch, prompt).drop_after_targets(positions)
        self.check_window(rows.longest)
        self._warn_of_sliding_window(rows)
        try:
            return self._path_for(rows, positions, first)(rows, positions, first)
        except PackingUnsupportedError as reason:  # for example, this batch is longer than a sliding window
            self.path_factories, self.path = self.path_factories[1:], None
            self.reasons.append(str(reason))
            return self.states(batch, prompt, columns)

    def run_probed(self, probe: AttentionProbe, batch: Batch, prompt: SoftPrompt | None, groups: Tensor) -> States:
        """See `Backbone.run_probed`. The batch runs on its usual path."""
        prompt = self.hidden_to_kv(prompt)
        spliced = self.splice(batch, prompt)
        columns, first = target_columns(spliced, batch)
        rows = RowBatch.of(spliced, batch, prompt)
        grouped = replace(rows, keys=add_groups(rows.keys, spliced_groups(probe, spliced, groups, prompt)))
        grouped = grouped.drop_after_targets(columns)
        path = self._path_for(grouped, columns, first)
        with use_probe(probe):
            return path(grouped, columns, first)

    def stack_inputs(self, rows: Spliced, batch: Batch, prompt: SoftPrompt | None) -> dict[str, Any]:
        """The attention mask, and positions that follow those of the prompt's keys and values."""
        inputs = {**super().stack_inputs(rows, batch, prompt), "use_cache": False}
        if prompt is None or not prompt.kv:  # the model counts positions itself
            return inputs
        key, _ = next(iter(prompt.kv["self"].values()))
        mask = prompt.kv_mask.get("self")
        first = key.shape[2] if mask is None else mask.sum(1, keepdim=True)
        positions = first + torch.arange(rows.mask.shape[1], device=rows.mask.device)[None]
        return {**inputs, "position_ids": positions}

    @property
    def stack(self) -> PreTrainedModel:
        """The decoder without its head; the text part of a multimodal model."""
        decoder = self.model.get_decoder()
        if decoder is not self.model and isinstance(decoder, PreTrainedModel):  # in some models, it is the head
            return decoder
        if self.model.base_model is not self.model:
            return cast(PreTrainedModel, self.model.base_model)
        inner = (child for child in self.model.children() if isinstance(child, PreTrainedModel))
        return next(inner, self.model)

    def check_attentions(self) -> None:
        """Refuses a model in which the keys and values of a text have another effect than the text.

        Raises:
            InjectionUnsupportedError: With the reason.
        """
        with plain_products():
            check_like_text(self.model, self.stack, self.attentions, self.injection_tolerance)

    def check_late_tokens(self) -> None:
        """See `Backbone.check_late_tokens`. In a decoder, such tokens are keys and values.

        Raises:
            ValueError: With the reason.
        """
        self.check_attentions()
        tokens = self.word_embeddings.new_zeros(1, 2, self.hidden_size)
        with torch.no_grad():
            self.hidden_to_kv(SoftPrompt(hidden={self.depth // 2: tokens}))

    def hidden_to_kv(self, prompt: SoftPrompt | None) -> SoftPrompt | None:
        """Converts soft tokens that enter at a middle layer to keys and values.

        Such tokens precede the row and attend to each other only, so the two are equivalent.
        """
        if prompt is None or not prompt.hidden:
            return prompt
        ((layer, tokens),) = prompt.hidden.items()
        tokens, sites = tokens.to(self.word_embeddings.dtype), self.attentions["self"]
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        with starting_at(self.stack, layer, tokens):
            recorded = record_attentions(self.stack, inputs_embeds=tokens, position_ids=positions)
        layer_of = {module: number for number, module in enumerate(sites.modules)}
        pairs = {layer_of[inputs.module]: (inputs.key, inputs.value) for inputs in recorded}
        return replace(prompt, hidden={}, kv={"self": pairs})

    def adopt_path_of(self, small_copy: Any) -> None:
        """See `Backbone.adopt_path_of`.

        With a sliding window, rows run padded, since a later packed batch could exceed the window.
        """
        super().adopt_path_of(small_copy)
        if getattr(self.model.config, "sliding_window", None):
            self.reasons, self.path_factories = ["layers have a sliding window"], self.path_factories[-2:-1]
        else:
            remaining = len(small_copy.path_factories)
            self.reasons, self.path_factories = small_copy.reasons, self.path_factories[-remaining:][:1]
        self.path = self.path_factories[0](self.model, self.head)
        self.path.enter()

    def _warn_of_sliding_window(self, rows: RowBatch) -> None:
        """Warns once if the end of a row cannot attend to the soft tokens directly."""
        window = getattr(self.model.config, "sliding_window", None)
        if self.has_warned_of_window or window is None or not rows.soft.any():
            return
        distance = rows.mask.sum(1) - rows.soft.int().argmax(1)  # [B] from the first soft token to the end
        if int(distance.max()) > window:
            self.has_warned_of_window = True
            log.warning(
                "the first soft token of a row is %d tokens before its end, but layers of %s have a sliding window of "
                "%d tokens; move {soft} closer to {target}, or use PrefixTuning, whose keys and values every token "
                "attends to",
                int(distance.max()),
                self.spec.name,
                window,
            )

    def run_padded(self, batch: Batch, prompt: SoftPrompt | None) -> States:
        """Same as `states`, row by row and without a trial run."""
        spliced = self.splice(batch, prompt)
        columns, first = target_columns(spliced, batch)
        alone = Alone(self.model, self.head, self.attention, self.entry)
        return alone(RowBatch.of(spliced, batch, prompt).drop_after_targets(columns), columns, first)

    def allow_changes(self) -> None:
        """See `FrozenModel.allow_changes`. Keys and values of texts are not cached."""
        super().allow_changes()
        self.contexts.is_enabled = False

    def use_entry(self, entry: Entry) -> None:
        """See `Backbone.use_entry`. Later trials use it, too."""
        super().use_entry(entry)
        self.path_factories = self._list_paths()

    def _list_paths(self) -> list[PathFactory]:
        """The paths that the specification allows, the fastest first."""
        return candidate_paths(self.spec, self.attention, self.contexts, self.entry)

    def _path_for(self, rows: RowBatch, columns: Tensor, first: Tensor) -> Path:
        """The path of a batch. A batch that exceeds all earlier trials repeats the trial."""
        extent = Extent.of(rows)
        if self.path is not None and (len(self.path_factories) == 1 or self.tried.covers(extent)):
            return self.path
        only_longer_rows = self.path is not None and self.tried.covers_except_rows(extent)
        index, reasons = select_path(self.model, self.path_factories, rows, columns, first, only_longer_rows)
        self.tried = self.tried.join(extent)
        self.reasons += reasons
        if self.path is None or index:
            self.path_factories = self.path_factories[index:]
            self.path = self.path_factories[0](self.model, self.head)
            if not self.is_small_copy and self.execution_description != self._logged_description:
                self._logged_description = self.execution_description
                log.info("Execution path: %s", self.execution_description)
        self.path.enter()
        return self.path

    @property
    def execution_description(self) -> str:
        """The execution path, and the reason against a faster one."""
        if self.path is None:
            return "the first batch determines the execution path"
        return self.path.description + "".join(f" ({reason})" for reason in self.reasons[:1])

    @property
    def generation_description(self) -> str:
        """The generation path, and the reason against a faster one."""
        return self.generator.execution_description

    def prompt_view(self, batch: Batch) -> Batch:
        """See `Backbone.prompt_view`. A row with several predicted answers ends at the first one.

        All tokens attend to the prompt, also those of earlier answers, and later user turns may reveal these.
        """
        rows = batch.encoded or ()
        if not any(_has_several_answers(row) for row in rows):
            return batch
        encoded = tuple(_end_at_first_answer(row) if _has_several_answers(row) else row for row in rows)
        return replace(batch, source=_source_before_answers(batch), encoded=encoded)

    def without_answers(self, batch: Batch) -> Batch:
        """The input of generation: the rows up to their answers."""
        has_answers = any(row.answers for row in batch.require_encoded())
        return self.codec.without_answers(batch) if has_answers else batch

    def language_modeling_view(self, batch: Batch) -> Batch:
        """The rows up to their first answers. The targets are all tokens but the first."""
        first = batch.mask & (batch.mask.cumsum(1) == 1)
        before = _source_before_answers(batch)
        is_target = before & ~first
        counts = is_target.sum(1, keepdim=True)
        columns = (~is_target).int().argsort(dim=1, stable=True)[:, : int(counts.max())]
        targets = batch.input_ids.gather(1, columns)
        is_valid = torch.arange(targets.shape[1], device=targets.device) < counts
        return replace(
            batch,
            mask=before,
            source=first,
            targets=targets.where(is_valid, IGNORE),
            encoded=tuple(_language_modeling_row(row) for row in batch.require_encoded()),
        )

    @torch.no_grad()
    def generate(self, batch: Batch, prompt: SoftPrompt | None = None, **decoding: Any) -> Tensor:
        """Continuations of the rows, by the fastest correct path; see `generation.path_choice`."""
        if uses_speculation(decoding) and len(batch) > 1:
            return self.generate_row_by_row(batch, prompt, decoding)
        questions, prompt = self.without_answers(batch), self.hidden_to_kv(prompt)
        rows = RowBatch.of(self.splice(questions, prompt), questions, prompt)
        self.check_window(rows.longest + decoding.get("max_new_tokens", 0))
        return self.generator(rows, decoding)


def _language_modeling_row(row: Encoded) -> Encoded:
    """A row without its answer, whose targets are all tokens but the first."""
    ids = _end_at_first_answer(row).ids if row.answers else row.ids
    return row._replace(ids=ids, answers=tuple(range(1, len(ids))), targets=ids[1:])


def _has_several_answers(row: Encoded) -> bool:
    """Whether other tokens are between the answer's tokens."""
    return bool(row.answers) and row.answers[-1] - row.answers[0] >= len(row.answers)


def _end_at_first_answer(row: Encoded) -> Encoded:
    """A row up to its first answer."""
    return row._replace(ids=row.ids[: row.answers[0]], answers=(), targets=())


def _source_before_answers(batch: Batch) -> Tensor:
    """[B, T] whether a token of the source precedes the first answer of its row."""
    is_answer = batch.mask & ~batch.source
    return batch.source & (is_answer.cumsum(1) == 0)


def target_columns(rows: Spliced, batch: Batch) -> tuple[Tensor, Tensor]:
    """The positions [B, U] before the targets, and the first of them in each row [B].

    Ignored targets get the first position of their row.
    """
    columns = (rows.columns.gather(1, answer_positions(batch)) - 1).clamp(min=0)
    has_loss = batch.targets != IGNORE
    first = columns.where(has_loss, rows.mask.shape[1]).amin(1)
    first = first.where(has_loss.any(1), columns[:, 0])
    return columns.where(has_loss, first[:, None]), first


def context_cache(backbone: Backbone) -> ContextCache:
    """The cache for keys and values of a backbone, in memory and, if requested, on disk."""
    spec = backbone.spec
    if not spec.context_disk:
        return ContextCache(spec.context_memory << 20)
    folder = cache_folder("contexts", f"{backbone.fingerprint()}-{spec.dtype}")
    return ContextCache(spec.context_memory << 20, spec.context_disk << 20, folder)
