"""Soft tokens of one backbone for another, by way of the words that both know."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.checkpoints.library import soft_tokens
from lightning_softprompt.checkpoints.prompt_file import read_prompt
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.prompts.init import Init, embed_tokens

log = logging.getLogger(__name__)


@final
@dataclass(frozen=True)
class FromAnchors(Init):
    """Soft tokens that were trained on another backbone: each the same mixture of words here as it is there.

    The words are those that are one token in both vocabularies, the anchors. With their embeddings A there and B here,
    a soft token p becomes p M, where M = (A'A + r I)^-1 A'B is the ridge regression of B on A. An experiment: nothing
    says that two backbones do the same with a mixture as they do with words.

    Source: anchors, Wu et al. 2023 (arXiv 2310.01691), section 3.2. There a prompt's cosines with the anchors are kept,
    by a search; here the mixture is, in closed form.

    Args:
        path: A `prompt.safetensors` or a checkpoint of a run.
        source: The backbone that the prompt was trained on.
        ridge: r, as a share of the mean square of the embeddings' directions.

    Raises:
        ValueError: If ridge is not above 0.
    """

    path: str
    source: str
    ridge: float = 0.01

    def __post_init__(self) -> None:
        if self.ridge <= 0:
            raise ValueError(f"ridge must be above 0, got {self.ridge}")

    def __call__(self, backbone: Backbone, length: int) -> Tensor:
        """[P, H].

        Raises:
            ValueError: If the prompt is not of that backbone, has another length, or no words are known to both.
        """
        source, path = load_backbone(BackboneSpec(name=self.source)), Path(self.path)
        saved = read_prompt(path)
        saved.check(source, path)
        tokens = soft_tokens(saved, path)
        if len(tokens) != length:
            raise ValueError(f"{path} has {len(tokens)} soft tokens, but {length} are wanted; set length to that")
        there, here = anchors(source.codec, backbone.codec)
        log.info("%d words are one token in %s and here", len(there), self.source)
        return self.map_tokens(tokens, embed_tokens(source, there), embed_tokens(backbone, here))

    def map_tokens(self, tokens: Tensor, there: Tensor, here: Tensor) -> Tensor:
        """[P, H there] -> [P, H here], by anchors [A, H there] and [A, H here]."""
        square = (there.T @ there).double()
        r = self.ridge * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype)
        return (tokens.double() @ torch.linalg.solve(square + r, (there.T @ here).double())).float()


def anchors(source: Codec, target: Codec) -> tuple[Tensor, Tensor]:
    """Ids of words that are one token in both vocabularies, with a space before them.

    Raises:
        ValueError: If there are none.
    """
    texts = {str(source.tokenizer.decode([number])).strip() for number in range(len(source.tokenizer))}
    words = [f" {text}" for text in sorted(texts) if text.isalpha()]
    if not words:
        raise ValueError("the vocabulary that the prompt was trained with has no words")
    both = [codec.tokenizer(words, add_special_tokens=False)["input_ids"] for codec in (source, target)]
    unknown = target.tokenizer.unk_token_id
    pairs = [(a[0], b[0]) for a, b in zip(*both, strict=True) if len(a) == len(b) == 1 and b[0] != unknown]
    if not pairs:
        raise ValueError("no word is one token in both vocabularies")
    there, here = torch.tensor(pairs).T
    return there, here
