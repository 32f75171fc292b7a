"""The same frozen model with the same prompt in this project and in PEFT: training, evaluation and generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.causal import CausalBackbone
from lightning_softprompt.backbones.insertion.splice import answer_positions
from lightning_softprompt.backbones.kernels.prepacked_linear import prepack
from lightning_softprompt.backbones.loading import load_codec
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import IGNORE, Batch, SoftPrompt
from lightning_softprompt.data.readers.sources import read_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Loader = Callable[[BackboneSpec], Backbone]
TEXTS = {  # data set, template, answer
    "sst2": ("sst2", "{soft}Review: {text}\nSentiment: {target}", "positive"),
    "boolq": ("boolq", "{soft}{text_pair}\nQuestion: {text}?\nAnswer: {target}", "true"),
    "pubmedqa": ("pubmedqa_cls", "{soft}{text_pair}\nQuestion: {text}\nAnswer: {target}", "yes"),
    "rag": ("pubmedqa_cls", "{text_pair}{soft}\nQuestion: {text}\nAnswer: {target}", "yes"),
}
SAMPLED = 64  # number of batches from which the timed ones are selected
TOLERANCE = 0.25  # largest relative difference of a batch's number of tokens from the mean
CONTEXT = {"rag": 400}  # number of tokens to which text_pair is repeated or truncated


class Ours:
    """A backbone of this project with a prompt.

    Args:
        backbone: The frozen model.
        tokens: [1, P, H], trainable.
    """

    def __init__(self, backbone: Backbone, tokens: Tensor) -> None:
        self.backbone = backbone
        self.tokens = nn.Parameter(tokens.clone())

    @property
    def prompt(self) -> SoftPrompt:
        """The soft prompt."""
        return SoftPrompt(tokens=self.tokens)

    def train(self, batch: Batch) -> Tensor:
        """Computes the gradient of a training step, and returns the loss."""
        self.tokens.grad = None
        loss = self.backbone.cross_entropy(batch, self.prompt).sum() / (batch.targets != IGNORE).sum()
        loss.backward()
        return loss.detach()

    @torch.inference_mode()
    def eval(self, batch: Batch) -> Tensor:
        """Returns the logits of two words, [B, 2]."""
        return self.backbone(batch, self.prompt, torch.tensor([1, 2], device=batch.input_ids.device))[:, 0]

    def generate(self, batch: Batch, count: int = 16) -> Tensor:
        """Generates `count` tokens per row."""
        return self.backbone.generate(batch, self.prompt, max_new_tokens=count, min_new_tokens=count)


class Peft:
    """PEFT's prompt tuning, as its users run it or optimized manually.

    Args:
        backbone: The backbone whose model and codec are used.
        tokens: [1, P, H].
        head: Whether only the logits of targets are computed.
    """

    def __init__(self, backbone: Backbone, tokens: Tensor, head: bool = False) -> None:
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens.shape[1])
        self.codec = backbone.codec
        self.model: Any = get_peft_model(backbone.model, config).eval()
        encoder: Any = self.model.prompt_encoder
        self.weight: Tensor = encoder["default"].embedding.weight
        self.weight.data.copy_(tokens[0])
        self.model.to(tokens.device)
        self.head = head

    def train(self, batch: Batch) -> Tensor:
        """Computes the gradient of a training step, and returns the loss."""
        self.weight.grad = None
        loss = self._loss_on_targets(batch) if self.head else self._loss_on_all(batch)
        loss.backward()
        return loss.detach()

    def _loss_on_all(self, batch: Batch) -> Tensor:
        labels = batch.input_ids.masked_fill(batch.source | ~batch.mask, IGNORE)
        return self.model(input_ids=batch.input_ids, attention_mask=batch.mask.long(), labels=labels).loss

    def _loss_on_targets(self, batch: Batch) -> Tensor:
        with self._logits_on_targets_only(batch):
            logits = self.model(input_ids=batch.input_ids, attention_mask=batch.mask.long()).logits
        return cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORE)

    @contextmanager
    def _logits_on_targets_only(self, batch: Batch) -> Iterator[None]:
        columns = answer_positions(batch) - 1 + len(self.weight)
        head: nn.Module = self.model.get_base_model().get_output_embeddings()

        def select(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            (states,) = args
            indices = columns[..., None].expand(-1, -1, states.shape[2])
            return (states.gather(1, indices),)

        handle = head.register_forward_pre_hook(select)
        try:
            yield
        finally:
            handle.remove()

    @torch.inference_mode()
    def eval(self, batch: Batch) -> Tensor:
        """Returns the logits of two words, [B, 2]; with `head`, only these are computed."""
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.mask.long()}
        if self.head:
            with self._logits_on_targets_only(batch):
                return self.model(**inputs).logits[:, 0, [1, 2]]
        logits = self.model(**inputs).logits
        rows = torch.arange(len(batch), device=logits.device)
        columns = answer_positions(batch)[:, 0] - 1 + len(self.weight)
        return logits[rows, columns][:, [1, 2]]

    def generate(self, batch: Batch, count: int = 16) -> Tensor:
        """Generates `count` tokens per row."""
        questions = self.codec.without_answers(batch)
        width = questions.input_ids.shape[1]
        padding = width - questions.mask.sum(1, keepdim=True)
        columns = torch.arange(width, device=padding.device)
        sources = (columns - padding) % width  # moves the padding to the left
        ids, mask = questions.input_ids.gather(1, sources), questions.mask.gather(1, sources)
        output = self.model.generate(
            input_ids=ids, attention_mask=mask.long(), max_new_tokens=count, min_new_tokens=count, do_sample=False,
            pad_token_id=self.codec.pad_id,
        )  # fmt: skip
        return output[:, -count:]


SHAPES = {  # hidden size, layers, heads, key/value heads, inner size
    "tiny": (64, 1, 2, 1, 64),
    "135m": (576, 30, 9, 3, 1536),
    "1b": (2048, 16, 32, 8, 8192),
}


def random_llama(shape: str, tokenizer: str) -> Loader:
    """Returns a loader of a Llama with random weights, on which the speed does not depend.

    Args:
        shape: One of `SHAPES`.
        tokenizer: Name or folder of a backbone whose tokenizer is used.
    """
    width, layers, heads, key_heads, inner = SHAPES[shape]

    def load(spec: BackboneSpec) -> Backbone:
        codec = load_codec(replace(spec, name=tokenizer))
        config = LlamaConfig(  # type: ignore[call-arg]
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=key_heads,
            intermediate_size=inner, vocab_size=len(codec.tokenizer), tie_word_embeddings=True,
            max_position_embeddings=8192, attn_implementation=spec.attention,
        )  # fmt: skip
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = LlamaForCausalLM(config).to(getattr(torch, spec.dtype))
        return CausalBackbone(model, codec, spec)

    return load


def make_sides(load: Loader, length: int, precision: str, names: Sequence[str]) -> dict[str, Ours | Peft]:
    """Returns the sides by name, each with its own copy of the same weights."""
    dtype: Any = {"fp32": "float32", "bf16": "bfloat16"}[precision]

    def load_copy(linear_backend: Any = "plain", packed: bool = True) -> Backbone:
        return load(BackboneSpec(dtype=dtype, linear_backend=linear_backend, packed=packed)).to(DEVICE)

    first = load_copy()
    tokens = first.word_embeddings[:length].detach().float().clone()[None]
    makers: dict[str, Callable[[], Ours | Peft]] = {
        "ours": lambda: Ours(first, tokens),
        "ours_prepacked": lambda: Ours(load_copy("prepacked"), tokens),
        "ours_bf16": lambda: Ours(load_copy("bf16"), tokens),
        "ours_padded": lambda: Ours(load_copy(packed=False), tokens),
        "peft": lambda: Peft(restore_transformers_forwards(load_copy()), tokens),
        "peft_head": lambda: Peft(restore_transformers_forwards(load_copy()), tokens, head=True),
        "peft_prepacked": lambda: Peft(_prepack(restore_transformers_forwards(load_copy())), tokens),
        "peft_all_prepacked": lambda: Peft(_prepack(restore_transformers_forwards(load_copy())), tokens, head=True),
    }
    return {name: makers[name]() for name in names}


def restore_transformers_forwards(backbone: Backbone) -> Backbone:
    """Restores the norms and perceptrons of transformers, which users of PEFT run, and returns the backbone."""
    for module in backbone.model.modules():
        vars(module).pop("forward", None)
    return backbone


def _prepack(backbone: Backbone) -> Backbone:
    prepack(backbone.model, "prepacked", backbone.hidden_size)
    return backbone


def load_batches(backbone: Backbone, folder: Path, text: str, size: int, count: int) -> list[Batch]:
    """Returns batches of real rows, or for `random:N` of rows with N random tokens.

    The fraction of padding differs between batches. Therefore, batches are selected whose fraction of padding is
    closest to that of all sampled batches, among the ones whose number of tokens is close to the mean.
    """
    if ":" in text:
        return list(islice(_random_batches(backbone, int(text.split(":")[1]), size), count))
    sampled = list(islice(_real_batches(backbone, folder, text, size), SAMPLED))
    padded = torch.tensor([float(batch.mask.numel()) for batch in sampled])
    real = torch.tensor([float(batch.mask.sum()) for batch in sampled])
    ratio, overall_ratio = padded / real, padded.sum() / real.sum()
    deviation = (ratio / overall_ratio - 1).abs()
    is_unusual = (real / real.mean() - 1).abs() > TOLERANCE
    order = (deviation + is_unusual).argsort()
    return [sampled[i] for i in order[:count].tolist()]


def _random_batches(backbone: Backbone, tokens: int, size: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(0)
    template = Template("{soft}{text} {target}")
    while True:
        ids = torch.randint(1000, 40000, (size, tokens - 1), generator=generator).tolist()
        row = backbone.codec.encode(template.pieces({"text": ""}), "yes")
        assemble = backbone.codec._assemble_row
        first = row.ids[:1]
        rows = [assemble(first + row_ids, [], row.targets, [(0, 0)], []) for row_ids in ids]
        yield backbone.codec.collate(rows).to(backbone.word_embeddings.device)


def _real_batches(backbone: Backbone, folder: Path, text: str, size: int) -> Iterator[Batch]:
    name, template, target = TEXTS[text]
    rows = read_rows(str(folder / name), split="train")
    layout = Template(template)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    for begin in range(0, len(order) - size, size):
        indices = order[begin : begin + size]
        picked = [_fit_context(dict(rows[i]), backbone, CONTEXT.get(text)) for i in indices]
        encoded = [backbone.codec.encode(layout.pieces(row), target) for row in picked]
        batch = backbone.codec.collate(encoded).to(backbone.word_embeddings.device)
        if template.startswith("{soft}"):
            batch.slots = torch.zeros_like(batch.slots)  # before BOS, where PEFT puts it
        yield batch


def _fit_context(row: dict[str, Any], backbone: Backbone, tokens: int | None) -> dict[str, Any]:
    if tokens is not None:
        ids = (backbone.codec.ids(row["text_pair"] + " ") * 20)[:tokens]
        row["text_pair"] = backbone.codec.tokenizer.decode(ids)
    return row
