"""BERTScore: how near the words of two texts are to each other in the states of an encoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.backbones.masked import MaskedBackbone
from lightning_softprompt.core.backbone_spec import BackboneSpec

AT_ONCE = 64  # texts


@cache
def encoder(name: str) -> Backbone:
    """The encoder of a name, loaded once a process.

    Raises:
        ValueError: If it cannot be loaded, or is none.
    """
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):  # a head that is made up draws numbers
        backbone = load_backbone(BackboneSpec(name))
    if not isinstance(backbone, MaskedBackbone):
        raise ValueError(f"BERTScore wants an encoder such as all-minilm-l6-v2, but {name!r} is a decoder")
    return backbone


@torch.no_grad()
def bert_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]], name: str, device: torch.device
) -> list[float]:
    """F1 of greedy matching for each text, the best over its references (Zhang et al. 2020, arXiv 1904.09675).

    The states are the encoder's last; special tokens match nothing; words weigh the same; nothing is rescaled. Numbers
    of different encoders cannot be compared. An empty text scores 0. Texts are cut at the encoder's window.

    Args:
        predictions: What was said.
        references: What is right, for each.
        name: The encoder.
        device: Where it runs.
    """
    texts = list(dict.fromkeys([*predictions, *(text for row in references for text in row)]))
    with torch.autocast(device.type, enabled=False):
        states = dict(zip(texts, directions(encoder(name).to(device), texts), strict=True))
    pairs = zip(predictions, references, strict=True)
    return [max(matched(states[text], states[reference]) for reference in row) for text, row in pairs]


def directions(backbone: Backbone, texts: Sequence[str]) -> list[Tensor]:
    """[T, H] of each text: the last states of its tokens, each of length 1."""
    found: list[Tensor] = []
    for start in range(0, len(texts), AT_ONCE):
        rows = backbone.codec.tokenizer(
            list(texts[start : start + AT_ONCE]), padding=True, truncation=True, max_length=backbone.window,
            return_tensors="pt", return_special_tokens_mask=True,
        ).to(backbone.word_embeddings.device)  # fmt: skip
        meant = rows.pop("special_tokens_mask") == 0  # padding is special too
        states = torch.nn.functional.normalize(backbone.stack(**rows).last_hidden_state.float(), dim=-1)
        found += [row[real] for row, real in zip(states, meant, strict=True)]
    return found


def matched(said: Tensor, right: Tensor) -> float:
    """F1 of two texts [T, H] and [U, H]: each token goes with the nearest of the other text."""
    if not len(said) or not len(right):
        return 0.0
    near = said @ right.T  # [T, U]
    precision, recall = float(near.amax(1).mean()), float(near.amax(0).mean())
    return 2 * precision * recall / (precision + recall)
