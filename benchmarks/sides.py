"""One frozen model as ours and as PEFT's, over the same weights, rows and prompt, in training and in use."""

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

from lightning_softprompt.backbones.base import Backbone, answer_positions
from lightning_softprompt.backbones.causal import CausalBackbone
from lightning_softprompt.backbones.kernels.prepacked_linear import prepack
from lightning_softprompt.backbones.loading import load_codec
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import IGNORE, Batch, SoftPrompt
from lightning_softprompt.data.readers.sources import read_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Load = Callable[[BackboneSpec], Backbone]
TEXTS = {  # data set, template, answer
    "sst2": ("sst2", "{soft}Review: {text}\nSentiment: {target}", "positive"),
    "boolq": ("boolq", "{soft}{text_pair}\nQuestion: {text}?\nAnswer: {target}", "true"),
    "pubmedqa": ("pubmedqa_cls", "{soft}{text_pair}\nQuestion: {text}\nAnswer: {target}", "yes"),
    "rag": ("pubmedqa_cls", "{text_pair}{soft}\nQuestion: {text}\nAnswer: {target}", "yes"),
}
DRAWN = 64  # batches, of which some are timed
USUAL = 0.25  # how far from the mean their tokens may be
CONTEXT = {"rag": 400}  # tokens that text_pair is filled or cut to, where all rows are alike


class Ours:
    """Our backbone with a prompt.

    Args:
        backbone: The frozen model.
        tokens: [1, P, H], trainable.
    """

    def __init__(self, backbone: Backbone, tokens: Tensor) -> None:
        self.backbone = backbone
        self.tokens = nn.Parameter(tokens.clone())

    @property
    def prompt(self) -> SoftPrompt:
        """As a method would give it."""
        return SoftPrompt(tokens=self.tokens)

    def train(self, batch: Batch) -> Tensor:
        """A training step without its optimizer; gives the loss."""
        self.tokens.grad = None
        loss = self.backbone.cross_entropy(batch, self.prompt).sum() / (batch.targets != IGNORE).sum()
        loss.backward()
        return loss.detach()

    @torch.inference_mode()
    def eval(self, batch: Batch) -> Tensor:
        """Scores of two words."""
        return self.backbone(batch, self.prompt, torch.tensor([1, 2], device=batch.input_ids.device))[:, 0]

    def generate(self, batch: Batch, count: int = 16) -> Tensor:
        """So many tokens a row."""
        return self.backbone.generate(batch, self.prompt, max_new_tokens=count, min_new_tokens=count)


class Peft:
    """PEFT's prompt tuning, as its users run it or helped by hand.

    Args:
        backbone: Whose model it takes, and whose codec says where answers stand.
        tokens: [1, P, H].
        head: Whether logits are made for targets only.
    """

    def __init__(self, backbone: Backbone, tokens: Tensor, head: bool = False) -> None:
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens.shape[1])
        self.codec = backbone.codec
        self.model: Any = get_peft_model(backbone.model, config).eval()
        self.weight = self.model.prompt_encoder["default"].embedding.weight
        self.weight.data.copy_(tokens[0])
        self.model.to(tokens.device)
        self.head = head

    def train(self, batch: Batch) -> Tensor:
        """A training step without its optimizer; gives the loss."""
        self.weight.grad = None
        loss = self._helped(batch) if self.head else self._usual(batch)
        loss.backward()
        return loss.detach()

    def _usual(self, batch: Batch) -> Tensor:
        labels = batch.input_ids.masked_fill(batch.source | ~batch.mask, IGNORE)
        return self.model(input_ids=batch.input_ids, attention_mask=batch.mask.long(), labels=labels).loss

    def _helped(self, batch: Batch) -> Tensor:
        with self._on_targets(batch):
            logits = self.model(input_ids=batch.input_ids, attention_mask=batch.mask.long()).logits
        return cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORE)

    @contextmanager
    def _on_targets(self, batch: Batch) -> Iterator[None]:
        columns = answer_positions(batch) - 1 + self.weight.shape[0]
        head = self.model.get_base_model().get_output_embeddings()

        def select(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            return (args[0].gather(1, columns[..., None].expand(-1, -1, args[0].shape[2])),)

        handle = head.register_forward_pre_hook(select)
        try:
            yield
        finally:
            handle.remove()

    @torch.inference_mode()
    def eval(self, batch: Batch) -> Tensor:
        """Scores of two words, read off all logits unless helped."""
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.mask.long()}
        if self.head:
            with self._on_targets(batch):
                return self.model(**inputs).logits[:, 0, [1, 2]]
        logits = self.model(**inputs).logits
        rows = torch.arange(len(batch), device=logits.device)
        return logits[rows, answer_positions(batch)[:, 0] - 1 + self.weight.shape[0]][:, [1, 2]]

    def generate(self, batch: Batch, count: int = 16) -> Tensor:
        """So many tokens a row."""
        questions = self.codec.without_answers(batch)
        flip = questions.input_ids.shape[1] - questions.mask.sum(1, keepdim=True)
        places = (torch.arange(questions.input_ids.shape[1], device=flip.device) - flip) % questions.input_ids.shape[1]
        ids, mask = questions.input_ids.gather(1, places), questions.mask.gather(1, places)
        said = self.model.generate(
            input_ids=ids, attention_mask=mask.long(), max_new_tokens=count, min_new_tokens=count, do_sample=False,
            pad_token_id=self.codec.pad_id,
        )  # fmt: skip
        return said[:, -count:]


