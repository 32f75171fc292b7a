"""The interface of frozen language models, `Backbone`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig, PreTrainedModel

from lightning_softprompt.backbones.execution.lm_head import Head, States
from lightning_softprompt.backbones.execution.row_check import RowCheck
from lightning_softprompt.backbones.frozen_model import FrozenModel
from lightning_softprompt.backbones.generation.generate import special_tokens_only
from lightning_softprompt.backbones.insertion.attention_probe import AttentionProbe
from lightning_softprompt.backbones.insertion.embeddings import Entry
from lightning_softprompt.backbones.insertion.key_values import (
    ALTERNATIVE,
    NAME,
    InjectionUnsupportedError,
    Sites,
    inject,
    injectable_attention,
    keys_and_values_of,
    kv_by_module,
    sites_of,
)
from lightning_softprompt.backbones.insertion.layers import states_before
from lightning_softprompt.backbones.insertion.splice import Spliced, ids_of, splice
from lightning_softprompt.backbones.kernels.prepacked_linear import plain_products
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.types import IGNORE, Batch, SoftPrompt

INJECTION_TOLERANCE, LOW_PRECISION_INJECTION_TOLERANCE = 1e-3, 0.1  # relative errors; see `Backbone.injection_limit`


class Backbone(FrozenModel, ABC):
    """A frozen language model. It computes the logits of the targets of a batch, with or without a soft prompt.

    Subclasses are final.

    Args:
        model: The transformers model, with its language-modeling head.
        codec: Converts rows to tokens and back.
        spec: The specification it was loaded from.
    """

    codec_class: ClassVar[type[Codec]]
    is_small_copy = False  # whether it is a random copy that only checks what the architecture supports
    is_causal: ClassVar[bool] = False
    has_lm_head: ClassVar[bool] = True  # whether models of the family predict tokens

    def __init__(self, model: PreTrainedModel, codec: Codec, spec: BackboneSpec) -> None:
        super().__init__(model, codec, spec)
        self.attention: str = model.config._attn_implementation  # for paths that use transformers' attention
        self.entry = Entry()
        self.row_check = RowCheck(model, spec.name)
        self.head = Head(model)
        if model.can_generate():
            model.generation_config = special_tokens_only(model.generation_config)

    def use_entry(self, entry: Entry) -> None:
        """Sets how embeddings enter the model."""
        self.entry = entry

    @abstractmethod
    def run_padded(self, batch: Batch, prompt: SoftPrompt | None) -> States:
        """Same as `states`, in one padded batch and without a trial run."""

    @staticmethod
    @abstractmethod
    def claims(config: PreTrainedConfig) -> bool:
        """Whether a model of this configuration belongs to the family."""

    @abstractmethod
    def states(self, batch: Batch, prompt: SoftPrompt | None = None, columns: Tensor | None = None) -> States:
        """The hidden states from which the head predicts the targets: `batch.targets[b, u]` from `[b, u]`.

        Args:
            batch: The rows.
            prompt: The prompt.
            columns: [B, U] positions of input tokens whose states are returned instead, for heads that score rows. Only
                decoder-only models support them.

        Raises:
            ValueError: If the family does not support columns.
        """

    def try_prompt(self, batch: Batch, prompt: SoftPrompt) -> Tensor:
        """Values that depend on the prompt, for a trial of whether rows with it run."""
        return self.states(batch, prompt).hidden

    def refuse_columns(self, columns: Tensor | None) -> None:
        """Refuses positions for `states`.

        Raises:
            ValueError: If there are any.
        """
        if columns is not None:
            raise ValueError(f"states of single input tokens require a decoder-only backbone, not {self.spec.name}")

    def forward(self, batch: Batch, prompt: SoftPrompt | None = None, words: Tensor | None = None) -> Tensor:
        """Logits of the targets [B, U, V], or [B, U, W] of the token ids `words` [W]."""
        return self.head.logits(self.states(batch, prompt), words)

    def cross_entropy(self, batch: Batch, prompt: SoftPrompt | None = None, label_smoothing: float = 0.0) -> Tensor:
        """[B, U] cross-entropy of the targets over the whole vocabulary, in float32; 0 where there is no target."""
        return self.head.cross_entropy(self.states(batch, prompt), batch.targets, label_smoothing)

    def target_logits(self, states: States, batch: Batch) -> Tensor:
        """Logits of the targets that are not ignored."""
        is_target = batch.targets != IGNORE
        return self.head.logits(states)[: len(batch)][is_target]

    def adopt_path_of(self, small_copy: Any) -> None:
        """Uses the execution path of a smaller copy, without further trials."""
        self.head.is_plain = small_copy.head.is_plain
        self.use_entry(small_copy.entry)

    def language_modeling_view(self, batch: Batch) -> Batch:
        """The rows with their source as targets, for a language-modeling loss on the source.

        Raises:
            ValueError: If the family does not predict its source (encoders).
        """
        raise ValueError(f"{self.spec.name} does not predict its source; source_weight requires a decoder")

    def prompt_view(self, batch: Batch) -> Batch:
        """The rows as a prompt may read them: `source` and `encoded` have nothing that reveals an answer."""
        return batch

    def without_answers(self, batch: Batch) -> Batch:
        """The input of generation: the rows without their answers."""
        return batch

    @abstractmethod
    def generate(self, batch: Batch, prompt: SoftPrompt | None = None, **decoding: Any) -> Tensor:
        """Generates answers [B, U], padded at the end; [B * R, U] with R answers for each row.

        Args:
            batch: The rows without their answers, see `without_answers`.
            prompt: As in `forward`.
            decoding: Options of transformers' `generate`, greedy by default, and `stop`: texts that end an answer.
                Penalties apply to the answer only.
        """

    def generate_row_by_row(self, batch: Batch, prompt: SoftPrompt | None, decoding: dict[str, Any]) -> Tensor:
        """Runs `generate` for one row at a time, for decoding that supports no batches."""
        answers = []
        for b in range(len(batch)):
            row_prompt = prompt and prompt.only([b])
            answer = self.generate(batch.only([b]), row_prompt, **decoding)
            answers.append(answer[0])
        return pad_sequence(answers, batch_first=True, padding_value=self.codec.pad_id)

    def splice(self, batch: Batch, prompt: SoftPrompt | None) -> Spliced:
        """The rows of the batch with the prompt inserted.

        Raises:
            ValueError: If a row is longer than the backbone's window, blocks outnumber slots, or the prompt is one of
                images and texts.
        """
        prompt = prompt or SoftPrompt()
        if self.has_lm_head and (prompt.deep or prompt.image is not None):
            raise ValueError(f"the prompt requires a backbone that compares images with texts, not {self.spec.name}")
        embeds = self.embed(batch.input_ids)
        if prompt.shift is not None:
            is_text = batch.mask[..., None]
            embeds = embeds + prompt.shift.to(embeds) * is_text  # leaves padding unchanged
        rows = splice(embeds, batch.mask, batch.slots, prompt.tokens, prompt.blocks, prompt.token_mask)
        self.check_window(rows.mask.shape[1])
        return rows

    @cached_property
    def attentions(self) -> dict[str, Sites]:
        """The attentions that accept additional keys and values, by kind.

        Raises:
            InjectionUnsupportedError: If the attentions of the model do not.
        """
        return sites_of(self.model)

    def check_attentions(self) -> None:
        """Refuses a model whose attentions do not accept additional keys and values.

        Raises:
            InjectionUnsupportedError: With the reason.
        """
        _ = self.attentions
        with plain_products():
            self._check_attention_function()

    @torch.no_grad()
    def _check_attention_function(self) -> None:
        """Compares results with and without the attention function that accepts additional keys and values.

        Raises:
            InjectionUnsupportedError: If they differ. Some models also read the attention mask elsewhere.
        """
        ids = torch.arange(1, 9, device=self.word_embeddings.device).expand(2, -1)
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[1, 5:] = False
        targets = ids[:, :2]
        batch = Batch(ids, mask, mask, targets, ids.new_zeros(2, 1))
        expected = self._results_without_prompt(batch)
        with injectable_attention(self.model):
            results = self._results_without_prompt(batch)
        largest = expected.abs().max().clamp(min=1e-30)
        error = float((results - expected).abs().max() / largest)
        if error > self.injection_tolerance:
            raise InjectionUnsupportedError(
                f"{type(self.model).__name__} does not accept additional keys and values: with an attention function "
                f"that accepts them, its results differ by {error:.1e}; {ALTERNATIVE}"
            )

    def _results_without_prompt(self, batch: Batch) -> Tensor:
        """Logits of rows without a prompt; the last hidden states if the model has no head."""
        if self.head.headless:
            return self._hidden_states(batch, None)[batch.mask]
        return self.head.logits(self.run_padded(batch, None))

    @property
    def injection_tolerance(self) -> float:
        """Relative error up to which results with additional keys and values count as equal."""
        is_exact = self.model.dtype in (torch.float32, torch.float64) and not self.quantized
        return INJECTION_TOLERANCE if is_exact else LOW_PRECISION_INJECTION_TOLERANCE

    def check_late_tokens(self) -> None:
        """Refuses a model that does not accept soft tokens before a middle layer, by a trial with two tokens.

        Raises:
            ValueError: With the reason. Other errors of the model are not caught.
        """
        ids = torch.arange(1, 6, device=self.word_embeddings.device)[None]
        mask = torch.ones_like(ids, dtype=torch.bool)
        targets, slots = ids[:, -1:], ids[:, :1]
        batch = Batch(ids, mask, mask, targets, slots)
        layer = self.depth // 2
        tokens = self.word_embeddings.new_zeros(1, 2, self.hidden_size)
        with torch.no_grad():
            self.hidden_states(batch, layer=layer)
            self.states(batch, SoftPrompt(hidden={layer: tokens}))

    def keys_and_values(self, ids: Tensor) -> dict[str, Tensor]:
        """Keys and values [L, 2, N, P, D] of a text [P], by kind of attention. Encoder and decoder both read it."""
        return keys_and_values_of(self.model, self.attentions, ids)

    @contextmanager
    def inject(self, prompt: SoftPrompt | None) -> Iterator[None]:
        """Adds the prompt's keys and values to the attentions within the context."""
        if prompt is None or not prompt.kv:
            yield
            return
        pairs = kv_by_module(self.attentions, prompt.kv, prompt.kv_mask)
        self.model.set_attn_implementation(NAME)
        with inject(pairs):
            yield

    probed_attentions = "self"  # the kind of attention that `run_probed` measures

    @abstractmethod
    def run_probed(self, probe: AttentionProbe, batch: Batch, prompt: SoftPrompt | None, groups: Tensor) -> States:
        """Same as `states`, and measures the attention from the position of each target to groups of tokens.

        Args:
            probe: Collects the attention mass.
            batch: The rows.
            prompt: The prompt.
            groups: The group of each input token [B, T].
        """

    def hidden_states(self, batch: Batch, prompt: SoftPrompt | None = None, layer: int | None = None) -> Tensor:
        """Input states of a layer [B, T, H], or the last states, of the input tokens; values on padding are arbitrary.

        Raises:
            ValueError: If the prompt has soft tokens for a middle layer, since these states do not attend to them.
        """
        if prompt is not None and prompt.hidden:
            raise ValueError(
                "heads do not support soft tokens that enter at a middle layer; use a method with soft tokens at the "
                "input or with keys and values, or a readout of label words"
            )
        if layer is not None:
            return self._hidden_states(batch, prompt, layer)

        def valid_states(states: Tensor, rows: Batch) -> Tensor:
            return states[rows.mask]

        return self.row_check.run(self._hidden_states, batch, prompt, valid_states, _concatenate)

    def _hidden_states(self, batch: Batch, prompt: SoftPrompt | None, layer: int | None = None) -> Tensor:
        rows, stack = self.splice(batch, prompt), self.stack
        ids = self.ids_of(rows, batch)
        with self.inject(prompt):
            inputs = self.stack_inputs(rows, batch, prompt)
            run = partial(self.entry.run, stack, rows.embeds, ids, **inputs)
            states = states_before(stack, layer, run)
        columns = rows.columns.clamp(0, states.shape[1] - 1)
        index = columns[..., None].expand(-1, -1, states.shape[2])
        return states.gather(1, index)

    def stack_inputs(self, rows: Spliced, batch: Batch, prompt: SoftPrompt | None) -> dict[str, Any]:
        """Further inputs of the part that reads rows."""
        return {"attention_mask": rows.mask.long()}

    def ids_of(self, rows: Spliced, batch: Batch) -> Tensor:
        """[B, M] token ids of rows, with placeholders on soft tokens."""
        return ids_of(rows, batch.input_ids, self.entry.placeholder, self.codec.pad_id)

    @property
    def execution_description(self) -> str:
        """Human-readable description of the execution path."""
        if self.row_check.runs_row_by_row:
            return "rows run one by one, since padding changes the results of this model"
        return "padded batches; each row is computed in full (bidirectional attention has no shared prefix)"

    @property
    def generation_description(self) -> str:
        """Human-readable description of how answers are generated."""
        return "by transformers' generate"


def _concatenate(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts))
