"""Requirements of methods on backbones, which are checked before a run writes anything to disk.

A requirement is a function that raises an error if a backbone does not meet it. Each method lists its requirements; a
new one is a function in this module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.generation.path_trial import STEPS
from lightning_softprompt.backbones.loading import try_out
from lightning_softprompt.backbones.skeleton import Skeleton, random_batch
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.refusals import FAILURES, UnsupportedBackboneError, explaining, reason_of
from lightning_softprompt.core.types import SoftPrompt

Requirement = Callable[[Backbone], None]
TOKENS = 8  # tokens of the rows on which a copy is tested
WIDTHS_TRIED = 3


def takes_soft_tokens(backbone: Backbone) -> None:
    """Requires that rows with soft tokens run, forward and backward."""
    with explaining(f"rows with soft tokens do not run in {backbone.spec.dtype}"):
        batch = random_batch(backbone, 2, TOKENS)
        tokens = backbone.embed(batch.input_ids[:1, :2]).detach().requires_grad_()
        values = backbone.try_prompt(batch, SoftPrompt(tokens=tokens))
        torch.autograd.grad(values.float().sum(), tokens)


def takes_keys_and_values(backbone: Backbone) -> None:
    """Requires that the attentions of all layers accept additional keys and values."""
    with explaining("its attentions do not run with additional keys and values"):
        backbone.check_attentions()


def takes_late_tokens(backbone: Backbone) -> None:
    """Requires that soft tokens can enter before a middle layer."""
    with explaining("soft tokens do not enter before a middle layer of it"):
        backbone.check_late_tokens()


def generates(beams: int = 1) -> Requirement:
    """Requires that rows generate answers that agree with the forward pass of each row alone.

    Args:
        beams: Number of beams of a row.
    """

    def generates_answers(backbone: Backbone) -> None:
        if not backbone.codec.stop:  # the data module refuses it, and explains what to do
            return
        with explaining("it does not generate answers"):
            batch = random_batch(backbone, 2, TOKENS)
            tokens = backbone.embed(batch.input_ids[:1, :2]).detach()
            options = {"num_beams": beams} if beams > 1 else {}
            backbone.generate(
                backbone.without_answers(batch), SoftPrompt(tokens=tokens), max_new_tokens=STEPS, **options
            )

    return generates_answers


def require(requirements: Sequence[Requirement], method: str, backbone: Backbone) -> None:
    """Refuses a backbone that a method cannot use.

    Args:
        requirements: The requirements of the method.
        method: Name of the method.
        backbone: The backbone, or a small copy of it.

    Raises:
        UnsupportedBackboneError: Naming both, with the reason.
    """
    for requirement in requirements:
        try:
            requirement(backbone)
        except torch.OutOfMemoryError:
            raise
        except FAILURES as error:
            model = type(backbone.model).__name__
            raise UnsupportedBackboneError(
                f"{method} cannot use backbone {backbone.spec.name!r} ({model}): {reason_of(error)}"
            ) from error


def require_of_copy(requirements: Sequence[Requirement], method: str, spec: BackboneSpec) -> None:
    """Refuses a backbone if a small random copy of it does not meet the requirements, before its weights are loaded.

    If no copy can be built, nothing is refused: the backbone itself is checked when it is loaded.

    Raises:
        ValueError: If there is no such backbone, or the method cannot use it.
    """
    if not requirements:
        return
    skeleton = Skeleton(_spec_for_cpu(spec))
    refusals: list[ValueError] = []
    for factor in skeleton.shrink_factors[:WIDTHS_TRIED]:
        try:
            copy = skeleton.small_copy(factor)
            try_out(copy)  # embeddings enter it as they enter the backbone
        except UnsupportedBackboneError:
            continue
        try:
            require(requirements, method, copy)
            return
        except UnsupportedBackboneError as refusal:
            refusals.append(refusal)
    if refusals:
        raise refusals[-1]


def _spec_for_cpu(spec: BackboneSpec) -> BackboneSpec:
    """Returns the spec without what requires a GPU: FlashAttention, and float16, in which CPUs have no products."""
    attention = None if spec.attention == "flash_attention_2" else spec.attention
    dtype = "float32" if spec.dtype == "float16" else spec.dtype
    return replace(spec, attention=attention, dtype=dtype)