SHAPES = {  # hidden size, layers, heads, key/value heads, inner size
    "tiny": (64, 1, 2, 1, 64),
    "135m": (576, 30, 9, 3, 1536),
    "1b": (2048, 16, 32, 8, 8192),
}


def random_llama(shape: str, tokenizer: str) -> Load:
    """A Llama of random weights, where there are no others: what is fast does not depend on them.

    Args:
        shape: One of `SHAPES`.
        tokenizer: Name or folder of a backbone whose tokenizer it has.
    """
    width, layers, heads, key_heads, inner = SHAPES[shape]

    def load(spec: BackboneSpec) -> Backbone:
        codec = load_codec(replace(spec, name=tokenizer))
        config = LlamaConfig(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=key_heads,
            intermediate_size=inner, vocab_size=len(codec.tokenizer), tie_word_embeddings=True,
            max_position_embeddings=8192, attn_implementation=spec.attention,
        )  # fmt: skip
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = LlamaForCausalLM(config).to(getattr(torch, spec.dtype))
        return CausalBackbone(model, codec, spec)

    return load


def make(load: Load, length: int, precision: str, wanted: Sequence[str]) -> dict[str, Ours | Peft]:
    """The sides by name, each over weights of its own that are equal."""
    dtype: Any = {"fp32": "float32", "bf16": "bfloat16"}[precision]

    def fresh(linear_backend: Any = "plain", packed: bool = True) -> Backbone:
        return load(BackboneSpec(dtype=dtype, linear_backend=linear_backend, packed=packed)).to(DEVICE)

    first = fresh()
    tokens = first.word_embeddings[:length].detach().float().clone()[None]
    makers: dict[str, Callable[[], Ours | Peft]] = {
        "ours": lambda: Ours(first, tokens),
        "ours_prepacked": lambda: Ours(fresh("prepacked"), tokens),
        "ours_bf16": lambda: Ours(fresh("bf16"), tokens),
        "ours_padded": lambda: Ours(fresh(packed=False), tokens),
        "peft": lambda: Peft(stock(fresh()), tokens),
        "peft_head": lambda: Peft(stock(fresh()), tokens, head=True),
        "peft_prepacked": lambda: Peft(_prepacked(stock(fresh())), tokens),
        "peft_all_prepacked": lambda: Peft(_prepacked(stock(fresh())), tokens, head=True),
    }
    return {name: makers[name]() for name in wanted}


def stock(backbone: Backbone) -> Backbone:
    """The backbone with transformers' own norms and perceptrons, as users of PEFT have them."""
    for module in backbone.model.modules():
        vars(module).pop("forward", None)
    return backbone


def _prepacked(backbone: Backbone) -> Backbone:
    prepack(backbone.model, "prepacked", backbone.hidden_size)
    return backbone


def batches(backbone: Backbone, folder: Path, text: str, size: int, count: int) -> list[Batch]:
    """Batches of real rows; `random:N` has rows of N random tokens instead.

    How much of a batch is padding differs from batch to batch, and a few random ones tell little: those taken are,
    among those of many that have a usual number of tokens, padded most nearly as all are together.
    """
    if ":" in text:
        return list(islice(_random(backbone, int(text.split(":")[1]), size), count))
    drawn = list(islice(_real(backbone, folder, text, size), DRAWN))
    padded, real = torch.tensor([[batch.mask.numel(), int(batch.mask.sum())] for batch in drawn]).float().T
    apart = (padded / real / (padded.sum() / real.sum()) - 1).abs()
    unusual = (real / real.mean() - 1).abs() > USUAL
    return [drawn[i] for i in (apart + unusual).argsort()[:count]]


def _random(backbone: Backbone, tokens: int, size: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(0)
    template = Template("{soft}{text} {target}")
    while True:
        ids = torch.randint(1000, 40000, (size, tokens - 1), generator=generator).tolist()
        row = backbone.codec.encode(template.pieces({"text": ""}), "yes")
        rows = [backbone.codec._assemble_row([*row.ids[:1], *own], [], row.targets, [(0, 0)], []) for own in ids]
        yield backbone.codec.collate(rows).to(backbone.word_embeddings.device)


def _real(backbone: Backbone, folder: Path, text: str, size: int) -> Iterator[Batch]:
    name, template, target = TEXTS[text]
    rows = read_rows(str(folder / name), split="train")
    layout = Template(template)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    for begin in range(0, len(order) - size, size):
        picked = [_filled(dict(rows[i]), backbone, CONTEXT.get(text)) for i in order[begin : begin + size]]
        encoded = [backbone.codec.encode(layout.pieces(row), target) for row in picked]
        batch = backbone.codec.collate(encoded).to(backbone.word_embeddings.device)
        if template.startswith("{soft}"):
            batch.slots = torch.zeros_like(batch.slots)  # before BOS, where PEFT puts it
        yield batch


def _filled(row: dict[str, Any], backbone: Backbone, tokens: int | None) -> dict[str, Any]:
    if tokens is not None:
        ids = (backbone.codec.ids(row["text_pair"] + " ") * 20)[:tokens]
        row["text_pair"] = backbone.codec.tokenizer.decode(ids)
    return row
