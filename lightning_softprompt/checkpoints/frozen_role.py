"""Frozen prompts in addition to the trained prompt of a run: references and teachers on the same backbone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import final

import torch

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.checkpoints.prompt_file import SavedPrompt, weights_identity
from lightning_softprompt.checkpoints.restore import LoadedMethod
from lightning_softprompt.checkpoints.roles import Roles
from lightning_softprompt.core.types import Batch, SoftPrompt

START, BARE = "start", "bare"


class FrozenRole(ABC):
    """A prompt that is not trained, on the backbone of a run. It adds the memory of a prompt, not that of a model."""

    @abstractmethod
    def on(self, lm: PromptedLM) -> AbstractContextManager[tuple[PromptedLM, str]]:
        """Replaces the prompt of a language model within a `with` block.

        Args:
            lm: The language model with the prompt of the run.

        Returns:
            A context of the language model with the frozen prompt, and of a hash of everything that determines it, in
            addition to the backbone.
        """


@final
class BareRole(FrozenRole):
    """The backbone without a prompt."""

    @contextmanager
    def on(self, lm: PromptedLM) -> Iterator[tuple[PromptedLM, str]]:
        """See `FrozenRole.on`."""
        yield lm.with_method(empty_prompt), BARE


@final
class StartRole(FrozenRole):
    """The prompt of the run as it was before the first step."""

    @contextmanager
    def on(self, lm: PromptedLM) -> Iterator[tuple[PromptedLM, str]]:
        """See `FrozenRole.on`."""
        with lm.at_start() as (start, identity):
            yield start, identity


@final
@dataclass(frozen=True)
class SavedRole(FrozenRole):
    """A trained prompt of a file.

    Args:
        method: The method with its tensors.
        saved: The content of the file.
    """

    method: LoadedMethod
    saved: SavedPrompt

    @classmethod
    def load(cls, path: Path, backbone: Backbone) -> SavedRole:
        """Loads a prompt.

        Args:
            path: `prompt.safetensors` or a checkpoint.
            backbone: The backbone of the run.

        Raises:
            ValueError: If the file cannot be loaded on this backbone, see `load_method`.
        """
        roles = Roles()
        saved = roles.load(BARE, path, backbone, trains=False)
        return cls(roles[BARE], saved)

    @property
    def identity(self) -> str:
        """A hash of the tensors."""
        return weights_identity(self.saved.tensors)

    @contextmanager
    def on(self, lm: PromptedLM) -> Iterator[tuple[PromptedLM, str]]:
        """See `FrozenRole.on`."""
        yield lm.with_method(self.method.prompt), digest(self.identity, self.saved.method)


def load_role(name: str, backbone: Backbone) -> FrozenRole:
    """Returns the role of a name: `start`, `bare`, or the file of a prompt.

    Raises:
        ValueError: If the file cannot be loaded on this backbone.
    """
    if name == START:
        return StartRole()
    return BareRole() if name == BARE else SavedRole.load(Path(name), backbone)


def empty_prompt(batch: Batch) -> SoftPrompt:
    """Returns a prompt without any values."""
    return SoftPrompt()


def digest(*values: object) -> str:
    """Computes a hash of values from their representation."""
    return blake2b(repr(values).encode(), digest_size=16).hexdigest()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Returns the type of mixed precision that is active on a device; None if there is none."""
    is_enabled = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if is_enabled else None
