"""The command line parser. It reports errors in two lines: the problem and the fix."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import yaml
from jsonargparse import Namespace, _typehints, get_loader, set_loader
from jsonargparse._namespace import del_clash_mark
from jsonargparse._util import NestedArg, parse_value_or_config
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch import optim

from lightning_softprompt.cli.parsing.class_options import LINKED, PYTHON_ONLY
from lightning_softprompt.cli.parsing.explain import explain
from lightning_softprompt.moved import current_class
from lightning_softprompt.renamed_options import rename_keys
from lightning_softprompt.system.atomic_files import expand_home_in
from lightning_softprompt.system.plain_yaml import guard_loader
from lightning_softprompt.system.printable import one_line, printable

RUN_FOLDER = "<run folder>"  # value of `save_dir` in configs that stands for the folder of the run
TENSORBOARD = "TensorBoardLogger"
PLATEAU = "torch.optim.lr_scheduler.ReduceLROnPlateau"
_all_subclasses = _typehints.get_all_subclass_paths


def _subclasses_by_short_name(*args: Any, **kwargs: Any) -> list[str]:
    """The paths of all subclasses, without duplicates of one short name, which would make the name ambiguous.

    bitsandbytes, once imported, has an `SGD` as PyTorch does. Of the two `ReduceLROnPlateau`, Lightning's is used,
    which has the option `monitor`.
    """
    paths = [path for path in _all_subclasses(*args, **kwargs) if path != PLATEAU]
    return [
        path for path in paths if not (path.startswith("bitsandbytes.") and hasattr(optim, path.rpartition(".")[2]))
    ]


_typehints.get_all_subclass_paths = _subclasses_by_short_name  # there is no public hook
_resolve_class_path = _typehints.resolve_class_path_by_name


def _resolve_current_class(cls: type | tuple[type], name: str) -> str:
    """Resolves the name of a class; old names of renamed classes are accepted with a warning."""
    if "." not in name and "." in (path := _resolve_class_path(cls, name)):
        return path  # it is the name of a class of this kind, whatever another class was called
    return _resolve_class_path(cls, current_class(name))


_typehints.resolve_class_path_by_name = _resolve_current_class


class ParsedMapping(dict[Any, Any]):
    """A mapping and the text that it was parsed from, which is the value if the option is of type `str`."""

    def __init__(self, mapping: dict[Any, Any], text: str) -> None:
        super().__init__(mapping)
        self.text = text

    def __str__(self) -> str:
        return self.text


def _parse_with_text(value: Any, *args: Any, **kwargs: Any) -> Any:
    """Parse a value and keep the text of a nested option, such as `Review: {text}`, which YAML reads as a mapping."""
    parsed, path = parse_value_or_config(value, *args, **kwargs)
    if isinstance(parsed, NestedArg) and isinstance(value.val, str) and isinstance(parsed.val, dict) and path is None:
        parsed = NestedArg(parsed.key, ParsedMapping(parsed.val, value.val))
    return parsed, path


_typehints.parse_value_or_config = _parse_with_text  # type: ignore[attr-defined]
_adapt_class_type = _typehints.adapt_class_type


def _adapt_with_defaults(value: Any, *args: Any, **kwargs: Any) -> Any:
    """Pass `null` to a nested option, for which jsonargparse would pass the text `None`, and a mapping as its text.

    A `TensorBoardLogger` gets the folder of the run, because the class requires one.
    """
    nested = value.get("init_args") if isinstance(value, Namespace) else None
    if isinstance(nested, NestedArg) and nested.val is None:
        value["init_args"] = NestedArg(nested.key, "null")
    options = vars(nested) if isinstance(nested, Namespace) else {}
    for name, option in options.items():
        if isinstance(option, ParsedMapping):  # the only option: the parser of the class parses its text by its type
            value["init_args"] = NestedArg(del_clash_mark(name), option.text)  # the mark of names such as `values`
    if isinstance(value, Namespace) and str(value.get("class_path")).rpartition(".")[2] == TENSORBOARD:
        if nested is None:
            value["init_args"] = Namespace(save_dir=RUN_FOLDER)
        elif isinstance(nested, Namespace) and "save_dir" not in nested:
            nested["save_dir"] = RUN_FOLDER
    return _adapt_class_type(value, *args, **kwargs)


_typehints.adapt_class_type = _adapt_with_defaults


_load_yaml = guard_loader(get_loader("yaml"))


def _load(text: str) -> Any:
    """Parse a config or option, and replace old option names, and `~` at the start of paths by the home folder."""
    return expand_home_in(rename_keys(_load_yaml(text)))


set_loader("yaml", _load, (yaml.YAMLError,))


def _write_member(dumper: yaml.SafeDumper, member: Enum) -> yaml.Node:
    """Write an enum member as its value, so that classes with such defaults can be options."""
    return dumper.represent_data(member.value)


yaml.SafeDumper.add_multi_representer(Enum, _write_member)


class Parser(LightningArgumentParser):
    """LightningCLI's parser with short errors and without abbreviated options."""

    words: ClassVar[Sequence[str]] = ()  # the command being parsed; names the files that may cause an error

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("prog", " ".join(["softprompt", *self.words[:1]]))  # the parser of `--model.help` has none
        super().__init__(*args, allow_abbrev=False, **kwargs)

    @property
    def prog(self) -> str:
        """The command, as in `softprompt fit`."""
        return self._prog

    @prog.setter
    def prog(self, name: str) -> None:
        self._prog = name.replace(" [options]", "")  # the options follow the command

    def add_class_arguments(self, theclass: Any, nested_key: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """Skip the options that links set in the help of a class, such as `--model.help PromptTuning`."""
        if nested_key in LINKED:
            kwargs["skip"] = {*(kwargs.get("skip") or ()), *LINKED[nested_key]}
        return super().add_class_arguments(theclass, nested_key, *args, **kwargs)

    def add_subclass_arguments(self, baseclass: Any, nested_key: str, *args: Any, **kwargs: Any) -> None:
        """Skip the arguments of methods that exist only in Python."""
        if nested_key == "model":
            kwargs["skip"] = {*(kwargs.get("skip") or ()), *PYTHON_ONLY}
        super().add_subclass_arguments(baseclass, nested_key, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print two lines and exit with 2; parsers that jsonargparse creates internally raise instead."""
        if not self.exit_on_error:
            super().error(message, ex)
        problem, fix = explain(message, self)
        sys.stderr.write(f"error: {one_line(problem)}\n{printable(fix)}\n")
        sys.exit(2)

    @property
    def options(self) -> list[str]:
        """Names of all options."""
        return [flag.removeprefix("--") for action in self._actions for flag in action.option_strings]


def set_run_folder(loggers: Sequence[Logger], folder: Path) -> Sequence[Logger]:
    """Set the folder of each `TensorBoardLogger` that has none; it has created no file yet."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger) and logger.save_dir == RUN_FOLDER:
            logger._root_dir = str(folder)
    return loggers
