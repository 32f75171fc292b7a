"""The interface of frozen language models, `Backbone`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, ClassVar, Protocol, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig, PreTrainedModel

from lightning_softprompt.backbones.execution.lm_head import Head, States
from lightning_softprompt.backbones.execution.row_check import RowCheck
from lightning_softprompt.backbones.fingerprint import (
    WeightFiles,
    digest_sample,
    fingerprint,
    model_digest,
    tokenizer_digest,
    versions,
)
from lightning_softprompt.backbones.generation.generate import special_tokens_only
from lightning_softprompt.backbones.insertion.attention_probe import AttentionProbe
from lightning_softprompt.backbones.insertion.embeddings import Entry, EntryUnsupportedError
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
from lightning_softprompt.backbones.insertion.layers import compile_layers, layers_of, recompute_layers, states_before
from lightning_softprompt.backbones.insertion.positions import max_positions
from lightning_softprompt.backbones.insertion.splice import Spliced, ids_of, splice
from lightning_softprompt.backbones.kernels.gated_mlp import use_lean_gated_mlp
from lightning_softprompt.backbones.kernels.prepacked_linear import plain_products, prepack
from lightning_softprompt.backbones.kernels.quantized_linear import use_exact_dequant_linear
from lightning_softprompt.backbones.kernels.rms_norm import use_frozen_rms_norm
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import IGNORE, Batch, SoftPrompt

INJECTION_TOLERANCE, LOW_PRECISION_INJECTION_TOLERANCE = 1e-3, 0.1  # relative errors; see `Backbone.injection_limit`


class LayerGather(Protocol):
    """Gathers the layers of a backbone that is sharded over processes."""

    def register_hooks(self) -> None:
        """Gathers each layer before it runs, from now on."""

    def drain(self) -> None:
        """Joins the gathers of other processes until none of them runs a layer."""


class Backbone(nn.Module, ABC):
    """A frozen language model. It computes the logits of the targets of a batch, with or without a soft prompt.

    It is always in evaluation mode and never trainable. Subclasses are final.

    Args:
        model: The transformers model, with its language-modeling head.
        codec: Converts rows to tokens and back.
        spec: The specification it was loaded from.
    """

    codec_class: ClassVar[type[Codec]]
    is_small_copy = False  # whether it is a random copy that only checks what the architecture supports
    is_causal: ClassVar[bool] = False

    def __init__(self, model: PreTrainedModel, codec: Codec, spec: BackboneSpec) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.codec = codec
        self.spec = spec
        self.attention: str = model.config._attn_implementation  # for paths that use transformers' attention
        self.entry = Entry()
        self.learned_positions: int | None = None
        self.row_check = RowCheck(model, spec.name)
        self.head = Head(model)
        if model.can_generate():
            model.generation_config = special_tokens_only(model.generation_config)
        self.pinned_fingerprint: str | None = None  # the fingerprint before weights change or are sharded
        self._pinned_sampled_fingerprint: str | None = None
        self.files: WeightFiles | None = None  # the files that the weights were loaded from
        self.layer_gather: LayerGather | None = None  # if the layers are sharded over processes
        self.train()
        if not spec.compiled:  # the compiler fuses these operations itself
            use_frozen_rms_norm(model)
            use_lean_gated_mlp(model)
        self.quantized = {} if spec.quantization is None else use_exact_dequant_linear(model, spec.quantization)
        self.prepacked = not self.quantized and prepack(model, spec.linear_backend, self.hidden_size)
        if spec.compiled:
            compile_layers(model)
        if spec.checkpointing:
            recompute_layers(model)
        self._loaded_versions = versions(model)
        self._weights_hash: tuple[tuple[int, ...], str] | None = None  # the versions of the weights and their digest

    def use_entry(self, entry: Entry) -> None:
        """Sets how embeddings enter the model."""
        self.entry = entry

    @abstractmethod
    def run_padded(self, batch: Batch, prompt: SoftPrompt | None) -> States:
        """Same as `states`, in one padded batch and without a trial run."""

    def try_head(self) -> None:
        """Checks that soft tokens affect the logits, unless the model has no head.

        Raises:
            EntryUnsupportedError: If soft tokens do not reach the logits.
        """
        if self.head.headless:
            return
        pieces = Template("{soft}a {target}").pieces({})
        row = self.codec.collate([self.codec.encode(pieces, "a")])
        first_ids = row.input_ids[:, :1]
        tokens = self.embed(first_ids).detach().requires_grad_()
        with torch.enable_grad():
            states = self.run_padded(row, SoftPrompt(tokens=tokens))
            total = self.head.logits(states).float().sum()
        if not total.requires_grad:
            raise EntryUnsupportedError("its logits do not depend on the input of its encoder.")
        torch.autograd.grad(total, tokens)
        self.head.is_plain = None  # the first batch determines it

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode, since dropout in a frozen model would only add noise to the prompt's gradient."""
        return super().train(False)

    @staticmethod
    @abstractmethod
    def claims(config: PreTrainedConfig) -> bool:
        """Whether a model of this configuration belongs to the family."""

    @abstractmethod
    def states(self, batch: Batch, prompt: SoftPrompt | None = None) -> States:
        """The hidden states from which the head predicts the targets: `batch.targets[b, u]` from `[b, u]`."""

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

    @property
    def hidden_size(self) -> int:
        """H, the size of the input embeddings."""
        return self.word_embeddings.shape[1]

    @property
    def word_embeddings(self) -> Tensor:
        """The frozen embedding table [V, H]."""
        return cast(Tensor, self.model.get_input_embeddings().weight)

    @cached_property
    def embedding_scale(self) -> float:
        """Factor by which the model's embedding module multiplies its table; 1 in most models."""
        ids = torch.arange(min(len(self.word_embeddings), 512), device=self.word_embeddings.device)
        with torch.no_grad():
            table = self.word_embeddings[ids].double()
            embeds = self.embed(ids[None])[0].double()
        if torch.equal(table, embeds):
            return 1.0
        return float(embeds.norm() / table.norm())

    @property
    def window(self) -> int | None:
        """Maximum tokens of a row, including soft tokens; None if positions are not limited."""
        limits = (self.learned_positions, max_positions(self.model.config))
        return min((limit for limit in limits if limit is not None), default=None)

    def embed(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, H], the output of the embedding module."""
        return self.stack.get_input_embeddings()(ids)  # type: ignore[no-any-return]

    def splice(self, batch: Batch, prompt: SoftPrompt | None) -> Spliced:
        """The rows of the batch with the prompt inserted.

        Raises:
            ValueError: If a row is longer than the backbone's window, or blocks outnumber slots.
        """
        prompt = prompt or SoftPrompt()
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

    @property
    def stack(self) -> PreTrainedModel:
        """The part that reads the input."""
        return cast(PreTrainedModel, self.model.base_model)

    @property
    def depth(self) -> int:
        """Layers of the part that reads the input."""
        parent, name = layers_of(self.stack)
        return len(getattr(parent, name))

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
            inputs = self.stack_inputs(rows, prompt)
            run = partial(self.entry.run, stack, rows.embeds, ids, **inputs)
            states = states_before(stack, layer, run)
        columns = rows.columns.clamp(0, states.shape[1] - 1)
        index = columns[..., None].expand(-1, -1, states.shape[2])
        return states.gather(1, index)

    def stack_inputs(self, rows: Spliced, prompt: SoftPrompt | None) -> dict[str, Any]:
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

    def check_window(self, tokens: int, window: int | None = None) -> None:
        """Refuses rows that are longer than the window.

        Args:
            tokens: Number of tokens of the longest row.
            window: Number of positions (default: `self.window`).

        Raises:
            ValueError: Naming the window.
        """
        window = self.window if window is None else window
        if window is not None and tokens > window:
            raise ValueError(
                f"a row has {tokens} tokens, including soft and generated tokens, but {self.spec.name} has a window of "
                f"{window}; lower the data module's max_tokens, the prompt's length or max_new_tokens"
            )

    def unfreeze(self) -> None:
        """Allows a baseline to change the weights. Prompts still belong to the weights before the change.

        Raises:
            ValueError: If the weights are quantized or prepacked.
        """
        if self.quantized:
            raise ValueError("quantized weights cannot be trained; remove backbone.quantization")
        if self.prepacked:
            raise ValueError("prepacked weights cannot be trained; set backbone.linear_backend to plain")
        self.pin_fingerprint()

    def pin_fingerprint(self) -> None:
        """Keeps the current fingerprint. To be called before the weights change or are sharded."""
        self.pinned_fingerprint, self._pinned_sampled_fingerprint = self.fingerprint(), self.sampled_fingerprint()

    def fingerprint(self) -> str:
        """A digest of all weights, the configuration and the tokenizer, to which prompts are bound.

        It does not depend on the precision. Quantized weights have another fingerprint.
        """
        if self.pinned_fingerprint is not None:
            return self.pinned_fingerprint
        current = versions(self.model)
        if self._weights_hash is None or self._weights_hash[0] != current:
            self._weights_hash = current, self._weights_digest(current)
        return fingerprint(self._weights_hash[1], self.tokenizer_digest, self.spec.quantization)

    def _weights_digest(self, current: tuple[int, ...]) -> str:
        if self.files is not None and self._loaded_versions == current and self.files.is_unchanged:
            return self.files.digest()
        return model_digest(self.model, self._read_weight)

    def _read_weight(self, name: str, weight: Tensor) -> Tensor:
        return self.quantized[name].weight(torch.float32) if name in self.quantized else weight

    @cached_property
    def tokenizer_digest(self) -> str:
        """A digest of everything that determines how text becomes tokens."""
        return tokenizer_digest(self.codec.tokenizer)

    def sampled_fingerprint(self) -> str:
        """The fingerprint as earlier versions computed it, from a sample of the weights."""
        if self._pinned_sampled_fingerprint is not None:
            return self._pinned_sampled_fingerprint
        names = sorted(self.model.named_parameters())[::7]
        sample = ((name, self._read_weight(name, weight), weight.numel()) for name, weight in names)
        return digest_sample(sample, self.model.config, self.hidden_size)


def _concatenate(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts))


def answer_positions(batch: Batch) -> Tensor:
    """[B, U] positions of the answer's tokens in `input_ids`; arbitrary if an answer is shorter than U."""
    answer = batch.mask & ~batch.source
    count = batch.targets.shape[1]
    return (~answer).int().argsort(dim=1, stable=True)[:, :count]
