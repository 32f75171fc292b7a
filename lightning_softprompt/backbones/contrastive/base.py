"""`ContrastiveBackbone`: what CLIP and SigLIP share. They embed images and texts, and compare them by similarity."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, ClassVar, NoReturn, cast, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.execution.context_cache import ContextCache
from lightning_softprompt.backbones.execution.lm_head import States
from lightning_softprompt.backbones.insertion.attention_probe import AttentionProbe
from lightning_softprompt.backbones.insertion.key_values import NAME, Sites, keys_and_values_of, sites_of
from lightning_softprompt.backbones.insertion.layers import layers_of
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.refusals import UnsupportedBackboneError
from lightning_softprompt.core.types import Batch, SoftPrompt


@final
class ContrastiveCodec(Codec):
    """The answer is a part of the text: the name of a class, in the text that images are compared with."""

    answer_location = "inside"
    reads_images = True

    @property
    def stop(self) -> tuple[int, ...]:
        """Empty, since these models generate no text."""
        return ()

    def assemble(self, before: Sequence[int], after: Sequence[int], answer: Sequence[int]) -> tuple[list[int], range]:
        """The answer between the text before and after it."""
        return [*before, *answer, *after], range(len(before), len(before) + len(answer))


class ContrastiveBackbone(Backbone, ABC):
    """A frozen model with a tower of layers for texts and one for images. It predicts no words.

    The soft prompt enters the text tower at the slots of a text, and the image tower after the patches. The logit of an
    image and a text is their cosine similarity, times the scale that the model learned.

    Args:
        model: The transformers model.
        codec: Converts texts to tokens.
        spec: The specification it was loaded from.
    """

    codec_class = ContrastiveCodec
    has_lm_head: ClassVar[bool] = False

    def __init__(self, model: PreTrainedModel, codec: Codec, spec: BackboneSpec) -> None:
        vars(model)["headless"] = True
        super().__init__(model, codec, spec)
        self.contexts = ContextCache(spec.context_memory << 20)  # features of images
        self.stack.set_attn_implementation(NAME)

    @abstractmethod
    def _pooled_text(self, batch: Batch, prompt: SoftPrompt) -> Tensor:
        """[B, F] features of texts before normalization."""

    @property
    def stack(self) -> PreTrainedModel:
        """The text tower."""
        return cast(PreTrainedModel, self.model.text_model)

    @property
    def image_tower(self) -> PreTrainedModel:
        """The image tower."""
        return cast(PreTrainedModel, self.model.vision_model)

    @property
    def word_embeddings(self) -> Tensor:
        """The frozen embedding table [V, H] of the text tower."""
        return cast(Tensor, self.stack.get_input_embeddings().weight)

    @property
    def image_hidden_size(self) -> int:
        """Size of the states of the image tower."""
        return int(self.image_tower.config.hidden_size)

    @property
    def image_depth(self) -> int:
        """Layers of the image tower."""
        return len(self.image_layers)

    @property
    def image_layers(self) -> nn.ModuleList:
        """The layers of the image tower."""
        return _layers(self.image_tower)

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return int(self.image_tower.config.patch_size)

    @property
    def image_size(self) -> tuple[int, int]:
        """Channels, and the side of an image in pixels."""
        config = self.image_tower.config
        return int(config.num_channels), int(config.image_size)

    @cached_property
    def feature_size(self) -> int:
        """F, the size of the features of images and texts."""
        channels, side = self.image_size
        weight = next(self.image_tower.parameters())
        with torch.no_grad():
            return self._image_features(weight.new_zeros(1, channels, side, side), SoftPrompt()).shape[1]

    @cached_property
    def attentions(self) -> dict[str, Sites]:
        """The attentions of the text tower. They are numbered, by which packed rows find their keys and values."""
        sites = sites_of(self.stack)
        for number, module in enumerate(sites["self"].modules):
            vars(module)["layer_idx"] = number
        return sites

    def keys_and_values(self, ids: Tensor) -> dict[str, Tensor]:
        """See `Backbone.keys_and_values`."""
        return keys_and_values_of(self.stack, self.attentions, ids)

    def text_features(self, batch: Batch, prompt: SoftPrompt | None = None) -> Tensor:
        """Normalized features [B, F] of texts with their soft prompt.

        Raises:
            ValueError: If a row is longer than the window, or the prompt enters at a middle layer only.
        """
        prompt = prompt or SoftPrompt()
        if prompt.hidden:
            self.check_late_tokens()
        return normalize(self._pooled_text(batch, prompt))

    def image_features(self, batch: Batch, prompt: SoftPrompt | None = None) -> Tensor:
        """Normalized features [B, F] of images.

        Without a prompt of the image tower, they are computed once for each image and cached for all epochs.

        Args:
            batch: Rows with images.
            prompt: The prompt of the image tower.

        Raises:
            ValueError: If the rows have no images.
        """
        if batch.images is None:
            raise ValueError("rows require images, as ImageClassificationDataModule reads them")
        if prompt is not None:
            return self._image_features(batch.images, prompt)
        if not batch.image_keys or not self.contexts.is_enabled:
            return self._image_features(batch.images, SoftPrompt())
        return self._cached_features(batch.images, batch.image_keys)

    def _cached_features(self, images: Tensor, keys: Sequence[str]) -> Tensor:
        missing = [row for row, key in enumerate(keys) if key not in self.contexts.entries]
        computed: dict[str, Tensor] = {}
        if missing:
            with torch.inference_mode(False), torch.no_grad():  # a later training step reads them, too
                features = self._image_features(images[missing].clone(), SoftPrompt())
                computed = {keys[row]: feature.clone() for row, feature in zip(missing, features, strict=True)}
        rows = [computed[key] if key in computed else self.contexts.entries[key] for key in keys]
        for key, row in zip(keys, rows, strict=True):
            self.contexts.get(key, lambda row=row: row)  # type: ignore[misc]
        return torch.stack(rows)

    def _image_features(self, images: Tensor, prompt: SoftPrompt) -> Tensor:
        with self._with_image_prompt(prompt):
            model: Any = self.model
            pooled = model.get_image_features(pixel_values=images.to(model.dtype)).pooler_output
        return normalize(pooled)

    @contextmanager
    def _with_image_prompt(self, prompt: SoftPrompt) -> Iterator[None]:
        """Adds soft tokens after the patches within the context, and replaces their states before some layers.

        Raises:
            ValueError: If the prompt has other parts.
        """
        if prompt.kv or prompt.hidden or prompt.shift is not None:
            raise ValueError("a prompt of the image tower consists of soft tokens and states that replace them")
        handles = []
        if prompt.tokens is not None:
            embeddings = cast(nn.Module, self.image_tower.embeddings)
            handles.append(embeddings.register_forward_hook(partial(_append, tokens=prompt.tokens)))
        for layer, states in prompt.deep.items():
            replace_states = partial(_replace_last, states=states)
            handles.append(self.image_layers[layer].register_forward_pre_hook(replace_states))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def scores(self, images: Tensor, texts: Tensor) -> Tensor:
        """Logits [B, C] of images [B, F] and texts [C, F], or [B, C, F] if each image has texts of its own."""
        similarity = torch.einsum("bf,cf->bc" if texts.dim() == 2 else "bf,bcf->bc", images, texts)
        scale = cast(Tensor, self.model.logit_scale).exp()
        return similarity * scale.to(similarity)

    @contextmanager
    def replace_soft_states(self, deep: Mapping[int, Tensor], origin: Tensor, rows: Tensor) -> Iterator[None]:
        """Replaces the states of soft tokens before some layers of the text tower within the context.

        Args:
            deep: [B|1, P, H] states by layer.
            origin: [1|B, M] index of the soft token at each position; -1 at other tokens.
            rows: [1|B, M] row of the batch that each position belongs to.
        """
        is_soft = (origin >= 0)[..., None]
        handles = []
        for layer, states in deep.items():
            row = rows.clamp(max=len(states) - 1)
            hook = partial(_replace_where, is_soft=is_soft, states=states[row, origin.clamp(min=0)])
            handles.append(_layers(self.stack)[layer].register_forward_pre_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def try_prompt(self, batch: Batch, prompt: SoftPrompt) -> Tensor:
        """See `Backbone.try_prompt`."""
        return self.text_features(batch, prompt)

    def allow_changes(self) -> None:
        """See `FrozenModel.allow_changes`. Features of images are not cached."""
        super().allow_changes()
        self.contexts.is_enabled = False

    def sampled_fingerprint(self) -> str:
        """The fingerprint, since earlier versions had no backbones of this family."""
        return self.fingerprint()

    def check_late_tokens(self) -> None:
        """Refuses soft tokens at a middle layer.

        Raises:
            ValueError: Always.
        """
        raise ValueError("backbones of images and texts do not support soft tokens at a middle layer only; use MaPLe")

    def states(self, batch: Batch, prompt: SoftPrompt | None = None, columns: Tensor | None = None) -> States:
        """Raises an error, since these models predict no words.

        Raises:
            ValueError: Always.
        """
        self._refuse_words()

    def run_padded(self, batch: Batch, prompt: SoftPrompt | None) -> States:
        """See `states`."""
        self._refuse_words()

    def run_probed(self, probe: AttentionProbe, batch: Batch, prompt: SoftPrompt | None, groups: Tensor) -> States:
        """See `states`."""
        self._refuse_words()

    def generate(self, batch: Batch, prompt: SoftPrompt | None = None, **decoding: Any) -> Tensor:
        """See `states`."""
        self._refuse_words()

    def _refuse_words(self) -> NoReturn:
        raise ValueError(
            f"{self.spec.name} compares images with texts and predicts no words; use ImageClassificationDataModule, "
            "whose readout is ClassTexts"
        )

    def adopt_path_of(self, small_copy: Any) -> None:
        """See `Backbone.adopt_path_of`."""
        self.use_entry(small_copy.entry)


def contrastive(backbone: Backbone) -> ContrastiveBackbone:
    """Returns a backbone that compares images with texts. It also is the requirement of methods for images.

    Raises:
        UnsupportedBackboneError: If it is another one.
    """
    if isinstance(backbone, ContrastiveBackbone):
        return backbone
    raise UnsupportedBackboneError("it reads no images; use a backbone such as openai/clip-vit-base-patch16")


def reads_images(backbone: Backbone) -> None:
    """Requires a backbone that compares images with texts."""
    contrastive(backbone)


def normalize(features: Tensor) -> Tensor:
    """Divides features [B, F] by their norm, in float32 or better."""
    precise = features.to(torch.promote_types(features.dtype, torch.float32))
    return precise / precise.norm(dim=-1, keepdim=True)


def _layers(tower: nn.Module) -> nn.ModuleList:
    parent, name = layers_of(tower)
    return cast(nn.ModuleList, getattr(parent, name))


def _append(_: nn.Module, args: tuple[Any, ...], out: Tensor, tokens: Tensor) -> Tensor:
    return torch.cat([out, tokens.to(out).expand(len(out), -1, -1)], dim=1)


def _replace_last(_: nn.Module, args: tuple[Any, ...], states: Tensor) -> tuple[Any, ...]:
    hidden = args[0]
    kept = hidden[:, : hidden.shape[1] - states.shape[1]]
    return torch.cat([kept, states.to(hidden).expand(len(hidden), -1, -1)], dim=1), *args[1:]


def _replace_where(_: nn.Module, args: tuple[Any, ...], is_soft: Tensor, states: Tensor) -> tuple[Any, ...]:
    return torch.where(is_soft, states.to(args[0]), args[0]), *args[1:]
