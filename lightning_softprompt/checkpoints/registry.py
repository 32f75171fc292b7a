"""Which classes a file may name; any other name is refused before anything is imported or called."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any, cast

from lightning.pytorch.cli import ReduceLROnPlateau
from torch import optim
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

import lightning_softprompt
from lightning_softprompt.moved import current_path
from lightning_softprompt.system.trust import is_standard, is_trusted

PACKAGE = "lightning_softprompt"
PLUGIN_FOLDERS = (
    "callbacks", "data", "distributed", "evaluation", "methods", "objectives", "prompts", "rag", "readouts",
    "retrieval",
)  # fmt: skip
BASES = (
    "callbacks.algorithms.consolidation.Consolidation",
    "callbacks.algorithms.corruption_probe.CorruptionProbe",
    "callbacks.algorithms.pruning.Pruning",
    "data.datamodule.SoftPromptDataModule",
    "data.sampling.task_mixing.Sampling",
    "evaluation.base.Evaluation",
    "methods.base.SoftPromptModule",
    "objectives.base.Objective",
    "objectives.penalties.Penalty",
    "prompts.task_factors.FactorStart",
    "prompts.init.Init",
    "prompts.kv_prefix.KeysValuesInit",
    "readouts.base.Readout",
    "retrieval.search.fusion.Fusion",
    "retrieval.reranker.Reranker",
    "retrieval.retriever.Retriever",
    "distributed.strategy.ShardedStrategy",
)


def find_class(path: object) -> type:
    """The class of an import path that a file names.

    Raises:
        ValueError: If files may not name it, with the option that allows it where there is one.
    """
    check_class(path)
    named = current_path(cast(str, path))
    if named in (torch_classes := _torch_classes()):
        return torch_classes[named]
    if named.partition(".")[0] == PACKAGE:
        return _package_class(named)
    if is_trusted(named):
        return _trusted_class(named)
    raise ValueError(
        f"it names {_short(named)}, which is neither a plug-in of this package nor an optimizer or scheduler of "
        f"PyTorch. If you trust that module, give --trust {named.rpartition('.')[0] or named}"
    )


def check_class(path: object) -> None:
    """Refuses a name that no plug-in, optimizer or scheduler can have, such as a function of the standard library.

    Raises:
        ValueError: Naming it.
    """
    if not isinstance(path, str) or not all(part.isidentifier() for part in path.split(".")):
        raise ValueError(f"expected the import path of a class, got {_short(path)}")
    if path in _torch_classes():
        return
    if is_standard(path) or path.partition(".")[0] == "torch":
        raise ValueError(f"it names {_short(path)}, which is not a plug-in, an optimizer or a scheduler")
    if path.partition(".")[0] == PACKAGE:
        _package_class(current_path(path))


@cache
def _torch_classes() -> dict[str, type]:
    """Optimizers and schedulers by each of their import paths."""
    schedulers = (*vars(lr_scheduler).values(), ReduceLROnPlateau)
    known: dict[str, type] = {}
    for cls, base, home in (
        *((value, Optimizer, "torch.optim") for value in vars(optim).values()),
        *((value, LRScheduler, "torch.optim.lr_scheduler") for value in schedulers),
    ):
        if isinstance(cls, type) and issubclass(cls, base):
            shown = home if cls.__module__.startswith("torch") else cls.__module__
            known |= {f"{shown}.{cls.__name__}": cls, f"{cls.__module__}.{cls.__qualname__}": cls}
    return known | {"pytorch_lightning.cli.ReduceLROnPlateau": ReduceLROnPlateau}


def _trusted_class(path: str) -> type:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name, None)
    except ImportError as error:
        raise ValueError(f"it names {path}, and the module {module} cannot be imported: {error}") from error
    if not isinstance(found, type):
        raise ValueError(f"it names {path}, which is not a class")
    return found


def _package_class(path: str) -> type:
    """A plug-in of this package; the path may also lead through a folder or the package that exports it."""
    module, _, name = path.rpartition(".")
    place = module.split(".")[1:2]
    found = None
    if module == PACKAGE and name in lightning_softprompt.__all__:
        found = getattr(lightning_softprompt, name)
    elif place and place[0] in PLUGIN_FOLDERS:
        try:
            found = getattr(import_module(module), name, None)
        except ModuleNotFoundError:
            found = None
    if isinstance(found, type) and is_plugin(found):
        return found
    raise ValueError(f"it names {path}, which is not a plug-in of this version of the package")


def is_plugin(cls: type) -> bool:
    """Whether a class is defined in a plug-in folder of this package, as a subclass of one of the package's bases."""
    package, _, rest = cls.__module__.partition(".")
    if package != PACKAGE or rest.partition(".")[0] not in PLUGIN_FOLDERS:
        return False
    return issubclass(cls, _bases())


@cache
def _bases() -> tuple[type, ...]:
    return tuple(package_base(path) for path in BASES)


def package_base(path: str) -> type:
    """One of the package's base classes; it is imported here because its module imports this one."""
    module, _, name = path.rpartition(".")
    found: type = getattr(import_module(f"{PACKAGE}.{module}"), name)
    return found


def class_path(cls: type) -> str:
    """The import path that names a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def resolve_class_paths(value: Any) -> Any:
    """Plain values whose class paths are those of the definitions, so that two names of a class compare equal."""
    if isinstance(value, Mapping):
        return {
            key: _definition(inner) if key in ("class_path", "_class_path") else resolve_class_paths(inner)
            for key, inner in value.items()
        }
    return [resolve_class_paths(inner) for inner in value] if isinstance(value, list) else value


def _definition(path: Any) -> Any:
    try:
        return class_path(find_class(path))
    except ValueError:  # a class of the user's, which only the command line may name
        return path


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
