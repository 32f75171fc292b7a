"""Which classes a file may name; any other name is refused before anything is imported or called."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, cast

from lightning.pytorch.cli import ReduceLROnPlateau
from torch import optim
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric, classification, text

import lightning_softprompt
from lightning_softprompt.moved import current_path
from lightning_softprompt.system.printable import shorten
from lightning_softprompt.system.trust import is_standard, is_trusted

PACKAGE = "lightning_softprompt"
PLUGIN_FOLDERS = (
    "callbacks", "data", "distributed", "evaluation", "methods", "objectives", "prompts", "rag", "readouts",
    "retrieval", "rewards",
)  # fmt: skip
BASES = (
    "callbacks.algorithms.consolidation.Consolidation",
    "callbacks.algorithms.corruption_probe.CorruptionProbe",
    "callbacks.algorithms.pruning.Pruning",
    "data.corpus.corruption.Corruption",
    "data.augmentation.base.Augmentation",
    "data.curricula.base.Curriculum",
    "data.datamodule.SoftPromptDataModule",
    "data.difficulty.base.Difficulty",
    "data.sampling.task_mixing.Sampling",
    "evaluation.base.Evaluation",
    "methods.base.SoftPromptModule",
    "objectives.base.Objective",
    "objectives.penalties.Penalty",
    "prompts.task_factors.FactorStart",
    "prompts.init.Init",
    "prompts.kv_prefix.KeysValuesInit",
    "prompts.token_rows.base.TokenRowsInit",
    "readouts.base.Readout",
    "rewards.base.Reward",
    "retrieval.search.fusion.Fusion",
    "retrieval.reranker.Reranker",
    "retrieval.retriever.Retriever",
    "distributed.strategy.ShardedStrategy",
)

TEXT_METRICS = (
    "BLEUScore", "CHRFScore", "CharErrorRate", "EditDistance", "ExtendedEditDistance", "MatchErrorRate",
    "TranslationEditRate", "WordErrorRate", "WordInfoLost", "WordInfoPreserved",
)  # fmt: skip


def find_class(path: object) -> type:
    """Returns the class of an import path in a file.

    Raises:
        ValueError: If files may not name the class. The message names the option that allows it, if there is one.
    """
    check_class(path)
    current = current_path(cast(str, path))
    torch_classes = _torch_classes()
    if current in torch_classes:
        return torch_classes[current]
    if current.partition(".")[0] == PACKAGE:
        return _find_plugin(current)
    if is_trusted(current):
        return _import_trusted_class(current)
    raise ValueError(
        f"it names {shorten(current, 200)}, which is neither a plug-in of this package nor an optimizer or scheduler "
        f"of PyTorch. If you trust that module, give --trust {current.rpartition('.')[0] or current}"
    )


def check_class(path: object) -> None:
    """Refuses names that cannot be plug-ins, optimizers or schedulers, such as those of the standard library.

    Raises:
        ValueError: Naming it.
    """
    if not isinstance(path, str) or not all(part.isidentifier() for part in path.split(".")):
        raise ValueError(f"expected the import path of a class, got {shorten(path, 200)}")
    if path in _torch_classes():
        return
    if is_standard(path) or path.partition(".")[0] == "torch":
        raise ValueError(f"it names {shorten(path, 200)}, which is not a plug-in, an optimizer or a scheduler")
    if path.partition(".")[0] == PACKAGE:
        _find_plugin(current_path(path))


def _is_harmless(metric: type) -> bool:
    return metric.__name__.startswith("Multiclass") or metric.__name__ in TEXT_METRICS


@cache
def _torch_classes() -> dict[str, type]:
    """Returns optimizers, schedulers, and metrics of classes and texts, by each of their import paths.

    Other metrics are not registered, because some of them load models or download files.
    """
    classes = {**_subclasses(optim, Optimizer), **_subclasses(lr_scheduler, LRScheduler)}
    metrics = {**_subclasses(classification, Metric), **_subclasses(text, Metric)}
    classes |= {path: metric for path, metric in metrics.items() if _is_harmless(metric)}
    classes[class_path(ReduceLROnPlateau)] = ReduceLROnPlateau
    classes["pytorch_lightning.cli.ReduceLROnPlateau"] = ReduceLROnPlateau
    return classes


def _subclasses(module: ModuleType, base: type) -> dict[str, type]:
    """Returns the subclasses in a module by the path of their definition, and those of PyTorch by the module, too."""
    classes: dict[str, type] = {}
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, base):
            classes[class_path(value)] = value
            if value.__module__.startswith("torch"):
                classes[f"{module.__name__}.{value.__name__}"] = value
    return classes


def _import_trusted_class(path: str) -> type:
    module, _, name = path.rpartition(".")
    try:
        value = getattr(import_module(module), name, None)
    except ImportError as error:
        raise ValueError(f"it names {path}, and the module {module} cannot be imported: {error}") from error
    if not isinstance(value, type):
        raise ValueError(f"it names {path}, which is not a class")
    return value


def _find_plugin(path: str) -> type:
    """Returns a plug-in of this package, by the path of its definition or of a package that exports it."""
    module, _, name = path.rpartition(".")
    folder = module.split(".")[1:2]
    value = None
    if module == PACKAGE and name in lightning_softprompt.__all__:
        value = getattr(lightning_softprompt, name)
    elif folder and folder[0] in PLUGIN_FOLDERS:
        try:
            value = getattr(import_module(module), name, None)
        except ModuleNotFoundError:
            value = None
    if isinstance(value, type) and is_plugin(value):
        return value
    raise ValueError(f"it names {path}, which is not a plug-in of this version of the package")


def is_plugin(cls: type) -> bool:
    """Returns whether a class is defined in a plug-in folder, as a subclass of a base class of this package."""
    package, _, rest = cls.__module__.partition(".")
    if package != PACKAGE or rest.partition(".")[0] not in PLUGIN_FOLDERS:
        return False
    return issubclass(cls, _bases())


@cache
def _bases() -> tuple[type, ...]:
    return tuple(package_base(path) for path in BASES)


def package_base(path: str) -> type:
    """Returns a base class of this package. It is imported on demand, because its module imports this one."""
    module, _, name = path.rpartition(".")
    base: type = getattr(import_module(f"{PACKAGE}.{module}"), name)
    return base


def class_path(cls: type) -> str:
    """Returns the import path of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def resolve_class_paths(value: Any) -> Any:
    """Replaces class paths in plain values with those of the definitions, so that two paths of a class are equal."""
    if isinstance(value, Mapping):
        resolved = {}
        for key, inner in value.items():
            is_class = key in ("class_path", "_class_path")
            resolved[key] = _definition_path(inner) if is_class else resolve_class_paths(inner)
        return resolved
    return [resolve_class_paths(inner) for inner in value] if isinstance(value, list) else value


def _definition_path(path: Any) -> Any:
    try:
        return class_path(find_class(path))
    except ValueError:  # a class of the user, which only the command line may name
        return path
