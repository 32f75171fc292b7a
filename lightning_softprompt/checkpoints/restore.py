"""Loads trained methods from files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from torch import Tensor

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.checkpoints.checkpoint_file import are_tensors, load_checkpoint
from lightning_softprompt.checkpoints.initial_values import skip_initial_values
from lightning_softprompt.checkpoints.prompt_file import SavedPrompt
from lightning_softprompt.checkpoints.safe_loading.build_limits import check_numbers, limit_build
from lightning_softprompt.checkpoints.safe_loading.lightning_loading import module_to_trust, replace_instantiate_module
from lightning_softprompt.checkpoints.safe_loading.method_spec import create_method, read_method
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.system.trust import trust_modules

TRAINING_ONLY = (
    "optimizer", "scheduler", "objective", "penalties", "penalty_weights", "prompt_dropout", "embedding_noise",
)  # fmt: skip

replace_instantiate_module()  # also for the `load_from_checkpoint` of methods


class LoadedMethod(Protocol):
    """The interface of a method that was loaded from a file."""

    changes_backbone: bool

    @property
    def loaded(self) -> Backbone:
        """Its backbone."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of its tasks, if there are several."""

    def configure_model(self) -> None:
        """Loads its backbone."""

    def attach(self, backbone: Backbone, seed: int | None = None) -> None:
        """Uses a loaded backbone."""

    def prompt(self, batch: Batch) -> SoftPrompt:
        """Returns the soft prompt of a batch."""

    def fold(self, task: int | None = None) -> SoftPrompt:
        """Returns the prompt that all rows share."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any:
        """Loads trained tensors."""

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Selects whether it is trained further."""

    def eval(self) -> Any:
        """Switches to evaluation mode."""


def load_method(
    saved: SavedPrompt, path: Path, backbone: Backbone | None = None, trust: Iterable[str] = ()
) -> LoadedMethod:
    """Loads a trained method with its backbone, to compute prompts.

    Optimizer, scheduler and objective are not created. To train a method further, use its `load_from_checkpoint`.

    Args:
        saved: The contents of the file.
        path: The file, for messages.
        backbone: A loaded backbone; None to load the one that the file names.
        trust: Modules of further classes that the file may name.

    Raises:
        ValueError: If the file names other classes or does not describe a method, the backbone differs or cannot be
            loaded, or a loaded backbone is passed to a method that changes the weights of its backbone.
    """
    with trust_modules(trust):
        spec = read_method(saved.method, path, TRAINING_ONLY)
    if backbone is not None:
        saved.check(backbone, path)
    check_numbers(spec, saved.tensors, path)
    method = cast(LoadedMethod, create_method(spec, path))
    limit_build(method, saved.tensors, path)
    if backbone is not None and method.changes_backbone:
        raise ValueError(f"{path} contains weights of the backbone, which cannot be shared; use a soft prompt")
    with skip_initial_values():
        if backbone is None:
            method.configure_model()
        else:
            method.attach(backbone)
    saved.check(method.loaded, path)
    load_tensors(method, saved.tensors, path)
    method.eval()
    return method


def load_module(
    cls: type, path: Path | str, trust: Iterable[str], overrides: Mapping[str, Any], **loading: Any
) -> tuple[Any, dict[str, Any]]:
    """Creates the method of a checkpoint for `load_from_checkpoint`, without its backbone and tensors.

    Args:
        cls: The required class or base class of the method.
        path: The checkpoint.
        trust: Modules of further classes that the checkpoint may name, in addition to that of `cls`.
        overrides: Arguments that replace those of the checkpoint.
        loading: See `load_checkpoint`.

    Returns:
        The method and the checkpoint.

    Raises:
        ValueError: See `read_method` and `load_checkpoint`.
    """
    checkpoint = load_checkpoint(Path(path), **loading)
    description = checkpoint.get("hyper_parameters", {})
    if not isinstance(description, Mapping):
        raise ValueError(f"{path} does not describe its method")
    with trust_modules([*trust, *module_to_trust(cls)]):
        spec = read_method(description, path, overrides, cls)
    tensors = cast(Mapping[str, Tensor], checkpoint.get("state_dict"))
    if not are_tensors(tensors):
        raise ValueError(f"{path} has no tensors in its state_dict")
    check_numbers(spec, tensors, path)
    return create_method(spec, path, overrides), checkpoint


def load_tensors(module: Any, tensors: Mapping[str, Tensor], path: Path | str, strict: bool = True) -> None:
    """Loads trained tensors into a method.

    Raises:
        ValueError: If the names or shapes do not match the description of the method in the file.
    """
    try:
        module.load_state_dict(tensors, strict=strict)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} contains other tensors than its method requires: {reason}") from error


def readout_tensors(saved: SavedPrompt) -> dict[str, Tensor]:
    """Returns the trained tensors of the readout of a prompt."""
    prefix = "readout."
    names = [name for name in saved.tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): saved.tensors[name] for name in names}
