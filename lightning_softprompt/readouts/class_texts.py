"""Class scores from the similarity of an image and the texts of the classes."""

from __future__ import annotations

from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from lightning_softprompt.backbones.contrastive.base import ContrastiveBackbone, contrastive, normalize
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import Batch, Classes, SoftPrompt
from lightning_softprompt.readouts.base import WordReadout
from lightning_softprompt.system.tensor_files import hash_tensors

MAX_TEXTS = 1024  # texts that run at once without gradient, if each image has texts of its own


@final
class ClassTexts(WordReadout):
    """Similarity of the features of an image and of the text of each class (Radford et al. 2021, arXiv 2103.00020).

    The text of a class is the template with a label word as `{target}`. Several label words of a class are averaged, as
    in the ensemble of prompts of section 3.1.4: the mean of normalized features, normalized again.

    Texts run once per step, whatever the number of images, unless the prompt depends on the image. Without gradient,
    they run again only if the prompt has changed.

    Args:
        codec: Codec of the backbone.
        classes: The classes, their label words, and the template.

    Raises:
        ValueError: If the template inserts columns, which texts of classes do not have.
    """

    def __init__(self, codec: Codec, classes: Classes) -> None:
        super().__init__(codec, classes)
        template = Template(classes.template)
        if template.columns:
            raise ValueError(
                f"texts of classes have no columns, but the template has {list(template.columns)}; use {{soft}}, "
                "{target} and text"
            )
        rows, class_ids = [], []
        for number, words in enumerate(classes.words.values()):
            for word in words:
                rows.append(codec.encode(template.pieces({}), word.removeprefix(template.glue)))
                class_ids.append(number)
        self.has_one_word = len(rows) == len(classes)
        self.texts = replace(codec.collate(rows), class_ids=torch.tensor(class_ids))  # [R, T]
        self._last_features: tuple[str, Tensor] | None = None  # hash of a prompt, and features of the classes

    def forward(self, lm: PromptedLM, batch: Batch) -> Tensor:
        """Computes scores [B, C] in float32."""
        backbone = contrastive(lm.backbone)
        prompt = lm.prompt(batch)
        images = backbone.image_features(batch, prompt.image)  # [B, F]
        texts = self.texts.to(images.device)
        if not prompt.depends_on_image:
            return backbone.scores(images, self._class_features(backbone, texts, lm.prompt(texts)))
        rows_at_once = len(images) if torch.is_grad_enabled() else max(1, MAX_TEXTS // len(texts))
        parts = []
        for part in images.split(rows_at_once):
            pairs = pair_with_images(texts, part)
            features = backbone.text_features(pairs, lm.prompt(pairs))
            parts.append(self._mean_of_words(features.unflatten(0, (len(part), len(texts)))))
        return backbone.scores(images, torch.cat(parts))

    def _class_features(self, backbone: ContrastiveBackbone, texts: Batch, prompt: SoftPrompt) -> Tensor:
        """[C, F]; those of the last prompt, if it was the same."""
        if torch.is_grad_enabled() or not backbone.contexts.is_enabled:
            return self._mean_of_words(backbone.text_features(texts, prompt))
        identity = prompt_hash(prompt)
        if self._last_features is None or self._last_features[0] != identity:
            self._last_features = identity, self._mean_of_words(backbone.text_features(texts, prompt))
        return self._last_features[1]

    def _mean_of_words(self, features: Tensor) -> Tensor:
        """[..., R, F] features of label words -> [..., C, F] of classes."""
        if self.has_one_word:
            return features
        class_ids = self.texts.class_ids
        sums = features.new_zeros(*features.shape[:-2], len(self.classes), features.shape[-1])
        return normalize(sums.index_add(-2, torch.as_tensor(class_ids, device=features.device), features))


def pair_with_images(texts: Batch, images: Tensor) -> Batch:
    """Returns every text [R] with each of the images [B, F]: B * R rows, grouped by image."""
    rows = list(range(len(texts))) * len(images)
    return replace(texts.only(rows), image_features=images.repeat_interleave(len(texts), dim=0))


def prompt_hash(prompt: SoftPrompt) -> str:
    """Returns a hash of all that a prompt adds to a text."""
    tensors = {"tokens": prompt.tokens, "mask": prompt.token_mask, "shift": prompt.shift}
    named = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    named |= {f"deep.{layer}": states for layer, states in prompt.deep.items()}
    named |= {f"kv_mask.{kind}": mask for kind, mask in prompt.kv_mask.items()}
    for kind, layers in prompt.kv.items():
        for layer, (key, value) in layers.items():
            named |= {f"{kind}.{layer}.key": key, f"{kind}.{layer}.value": value}
    return hash_tensors(named) + str(prompt.blocks)
