"""Loading of a trained method from its file."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import lightning.pytorch.cli
from torch import Tensor

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.checkpoints.arguments import (
    PLAIN,
    Spec,
    build,
    check_names,
    check_plain,
    read_arguments,
    read_class,
)
from lightning_softprompt.checkpoints.prompt_file import SavedPrompt, are_tensors, load_checkpoint
from lightning_softprompt.checkpoints.registry import PACKAGE, class_path, package_base
from lightning_softprompt.checkpoints.sizes import check_numbers, limit_build
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.system.trust import trust_modules

NOT_ARGUMENTS = ("_class_path", "_instantiator", "replicas", "evaluation", "data")
TRAINING_ONLY = ("optimizer", "scheduler", "objective", "penalties", "penalty_weights", "prompt_dropout")


class LoadedMethod(Protocol):
    """The part of a method that code uses after loading it from a file."""

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


def load_method(
    saved: SavedPrompt, path: Path, backbone: Backbone | None = None, trust: Iterable[str] = ()
) -> LoadedMethod:
    """Loads a trained method, ready to compute prompts, on its backbone or on a loaded one.

    Neither optimizer nor schedule nor loss is built: `load_from_checkpoint` gives a method that can be trained further.

    Args:
        saved: What the file holds.
        path: The file.
        backbone: One that is loaded already; None loads the one that the file names.
        trust: Modules of further classes that the file may name.

    Raises:
        ValueError: If the file names classes that files may not name or does not describe a method, the backbone is
            another or cannot be loaded, or what was trained are the weights of the backbone.
    """
    with trust_modules(trust):
        spec = read_method(saved.method, path, TRAINING_ONLY)
    if backbone is not None:
        saved.check(backbone, path)
    check_sizes(spec, saved.tensors, path)
    module = cast(LoadedMethod, construct(spec, path))
    limit_build(module, saved.tensors, path)
    if backbone is None:
        module.configure_model()
    elif module.changes_backbone:
        raise ValueError(f"{path} holds weights of the backbone, which cannot be shared; take a soft prompt")
    else:
        module.attach(backbone)
    saved.check(module.loaded, path)
    load_tensors(module, saved.tensors, path)
    module.eval()
    return module


def read_method(
    method: Mapping[str, Any], path: Path | str, leave_out: Iterable[str] = (), base: type | None = None
) -> Spec:
    """The method that a file describes, with all of its arguments checked; nothing is created.

    Args:
        method: `_class_path` and arguments.
        path: The file.
        leave_out: Arguments that are not needed.
        base: The method must be this class or a subclass of it; None takes any method.

    Raises:
        ValueError: Naming the file and the value that is wrong.
    """
    if "_class_path" not in method:
        raise ValueError(f"{path} does not name its method")
    left_out = {*NOT_ARGUMENTS, *leave_out}
    try:
        check_plain(method, "its description of the method")
        arguments = {name: value for name, value in method.items() if name not in left_out}
        for name in left_out & set(method):
            check_names(method[name], name)
        if base is not None and method["_class_path"] == class_path(base):
            return read_arguments(base, arguments, "")
        described = {"class_path": method["_class_path"], "init_args": arguments}
        return read_class(described, base or _method_base(), "")
    except ValueError as error:
        raise ValueError(f"{path} cannot be loaded: {str(error).removeprefix(': ')}") from error


def construct(spec: Spec, path: Path | str, given: Mapping[str, Any] | None = None) -> Any:
    """The object that checked arguments describe.

    Args:
        spec: Class and arguments.
        path: The file that they are from.
        given: Arguments of the caller, which take precedence.

    Raises:
        ValueError: If the class refuses them.
    """
    try:
        built = {name: build(value) for name, value in spec.arguments.items()}
        return spec.cls(**{**built, **(given or {})})
    except Exception as error:  # whatever a constructor raises on values that pass the check of their types
        raise ValueError(f"{path} cannot be loaded: {spec.cls.__name__}: {error}") from error


def load_tensors(module: Any, tensors: Mapping[str, Tensor], path: Path | str, strict: bool = True) -> None:
    """Puts what was trained into a method.

    Raises:
        ValueError: If names or shapes are not those that the file's own description leads to.
    """
    try:
        module.load_state_dict(tensors, strict=strict)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} holds other tensors than its method requires: {reason}") from error


def _method_base() -> type:
    return package_base("methods.base.SoftPromptModule")


def load_module(
    cls: type, path: Path | str, trust: Iterable[str], given: Mapping[str, Any], **loading: Any
) -> tuple[Any, dict[str, Any]]:
    """What `load_from_checkpoint` of a method needs: the module before its backbone is loaded, and the checkpoint.

    Args:
        cls: The class that was asked; the class of the checkpoint is this one or a subclass.
        path: The checkpoint.
        trust: Modules of further classes that the checkpoint may name, in addition to that of `cls`.
        given: Arguments of the caller.
        loading: See `load_checkpoint`.

    Raises:
        ValueError: See `read_method` and `load_checkpoint`.
    """
    checkpoint = load_checkpoint(Path(path), **loading)
    method = checkpoint.get("hyper_parameters", {})
    if not isinstance(method, Mapping):
        raise ValueError(f"{path} does not say which method it is of")
    with trust_modules([*trust, *_module_of(cls)]):
        spec = read_method(method, path, given, cls)
    tensors = cast(Mapping[str, Tensor], checkpoint.get("state_dict"))
    if not are_tensors(tensors):
        raise ValueError(f"{path} holds no tensors in its state_dict")
    check_sizes(spec, tensors, path)
    return construct(spec, path, given), checkpoint


def check_sizes(spec: Spec, tensors: Mapping[str, Tensor], path: Path | str) -> None:
    """Refuses whole numbers in a description that are larger than the file could mean.

    Raises:
        ValueError: Naming the file and the option.
    """
    try:
        check_numbers(spec, tensors)
    except ValueError as error:
        raise ValueError(f"{path} cannot be loaded: {error}") from error


def _module_of(cls: type) -> list[str]:
    """The module of a user's own class: whoever calls it has imported it."""
    return [] if cls.__module__.partition(".")[0] == PACKAGE else [cls.__module__]


def instantiate(class_type: type[Any], config: dict[str, Any]) -> Any:
    """Lightning's `instantiate_module`, by which its `load_from_checkpoint` builds what a checkpoint names.

    jsonargparse calls any function that a value of type `Callable` names, so methods of this package are built here.
    """
    path = config.get("_class_path", class_path(class_type))
    module, _, name = str(path).rpartition(".")
    named = getattr(sys.modules.get(module), name, class_type)
    cls = named if isinstance(named, type) else class_type
    if cls.__module__.partition(".")[0] != PACKAGE and not issubclass(cls, _method_base()):
        return _instantiate_module(class_type, config)
    given = {name: value for name, value in config.items() if not isinstance(value, (*PLAIN, Mapping, list, tuple))}
    with trust_modules(_module_of(cls)):
        spec = read_method({**config, "_class_path": path}, "the checkpoint", given)
    return construct(spec, "the checkpoint", given)


_instantiate_module = lightning.pytorch.cli.instantiate_module
lightning.pytorch.cli.instantiate_module = instantiate  # Lightning looks it up there by name


def readout_tensors(saved: SavedPrompt) -> dict[str, Tensor]:
    """Returns the trained tensors of the readout of a prompt."""
    return {name.removeprefix("readout."): t for name, t in saved.tensors.items() if name.startswith("readout.")}
