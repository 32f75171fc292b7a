"""What a method needs of a backbone, checked before a run leaves anything on disk.

A requirement is a function that raises where a backbone does not have what it takes. Methods list theirs; a new one is
a function here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.generation.path_trial import STEPS
from lightning_softprompt.backbones.loading import try_out
from lightning_softprompt.backbones.skeleton import build_small_copy, load_config, random_batch
from lightning_softprompt.backbones.small_copy import divisors, max_shrink_factor
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.refusals import FAILURES, UnsupportedBackboneError, explaining, reason_of
from lightning_softprompt.core.types import SoftPrompt

Requirement = Callable[[Backbone], None]
TOKENS = 8  # of the rows that a copy runs
WIDTHS_TRIED = 3


def takes_soft_tokens(backbone: Backbone) -> None:
    """Rows with soft tokens run, forward and backward."""
    with explaining(f"rows with soft tokens do not run in {backbone.spec.dtype}"):
        batch = random_batch(backbone, 2, TOKENS)
        tokens = backbone.embed(batch.input_ids[:1, :2]).detach().requires_grad_()
        states = backbone.states(batch, SoftPrompt(tokens=tokens))
        torch.autograd.grad(states.hidden.float().sum(), tokens)


def takes_keys_and_values(backbone: Backbone) -> None:
    """The attentions of all layers can be given keys and values."""
    with explaining("its attentions do not run with keys and values from outside"):
        backbone.check_attentions()


def takes_late_tokens(backbone: Backbone) -> None:
    """Soft tokens can enter before a middle layer."""
    with explaining("soft tokens do not enter before a middle layer of it"):
        backbone.check_late_tokens()


def generates(beams: int = 1) -> Requirement:
    """A requirement: rows generate answers that agree with the forward pass of each row alone.

    Args:
        beams: How many beams a row has.
    """

    def generates_answers(backbone: Backbone) -> None:
        if not backbone.codec.stop:  # which the data module refuses, with what to do
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
        requirements: Of the method.
        method: Its name.
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
    """Refuses a backbone by what a small random copy of it does, before its weights are loaded.

    A copy that cannot be built decides nothing: the backbone itself is checked when it is loaded.

    Raises:
        ValueError: If there is no such backbone, or the method cannot use it.
    """
    if not requirements:
        return
    config = load_config(spec)
    attention = None if spec.attention == "flash_attention_2" else spec.attention
    plain = replace(spec, attention=attention)
    plain = replace(plain, dtype="float32") if spec.dtype == "float16" else plain  # which CPUs have no products in
    refusals: list[ValueError] = []
    for by in divisors(max_shrink_factor(config))[:WIDTHS_TRIED]:
        try:
            copy = build_small_copy(config, plain, by)
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
