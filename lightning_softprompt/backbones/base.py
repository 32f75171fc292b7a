"""The interface of frozen language models, `Backbone`, and their specification, `BackboneSpec`."""

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
    fingerprint,
    model_digest,
    sampled_digest,
    tokenizer_digest,
    versions,
)
from lightning_softprompt.backbones.generation.generate import special_tokens_only
from lightning_softprompt.backbones.insertion.embeddings import Entry, EntryUnsupportedError
from lightning_softprompt.backbones.insertion.key_values import (
    NAME,
    WAY_OUT,
    InjectionUnsupportedError,
    Sites,
    at,
    injectable,
    injected,
    keys_and_values_of,
    sites_of,
)
from lightning_softprompt.backbones.insertion.layers import compile_layers, layers_of, recompute_layers, states_before
from lightning_softprompt.backbones.insertion.positions import configured_positions
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


class SharedLayers(Protocol):
    """How processes that share the layers of a backbone gather them."""

    def register_hooks(self) -> None:
        """Starts to gather each layer before it runs."""

    def drain(self) -> None:
        """Takes part until no process runs a layer."""


class Backbone(nn.Module, ABC):
    """A frozen language model. It computes the logits of the targets of a batch, with or without a soft prompt.

    It is always in evaluation mode and never trainable. Subclasses are final.

    Args:
        model: The transformers model, with its language-modeling head.
        codec: Converts rows to tokens and back.
        spec: The specification it was loaded from.
    """

    codec_class: ClassVar[type[Codec]]
    is_causal: ClassVar[bool] = False

    def __init__(self, model: PreTrainedModel, codec: Codec, spec: BackboneSpec) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.codec = codec
        self.spec = spec
        self.attention: str = model.config._attn_implementation  # for paths that use transformers' own
        self.entry = Entry()
        self.learned_positions: int | None = None
        self.row_check = RowCheck(model, spec.name)
        self.head = Head(model)
        if model.can_generate():
            model.generation_config = special_tokens_only(model.generation_config)
        self.pinned_fingerprint: str | None = None  # the fingerprint before weights change or are sharded
        self._pinned_sampled_fingerprint: str | None = None
        self.files: WeightFiles | None = None  # the files of the weights
        self.layer_gather: SharedLayers | None = None  # the order in which processes with sharded layers run them
        self.train()
        if not spec.compiled:  # the compiler fuses them
            use_frozen_rms_norm(model)
            use_lean_gated_mlp(model)
        self.quantized = {} if spec.quantization is None else use_exact_dequant_linear(model, spec.quantization)
        self.prepacked = not self.quantized and prepack(model, spec.compute, self.hidden_size)
        if spec.compiled:
            compile_layers(model)
        if spec.checkpointing:
            recompute_layers(model)
        self._loaded = versions(model)
        self._hashed: tuple[tuple[int, ...], str] | None = None  # the weights' state and digest

    def use_entry(self, entry: Entry) -> None:
        """Sets how embeddings enter the model."""
        self.entry = entry

    @abstractmethod
    def run_padded(self, batch: Batch, prompt: SoftPrompt | None) -> States:
        """Same as `states`, in one padded batch and without any trial."""

    def try_head(self) -> None:
        """Runs a row through the whole model, unless the model has no head.

        Raises:
            EntryUnsupportedError: If soft tokens do not reach the logits.
        """
        if self.head.headless:
            return
        row = self.codec.collate([self.codec.encode(Template("{soft}a {target}").pieces({}), "a")])
        tokens = self.embed(row.input_ids[:, :1]).detach().requires_grad_()
        with torch.enable_grad():
            total = self.head.logits(self.run_padded(row, SoftPrompt(tokens=tokens))).float().sum()
        if not total.requires_grad:
            raise EntryUnsupportedError("what its encoder reads does not reach its logits.")
        torch.autograd.grad(total, tokens)
        self.head.plain = None  # the first batch determines it

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode, since dropout in a frozen model only adds noise to the prompt's gradient."""
        return super().train(False)

    @staticmethod
    @abstractmethod
    def claims(config: PreTrainedConfig) -> bool:
        """Whether a model of this configuration belongs to the family."""

    @abstractmethod
    def states(self, batch: Batch, prompt: SoftPrompt | None = None) -> States:
        """The states from which the head predicts the targets: `batch.targets[b, u]` from `[b, u]`."""

    def forward(self, batch: Batch, prompt: SoftPrompt | None = None, words: Tensor | None = None) -> Tensor:
        """Logits of the targets [B, U, V], or [B, U, W] of W words. Without a prompt, those of the bare backbone."""
        return self.head.logits(self.states(batch, prompt), words)

    def cross_entropy(self, batch: Batch, prompt: SoftPrompt | None = None, label_smoothing: float = 0.0) -> Tensor:
        """[B, U] cross-entropy of the targets over the whole vocabulary, in float32; 0 where there is no target."""
        return self.head.cross_entropy(self.states(batch, prompt), batch.targets, label_smoothing)

    def known_logits(self, states: States, batch: Batch) -> Tensor:
        """Logits of the targets that are not ignored."""
        return self.head.logits(states)[: len(batch)][batch.targets != IGNORE]

    def adopt_path_of(self, small_copy: Any) -> None:
        """Runs rows as a smaller copy does, without further trials."""
        self.head.plain = small_copy.head.plain
        self.use_entry(small_copy.entry)

    def language_modeling_view(self, batch: Batch) -> Batch:
        """The rows with their source as targets, for a loss of the source.

        Raises:
            ValueError: If the family does not predict its source.
        """
        raise ValueError(f"{self.spec.name} does not predict its source; source_weight requires a decoder")

    def without_answers(self, batch: Batch) -> Batch:
        """The input of generation: the rows without their answers."""
        return batch

    @abstractmethod
    def generate(self, batch: Batch, prompt: SoftPrompt | None = None, **decoding: Any) -> Tensor:
        """Generates answers [B, U], padded at the end; [B * R, U] with R answers for each row.

        Args:
            batch: The rows; their own answers are not read.
            prompt: As in `forward`.
            decoding: Options of transformers' `generate`, greedy by default, and `stop`: texts that end an answer.
                Penalties apply to the answer only.
        """

    def generate_row_by_row(self, batch: Batch, prompt: SoftPrompt | None, decoding: dict[str, Any]) -> Tensor:
        """Runs `generate` for one row at a time, for decoding that supports no batches."""
        rows = ([b] for b in range(len(batch)))
        each = [self.generate(batch.only(b), prompt and prompt.only(b), **decoding) for b in rows]
        return pad_sequence([answers[0] for answers in each], batch_first=True, padding_value=self.codec.pad_id)

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
            table, embeds = self.word_embeddings[ids].double(), self.embed(ids[None])[0].double()
        return 1.0 if torch.equal(table, embeds) else float(embeds.norm() / table.norm())

    @property
    def window(self) -> int | None:
        """Most tokens of a row, including soft tokens; None if positions are not limited."""
        limits = (self.learned_positions, configured_positions(self.model.config))
        return min((limit for limit in limits if limit is not None), default=None)

    def embed(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, H], the output of the embedding module."""
        return self.stack.get_input_embeddings()(ids)  # type: ignore[no-any-return]

    def splice(self, batch: Batch, prompt: SoftPrompt | None) -> Spliced:
        """The batch's rows with the prompt in place.

        Raises:
            ValueError: If a row is longer than the backbone's window, or blocks outnumber slots.
        """
        prompt = prompt or SoftPrompt()
        embeds = self.embed(batch.input_ids)
        if prompt.shift is not None:
            embeds = embeds + prompt.shift.to(embeds) * batch.mask[..., None]  # padding must stay unchanged
        rows = splice(embeds, batch.mask, batch.slots, prompt.tokens, prompt.blocks, prompt.token_mask)
        self.check_window(rows.mask.shape[1])
        return rows

    @cached_property
    def attentions(self) -> dict[str, Sites]:
        """The attentions that take keys and values from outside, by kind.

        Raises:
            InjectionUnsupportedError: If those of the model do not.
        """
        return sites_of(self.model)

    def check_attentions(self) -> None:
        """Refuses a model whose attentions cannot take keys and values.

        Raises:
            InjectionUnsupportedError: With the reason.
        """
        _ = self.attentions
        with plain_products():
            self._check_attention_function()

    @torch.no_grad()
    def _check_attention_function(self) -> None:
        """Compares padded rows with and without the attention function that takes keys and values.

        Raises:
            InjectionUnsupportedError: If they differ, as where a model also reads the attention mask elsewhere.
        """
        ids = torch.arange(1, 9, device=self.word_embeddings.device).expand(2, -1)
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[1, 5:] = False
        batch = Batch(ids, mask, mask, ids[:, :2], ids.new_zeros(2, 1))
        right = self._plain_results(batch)
        with injectable(self.model):
            ours = self._plain_results(batch)
        error = float((ours - right).abs().max() / right.abs().max().clamp(min=1e-30))
        if error > self.injection_tolerance:
            raise InjectionUnsupportedError(
                f"{type(self.model).__name__} cannot be given keys and values: with an attention function that takes "
                f"them its results differ by {error:.1e}; {WAY_OUT}"
            )

    def _plain_results(self, batch: Batch) -> Tensor:
        """Logits of rows without a prompt; the last states where the model has no head."""
        if self.head.headless:
            return self._hidden_states(batch, None)[batch.mask]
        return self.head.logits(self.run_padded(batch, None))

    @property
    def injection_tolerance(self) -> float:
        """Relative error up to which results with keys and values from outside count as equal."""
        is_exact = self.model.dtype in (torch.float32, torch.float64) and not self.quantized
        return INJECTION_TOLERANCE if is_exact else LOW_PRECISION_INJECTION_TOLERANCE

    def check_late_tokens(self) -> None:
        """Refuses a model that soft tokens cannot enter before a middle layer, by a trial with two tokens.

        Raises:
            ValueError: With the reason; other errors of the model pass.
        """
        ids = torch.arange(1, 6, device=self.word_embeddings.device)[None]
        seen = torch.ones_like(ids, dtype=torch.bool)
        batch = Batch(ids, seen, seen, ids[:, -1:], ids[:, :1])
        layer = self.depth // 2
        tokens = self.word_embeddings.new_zeros(1, 2, self.hidden_size)
        with torch.no_grad():
            self.hidden_states(batch, layer=layer)
            self.states(batch, SoftPrompt(hidden={layer: tokens}))

    def keys_and_values(self, ids: Tensor) -> dict[str, Tensor]:
        """Keys and values of a text [P], by kind of attention: [L, 2, N, P, D]. Encoder and decoder both read it."""
        return keys_and_values_of(self.model, self.attentions, ids)

    @contextmanager
    def injected(self, prompt: SoftPrompt | None) -> Iterator[None]:
        """Adds the prompt's keys and values to the attentions within the context."""
        if prompt is None or not prompt.kv:
            yield
            return
        pairs = at(self.attentions, prompt.kv, prompt.kv_mask)
        self.model.set_attn_implementation(NAME)
        with injected(pairs):
            yield

    @property
    def stack(self) -> PreTrainedModel:
        """The part that reads the input."""
        return cast(PreTrainedModel, self.model.base_model)

    @property
    def depth(self) -> int:
        """Layers of the part that reads the input."""
        return len(getattr(*layers_of(self.stack)))

    def hidden_states(self, batch: Batch, prompt: SoftPrompt | None = None, layer: int | None = None) -> Tensor:
        """Input states of a layer [B, T, H], or the last states, of the input tokens; values on padding are arbitrary.

        Raises:
            ValueError: If the prompt has soft tokens for a middle layer, since these states do not attend to them.
        """
        if prompt is not None and prompt.hidden:
            raise ValueError(
                "heads do not read states with soft tokens that enter at a middle layer; use soft tokens, keys and "
                "values, or a readout of words"
            )
        if layer is not None:
            return self._hidden_states(batch, prompt, layer)
        return self.row_check.run(self._hidden_states, batch, prompt, lambda states, b: states[b.mask], _cat)

    def _hidden_states(self, batch: Batch, prompt: SoftPrompt | None, layer: int | None = None) -> Tensor:
        rows, stack = self.splice(batch, prompt), self.stack
        ids = self.ids_of(rows, batch)
        with self.injected(prompt):
            run = partial(self.entry.run, stack, rows.embeds, ids, **self.stack_inputs(rows, prompt))
            states = states_before(stack, layer, run)
        columns = rows.columns.clamp(0, states.shape[1] - 1)
        return states.gather(1, columns[..., None].expand(-1, -1, states.shape[2]))

    def stack_inputs(self, rows: Spliced, prompt: SoftPrompt | None) -> dict[str, Any]:
        """Further inputs of the part that reads rows."""
        return {"attention_mask": rows.mask.long()}

    def ids_of(self, rows: Spliced, batch: Batch) -> Tensor:
        """[B, M] token ids of rows, with placeholders on soft tokens."""
        return ids_of(rows, batch.input_ids, self.entry.placeholder, self.codec.pad_id)

    @property
    def execution_description(self) -> str:
        """How rows run, for users."""
        if self.row_check.is_alone:
            return "rows run one by one, since padding changes the results of this model"
        return "rows run padded, each as a whole (an encoder attends in both directions and shares nothing)"

    @property
    def generation_description(self) -> str:
        """How answers are generated, for users."""
        return "by transformers' own generation"

    def check_window(self, tokens: int, window: int | None = None) -> None:
        """Refuses rows that are longer than the window.

        Args:
            tokens: Number of tokens of the longest row.
            window: Number of positions; None is that of the part that reads the input.

        Raises:
            ValueError: Naming the window.
        """
        window = self.window if window is None else window
        if window is not None and tokens > window:
            raise ValueError(
                f"a row takes {tokens} tokens, soft ones and new ones included, but {self.spec.name} has a window of "
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
            raise ValueError("prepacked weights cannot be trained; set backbone.compute to plain")
        self.pin_fingerprint()

    def pin_fingerprint(self) -> None:
        """Keeps the current fingerprint, before a baseline changes the weights or processes shard them."""
        self.pinned_fingerprint, self._pinned_sampled_fingerprint = self.fingerprint(), self.sampled_fingerprint()

    def fingerprint(self) -> str:
        """A digest of all weights, the configuration and the tokenizer, which prompts are tied to.

        It is the same in every precision. It differs for quantized weights.
        """
        if self.pinned_fingerprint is not None:
            return self.pinned_fingerprint
        state = versions(self.model)
        if self._hashed is None or self._hashed[0] != state:
            self._hashed = state, self._weights_digest(state)
        return fingerprint(self._hashed[1], self.tokenizer_digest, self.spec.quantization)

    def _weights_digest(self, state: tuple[int, ...]) -> str:
        if self.files is not None and self._loaded == state and self.files.unchanged:
            return self.files.digest()
        return model_digest(self.model, self._held_values)

    def _held_values(self, name: str, weight: Tensor) -> Tensor:
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
        sample = ((name, self._held_values(name, weight), weight.numel()) for name, weight in names)
        return sampled_digest(sample, self.model.config, self.hidden_size)


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts))


def answer_positions(batch: Batch) -> Tensor:
    """[B, U] positions of the answer's tokens in `input_ids`; arbitrary where an answer is shorter than U."""
    answer = batch.mask & ~batch.source
    return (~answer).int().argsort(dim=1, stable=True)[:, : batch.targets.shape[1]]
