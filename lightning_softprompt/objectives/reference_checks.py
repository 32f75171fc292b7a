"""Checks of objectives that compare the trained prompt with a frozen reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_softprompt.checkpoints.frozen_role import BARE, START


def check_reference(objective: str, reference: str, method: str, changes_backbone: bool, noise: Sequence[str]) -> None:
    """Checks, before training, that a method can be compared with a reference.

    Args:
        objective: Name of the objective.
        reference: `start`, `bare`, or the file of a trained prompt.
        method: Name of the method.
        changes_backbone: Whether the method changes the backbone's weights.
        noise: The options that add noise to the prompt in training and are set.

    Raises:
        ValueError: If it cannot.
    """
    if noise:
        raise ValueError(f"{objective} compares the policy with a reference without noise; set {noise[0]} to 0")
    if reference == START:
        return
    if changes_backbone:
        raise ValueError(
            f"{method} changes the backbone, which the reference {reference} of {objective} would share; set the "
            "reference to start"
        )
    if reference != BARE and not Path(reference).expanduser().is_file():
        raise ValueError(
            f"the reference of {objective} must be start, bare, or the file of a trained prompt, and there is no file "
            f"{reference}"
        )
