"""Transfer of soft tokens to another backbone, through the words that both vocabularies contain."""

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
from lightning_softprompt.checkpoints.prompt_sources import report_prompt_source
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.prompts.init import Init, embed_tokens

log = logging.getLogger(__name__)


@final
@dataclass(frozen=True)
class FromAnchors(Init):
    """Soft tokens trained on another backbone, expressed as the same mixture of words (experimental).

    The words, called anchors, are those that are a single token in both vocabularies. With their embeddings A in the
    source and B in this backbone, a soft token p becomes p M, where M = (A'A + r I)^-1 A'B is the ridge regression of
    B on A. Nothing guarantees that two backbones treat a mixture of words in the same way.

    Source: anchors, Wu et al. 2023 (arXiv 2310.01691), section 3.2. The paper preserves the cosines of a prompt with
    the anchors, by a search; this class preserves the mixture, in closed form.

    Args:
        path: A `prompt.safetensors` or a checkpoint of a run.
        source: Name of the backbone that the prompt was trained on.
        ridge: r, relative to the mean squared norm of the embedding dimensions.

    Raises:
        ValueError: If ridge is not positive.
    """

    path: str
    source: str
    ridge: float = 0.01

    def __post_init__(self) -> None:
        if self.ridge <= 0:
            raise ValueError(f"ridge must be above 0, got {self.ridge}")

    def __call__(self, backbone: Backbone, length: int) -> Tensor:
        """Returns soft tokens [P, H].

        Raises:
            ValueError: If the prompt belongs to another backbone, has another length, or the vocabularies share no
                word.
        """
        source, path = load_backbone(BackboneSpec(name=self.source)), Path(self.path)
        saved = read_prompt(path)
        report_prompt_source(path)
        saved.check(source, path)
        tokens = soft_tokens(saved, path)
        if len(tokens) != length:
            raise ValueError(f"{path} has {len(tokens)} soft tokens, but length is {length}; make them equal")
        there, here = anchors(source.codec, backbone.codec)
        log.info("%d words are a single token in this vocabulary and in that of %s", len(there), self.source)
        return self.map_tokens(tokens, embed_tokens(source, there), embed_tokens(backbone, here))

    def map_tokens(self, tokens: Tensor, there: Tensor, here: Tensor) -> Tensor:
        """Maps tokens [P, H of the source] to [P, H], given the embeddings of the anchors in both backbones [A, H]."""
        gram = (there.T @ there).double()
        scale = self.ridge * gram.diagonal().mean()
        regularized = gram + scale * torch.eye(len(gram), dtype=gram.dtype)
        mapping = torch.linalg.solve(regularized, (there.T @ here).double())
        return (tokens.double() @ mapping).float()


def anchors(source: Codec, target: Codec) -> tuple[Tensor, Tensor]:
    """Returns the ids of words that, preceded by a space, are a single token in both vocabularies.

    Raises:
        ValueError: If there are none.
    """
    decoded = [str(source.tokenizer.decode([number])) for number in range(len(source.tokenizer))]
    texts = {text.strip() for text in decoded}
    words = [f" {text}" for text in sorted(texts) if text.isalpha()]
    if not words:
        raise ValueError("the vocabulary of the source backbone has no words")
    source_ids = source.tokenizer(words, add_special_tokens=False)["input_ids"]
    target_ids = target.tokenizer(words, add_special_tokens=False)["input_ids"]
    unknown = target.tokenizer.unk_token_id
    pairs = []
    for one, other in zip(source_ids, target_ids, strict=True):
        is_single = len(one) == 1 and len(other) == 1
        if is_single and other[0] != unknown:
            pairs.append((one[0], other[0]))
    if not pairs:
        raise ValueError("no word is a single token in both vocabularies")
    there, here = torch.tensor(pairs).T
    return there, here
