"""`Roles`: several methods on one backbone, such as replicas, the prompts of several tasks, or teachers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, final

from torch import nn

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.checkpoints.prompt_file import SavedPrompt, read_prompt
from lightning_softprompt.checkpoints.restore import LoadedMethod, load_method


@final
class Roles(nn.ModuleDict):
    """Methods by name that share one backbone.

    The state dict has the tensors of each method under its name, without the backbone. As a child of a module, the
    roles move between devices and are saved with it; a part that is not to be saved with a module holds them in a
    plain container.
    """

    def __getitem__(self, name: str) -> Any:
        """Returns a method by its name."""
        return super().__getitem__(name)

    @property
    def methods(self) -> Sequence[Any]:
        """The methods, in the order in which they were added."""
        return tuple(self.values())

    def attach(self, backbone: Backbone, seeds: Sequence[int]) -> None:
        """Creates the prompt of each method on a loaded backbone.

        Args:
            backbone: The backbone.
            seeds: Seeds of the initial parameters, one for each method.
        """
        for method, seed in zip(self.methods, seeds, strict=True):
            method.attach(backbone, seed)

    def load(self, name: str, path: Path, backbone: Backbone, trains: bool = True) -> SavedPrompt:
        """Adds the method of a file on a loaded backbone.

        Args:
            name: The role.
            path: `prompt.safetensors` or a checkpoint.
            backbone: The backbone.
            trains: Whether the method is trained further.

        Returns:
            The content of the file.

        Raises:
            ValueError: If the file cannot be loaded on this backbone, see `load_method`.
        """
        saved = read_prompt(path)
        method: LoadedMethod = load_method(saved, path, backbone)
        if not trains:
            method.requires_grad_(False)
        self[name] = cast(nn.Module, method)
        return saved
