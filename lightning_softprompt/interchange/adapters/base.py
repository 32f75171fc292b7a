"""`AdapterKind`: how a kind of PEFT adapter becomes a prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.interchange.adapter_folder import AdapterFolder

FOLDED = "lightning_softprompt.methods.trained.folded.Folded"


@dataclass(frozen=True)
class ImportedMethod:
    """The method of an imported adapter.

    Args:
        class_path: Class of the method.
        arguments: Its arguments, as plain values.
        tensors: Its trained tensors by name.
        tasks: Names of its tasks, if there are several.
    """

    class_path: str
    arguments: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    tasks: tuple[str, ...] = ()


class AdapterKind(ABC):
    """How a kind of PEFT adapter becomes a prompt.

    A subclass is one file, listed in `interchange/adapters/__init__.py`.

    Attributes:
        peft_types: Values of `peft_type` in `adapter_config.json`.
        precedes_start_token: Whether PEFT puts the prompt before the token that starts the text.
    """

    peft_types: tuple[str, ...]
    precedes_start_token: bool

    @abstractmethod
    def convert(self, adapter: AdapterFolder, backbone: Backbone, task_names: Sequence[str]) -> ImportedMethod:
        """Returns the method of an adapter.

        Args:
            adapter: The adapter.
            backbone: The backbone that it was trained on.
            task_names: Names of the tasks in order, from the user; empty for their numbers.

        Raises:
            ValueError: If the adapter does not match the backbone, or cannot be represented.
        """
