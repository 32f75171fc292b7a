"""BERTScore: similarity of two texts by the token states of an encoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.backbones.masked import MaskedBackbone
from lightning_softprompt.core.backbone_spec import BackboneSpec

BATCH_SIZE = 64


@cache
def encoder(name: str) -> Backbone:
    """Loads an encoder, once per process.

    Raises:
        ValueError: If it cannot be loaded, or is not an encoder.
    """
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):  # a new head would consume random numbers
        backbone = load_backbone(BackboneSpec(name))
    if not isinstance(backbone, MaskedBackbone):
        raise ValueError(f"BERTScore requires an encoder such as all-minilm-l6-v2, but {name!r} is a decoder")
    return backbone


@torch.no_grad()
def bert_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]], name: str, device: torch.device
) -> list[float]:
    """Returns the F1 of greedy matching of each text, the best over its references (Zhang et al. 2020, 1904.09675).

    It uses the last states of the encoder, without special tokens, idf weights or rescaling. Scores of different
    encoders are not comparable. The score of an empty text is 0. Texts are truncated to the window of the encoder.

    Args:
        predictions: Predicted texts.
        references: References of each text.
        name: The encoder.
        device: Device of the encoder.
    """
    reference_texts = [text for row in references for text in row]
    texts = list(dict.fromkeys([*predictions, *reference_texts]))
    with torch.autocast(device.type, enabled=False):
        states = dict(zip(texts, normalize_states(encoder(name).to(device), texts), strict=True))
    scores = []
    for text, row in zip(predictions, references, strict=True):
        scores.append(max(matching_f1(states[text], states[reference]) for reference in row))
    return scores


def normalize_states(backbone: Backbone, texts: Sequence[str]) -> list[Tensor]:
    """Returns the last states [T, H] of the tokens of each text, normalized to unit length."""
    all_states: list[Tensor] = []
    for start in range(0, len(texts), BATCH_SIZE):
        rows = backbone.codec.tokenizer(
            list(texts[start : start + BATCH_SIZE]), padding=True, truncation=True, max_length=backbone.window,
            return_tensors="pt", return_special_tokens_mask=True,
        ).to(backbone.word_embeddings.device)  # fmt: skip
        is_content = rows.pop("special_tokens_mask") == 0  # padding is special, too
        states = torch.nn.functional.normalize(backbone.stack(**rows).last_hidden_state.float(), dim=-1)
        all_states += [row[mask] for row, mask in zip(states, is_content, strict=True)]
    return all_states


def matching_f1(prediction: Tensor, reference: Tensor) -> float:
    """Returns the F1 of two texts [T, H] and [U, H], in which each token matches the most similar token."""
    if not len(prediction) or not len(reference):
        return 0.0
    similarity = prediction @ reference.T  # [T, U]
    precision, recall = float(similarity.amax(1).mean()), float(similarity.amax(0).mean())
    return 2 * precision * recall / (precision + recall)
