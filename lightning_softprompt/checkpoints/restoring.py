"""A trained method from its file, whichever it is."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from lightning import LightningModule
from lightning.pytorch.cli import instantiate_module
from torch import Tensor

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.checkpoints.files import SavedPrompt
from lightning_softprompt.types import Batch, SoftPrompt

NOT_ARGUMENTS = ("_instantiator", "replicas")


class Restored(Protocol):
    """As much of a method as is asked of one that comes from a file."""

    changes_backbone: bool

    @property
    def loaded(self) -> Backbone:
        """Its backbone."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of its tasks, if there are several."""

    def configure_model(self) -> None:
        """Loads the backbone."""

    def attach(self, backbone: Backbone, seed: int | None = None) -> None:
        """Takes one that is loaded."""

    def prompt(self, batch: Batch) -> SoftPrompt:
        """The soft prompt of a batch."""

    def fold(self, task: int | None = None) -> SoftPrompt:
        """The prompt that every row gets."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any:
        """Takes what was trained."""

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Whether it is trained further."""

    def eval(self) -> Any:
        """Leaves training."""


def restored(saved: SavedPrompt, path: Path, backbone: Backbone | None = None) -> Restored:
    """The method as it was trained, ready to give prompts, on its backbone or on one that is loaded already.

    Raises:
        ValueError: If the file does not say which method it is of, the backbone is another or cannot be loaded, or
            what was trained are the weights of the backbone.
    """
    if "_class_path" not in saved.method:
        raise ValueError(f"{path} does not say which method it is of")
    arguments = {name: value for name, value in saved.method.items() if name not in NOT_ARGUMENTS}
    try:
        module = cast(Restored, instantiate_module(LightningModule, arguments))
    except (ArgumentError, ValueError) as error:  # such as a class that is no method, which is never called
        raise ValueError(f"{path} does not say how it is built in a way that this version knows: {error}") from error
    if backbone is None:
        module.configure_model()
    else:
        saved.check(backbone, path)
        if module.changes_backbone:
            raise ValueError(f"{path} holds weights of the backbone, which cannot be shared; take a soft prompt")
        module.attach(backbone)
    saved.check(module.loaded, path)
    module.load_state_dict(saved.tensors)
    module.eval()
    return module


def readout_of(saved: SavedPrompt) -> dict[str, Tensor]:
    """What the readout learnt that was trained with a prompt."""
    return {name.removeprefix("readout."): t for name, t in saved.tensors.items() if name.startswith("readout.")}
