"""Sentence encoders: texts as vectors of length 1."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer
from transformers.utils.hub import cached_file
from transformers.utils.logging import disable_progress_bar

from lightning_softprompt.backbones.loading import from_pretrained
from lightning_softprompt.backbones.location import resolve_location
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.retrieval.passages.chunking import Span, Units
from lightning_softprompt.retrieval.search.fusion import Floats

BATCH_SIZE = 32  # texts
POOLS = {
    "pooling_mode_mean_tokens": lambda states, mask: (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True),
    "pooling_mode_cls_token": lambda states, mask: states[:, 0],
}


class Encoder(ABC):
    """Encodes texts as vectors of length 1. Texts with similar meanings have vectors with a large product."""

    @abstractmethod
    def passages(self, texts: Sequence[str]) -> Floats:
        """Returns the vectors [n, H] of passages."""

    @abstractmethod
    def questions(self, texts: Sequence[str]) -> Floats:
        """Returns the vectors [n, H] of questions."""


@final
class SentenceEncoder(Encoder):
    """An encoder with the files of sentence-transformers (Reimers & Gurevych 2019), run by transformers.

    Its files set the pooling (`1_Pooling`; default: mean), the maximum number of tokens
    (`sentence_bert_config.json`), and the prefixes of questions and passages (`config_sentence_transformers.json`).

    Args:
        name: The packaged `all-minilm-l6-v2`, a folder, or a hub id.
        device: Device of the encoder (default: CUDA if available, else the CPU).

    Raises:
        ValueError: If it cannot be loaded, or has another pooling than mean or first state.
    """

    def __init__(self, name: str, device: str | None = None) -> None:
        self.name = name
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        place = resolve_location(BackboneSpec(name)).name
        disable_progress_bar()
        self.tokenizer: Any = _load(AutoTokenizer.from_pretrained, name, place)
        load = {"use_safetensors": True, "dtype": torch.float32}
        with (
            torch.inference_mode(False),
            torch.random.fork_rng(devices=[]),
        ):  # a missing pooler is initialized at random
            self.model: Any = _load(AutoModel.from_pretrained, name, place, **load).to(self.device).eval()
        self.window = _window(place, self.tokenizer, self.model)
        self.pool = POOLS[_pool(name, place)]
        prompts = _read(place, "config_sentence_transformers.json").get("prompts") or {}
        self.before_question = _find_prompt(prompts, "query")
        self.before_passage = _find_prompt(prompts, "document", "passage")

    def passages(self, texts: Sequence[str]) -> Floats:
        """Returns the vectors [n, H] of passages."""
        return self._encode([f"{self.before_passage}{text}" for text in texts])

    def questions(self, texts: Sequence[str]) -> Floats:
        """Returns the vectors [n, H] of questions."""
        return self._encode([f"{self.before_question}{text}" for text in texts])

    @torch.inference_mode()
    def _encode(self, texts: Sequence[str]) -> Floats:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # rows of a batch are padded to the longest
        found: list[Tensor] = [torch.empty(0)] * len(texts)
        for start in range(0, len(texts), BATCH_SIZE):
            some = order[start : start + BATCH_SIZE]
            for i, vector in zip(some, self._vectors([texts[i] for i in some]), strict=True):
                found[i] = vector
        width = self.model.config.hidden_size
        return torch.stack(found).numpy() if found else np.empty((0, width), np.float32)

    def _vectors(self, texts: list[str]) -> Tensor:
        rows = self.tokenizer(texts, padding=True, truncation=True, max_length=self.window, return_tensors="pt")
        rows = rows.to(self.device)
        states = self.model(**rows).last_hidden_state.float()  # [B, T, H]
        pooled: Tensor = self.pool(states, rows["attention_mask"].to(states.dtype))
        return normalize(pooled, dim=-1).cpu()


@cache
def load_encoder(name: str) -> Encoder:
    """Loads an encoder, once per process."""
    return SentenceEncoder(name)


def load_token_units(name: str) -> Units:
    """Returns a function that returns the spans of the tokens of a text, by the tokenizer of a model.

    Raises:
        ValueError: If the tokenizer cannot be loaded, or does not return the positions of tokens.
    """
    tokenizer: Any = _load(AutoTokenizer.from_pretrained, name, resolve_location(BackboneSpec(name)).name)
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer of {name!r} does not say where tokens stand; cut by unit words")

    def units(text: str) -> list[Span]:
        rows = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return _visible(text, rows["offset_mapping"])

    return units


def _visible(text: str, spans: Sequence[Span]) -> list[Span]:
    """Returns spans without leading white space; a character that is several tokens counts once."""
    found: list[Span] = []
    for start, end in spans:
        begins = end - len(text[start:end].lstrip())
        if begins < end and (not found or begins > found[-1][0]):
            found.append((begins, end))
    return found


def _load(load: Callable[..., Any], name: str, place: str, **options: object) -> Any:
    return from_pretrained(load, BackboneSpec(place), f"encoder {name!r}", **options)


def _read(place: str, file: str) -> dict[str, Any]:
    """Reads a JSON file of a model; empty if the file does not exist."""
    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    path = Path(place) / file if Path(place).is_dir() else cached_file(place, file, **missing)
    return dict(json.loads(Path(path).read_text())) if path and Path(path).is_file() else {}


def _window(place: str, tokenizer: Any, model: Any) -> int:
    max_length = _read(place, "sentence_bert_config.json").get("max_seq_length")
    return int(min(max_length or 10**9, tokenizer.model_max_length, model.config.max_position_embeddings))


def _pool(name: str, place: str) -> str:
    config = _read(place, "1_Pooling/config.json")
    pools = sorted(key for key, value in config.items() if key.startswith("pooling_mode_") and value is True)
    if not pools:
        return "pooling_mode_mean_tokens"
    if len(pools) > 1 or pools[0] not in POOLS:
        raise ValueError(f"encoder {name!r} pools by {', '.join(pools)}; known are {', '.join(POOLS)}")
    return pools[0]


def _find_prompt(prompts: dict[str, str], *names: str) -> str:
    return next((prompts[name] for name in names if prompts.get(name)), "")
