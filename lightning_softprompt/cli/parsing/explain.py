"""Explains errors of jsonargparse in two parts: the problem and the fix."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Protocol

from lightning_softprompt.cli.parsing.class_options import (
    LINKED,
    concrete_subclasses,
    did_you_mean,
    import_class,
    option_names,
    parameter_names,
)
from lightning_softprompt.cli.parsing.messages import (
    ABSTRACT,
    CLASS,
    CREATION_ERROR,
    FUNCTION,
    GIVEN,
    KEY,
    LITERAL,
    MISSING,
    MISSING_ARGUMENTS,
    NESTED,
    NO_CLASS,
    NUMBER,
    OPTION,
    OPTION_OF_CALLABLE,
    REQUIRED,
    SUBTYPES,
    TYPE,
    TYPE_ALONE,
    UNINFORMATIVE,
    UNKNOWN,
    VALUE,
    block_below,
    format_choices,
    format_type,
    full_option_name,
    last_groups,
    last_part,
    option_before,
    type_names,
)
from lightning_softprompt.cli.parsing.plugin_imports import explain_plugin_import
from lightning_softprompt.system.plain_yaml import read_yaml

LOGGER_EXTRAS = {"TensorBoardLogger": "tensorboard", "MLFlowLogger": "mlflow"}  # extras of this package
LACKS_PACKAGE = re.compile(r"[Nn]either .* is available|Requirement .* not met|No module named")
MAX_COMPLETE = 60  # classes in a complete list
MAX_LISTED = 12  # classes in a list that is not complete


class CommandParser(Protocol):
    """The part of a parser that is used here."""

    words: ClassVar[Sequence[str]]

    @property
    def prog(self) -> str:
        """The command."""

    @property
    def options(self) -> list[str]:
        """Names of all options."""


def explain(message: str, parser: CommandParser) -> tuple[str, str]:
    """Explain an error of jsonargparse: the problem and the fix.

    Its errors list every type that a value may have; the innermost one is the relevant one.
    """
    for explain_kind in (
        _missing_file,
        _missing_components,
        _wrong_option,
        _wrong_option_of_callable,
        _wrong_number,
        _missing_option,
        _missing_argument,
        _wrong_function,
        _wrong_plugin,
        _wrong_class,
        _wrong_value,
        _abstract_class,
        _unknown_option,
        _bad_yaml,
    ):
        if explanation := explain_kind(message, parser):
            return explanation
    lines = [line.strip(" -") for line in message.strip().splitlines()]
    relevant = [line for line in lines if line and not line.startswith(UNINFORMATIVE)]
    if len(relevant) > 1:
        relevant = [relevant[0], relevant[-1]]
    return " ".join(relevant), _see_help(parser)


def _missing_file(message: str, parser: CommandParser) -> tuple[str, str] | None:
    """A component may be given as a file; jsonargparse reports a missing file as an invalid class."""
    for path in _yaml_files(parser):
        if not path.is_file():
            return f"{path} does not exist", "list the bundled configs: softprompt configs"
    return None


def _yaml_files(parser: CommandParser) -> list[Path]:
    words = (word.rpartition("=")[2] for word in parser.words)
    return [Path(word) for word in words if word.endswith((".yaml", ".yml"))]


def _missing_components(message: str, parser: CommandParser) -> tuple[str, str] | None:
    """Report a missing model or data."""
    if not (found := REQUIRED.search(message.strip())):
        return None
    options = [f"--{last_part(name)}" for name in found[1].split(", ")]
    names = " and ".join(options)
    return (
        f"{names} must be given",
        "pass a class or a config (see softprompt methods, softprompt configs), or --ckpt_path FILE to use the config "
        "of the checkpoint's run",
    )


def _wrong_option(message: str, parser: CommandParser) -> tuple[str, str] | None:
    if not (found := list(OPTION.finditer(message))):
        return None
    path, option = found[-1].groups()
    name = option_before(message, found[-1].start())
    known = [argument for argument in option_names(path) if argument not in LINKED.get(name, ())]
    return _missing_class(message, name, path, option) or _unknown_argument(path, option, known)


def _wrong_option_of_callable(message: str, parser: CommandParser) -> tuple[str, str] | None:
    """An option of a class that is instantiated later, such as an optimizer, with its first argument passed then."""
    if not (found := list(OPTION_OF_CALLABLE.finditer(message))):
        return None
    option, path = found[-1].groups()
    name = option_before(message, found[-1].start())
    no_class = _missing_class(message, name, path, option)
    return no_class or _unknown_argument(path, option, option_names(path)[1:])


def _unknown_argument(path: str, option: str, arguments: list[str]) -> tuple[str, str]:
    name = path.rpartition(".")[2]
    problem = f"{name} has no option {option!r}{did_you_mean(option, arguments)}"
    return problem, f"options of {name}: {', '.join(arguments)}" if arguments else f"{name} has no options"


def _missing_class(message: str, name: str, path: str, option: str) -> tuple[str, str] | None:
    """Report an option of a class that precedes the class; None if the class is named.

    Args:
        message: The error.
        name: The option whose value is the class.
        path: The class that jsonargparse assumes if none is named: the base class.
        option: The option of the class.
    """
    bases = [import_class(base) for base in SUBTYPES.findall(message) if "." in base]
    if path != "typing.Union" and import_class(path) not in bases:
        return None
    return _option_before_class(name, option, bases[-1])


def _option_before_class(name: str, option: str, base: type) -> tuple[str, str]:
    """Report an option that precedes its class, and list the classes that have the option."""
    first = option.partition(".")[0]
    packages = (base.__module__.partition(".")[0], "lightning_softprompt")
    names = set()
    for cls in concrete_subclasses(base):
        is_public = not cls.__name__.startswith("_") and cls.__module__.partition(".")[0] in packages
        if is_public and first in parameter_names(cls):
            names.add(cls.__name__)
    problem, fix = _early_option(name, option)
    if names:
        more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
        fix += f"; classes with {first}: {', '.join(sorted(names)[:MAX_LISTED])}{more}"
    return problem, fix


def _early_option(name: str, option: str) -> tuple[str, str]:
    fix = f"pass --{name} CLASS first, then its options"
    if (name, option) == ("model.optimizer", "lr"):
        fix = f"pass --model.lr to set the learning rate of the default optimizer, or {fix.removeprefix('pass ')}"
    return f"--{name}.{option} precedes --{name}, which names its class", fix


def _wrong_number(message: str, parser: CommandParser) -> tuple[str, str] | None:
    """A value of the wrong type, if a number or one of several types is expected."""
    if not (found := list(NUMBER.finditer(message))):
        return None
    key, types, value = found[-1].groups()
    names = [name for name in type_names(types) if name != "NoneType"]
    outer = option_before(message, found[-1].start())
    name = f"{outer}.{key}" if outer else key
    return f"{name}: expected {' or '.join(names)}, got {value}", _see_help(parser)


def _missing_option(message: str, parser: CommandParser) -> tuple[str, str] | None:
    """A class without a required option."""
    if not (found := last_groups(MISSING, message)):
        return None
    key, options, path = found
    names, kind = options.split(", "), path.rpartition(".")[2]
    return (
        f"{kind} requires the option {' and '.join(names)}",
        f"pass it after the class: --model.{key}.{names[0]} VALUE",
    )


def _missing_argument(message: str, parser: CommandParser) -> tuple[str, str] | None:
    """A class in a list, or one of several types, without a required option."""
    if not (found := list(MISSING_ARGUMENTS.finditer(message))):
        return None
    path, options = found[-1].groups()
    names = options.split(", ")
    place = option_before(message, found[-1].start())
    return (
        f"{path.rpartition('.')[2]} requires the option {' and '.join(names)}",
        f"pass it after the class: --{place}.{names[0]} VALUE; in a config, under init_args",
    )


def _wrong_function(message: str, parser: CommandParser) -> tuple[str, str] | None:
    """A function whose return annotation is not the expected type."""
    if not (found := last_groups(FUNCTION, message)):
        return None
    path, kind = found
    return (
        f"{path} is a function that is not annotated to return {kind}",
        "pass a class, such as LinearLR, OneCycleLR or CosineAnnealingLR for a schedule; functions work only in Python",
    )


def _wrong_plugin(message: str, parser: CommandParser) -> tuple[str, str] | None:
    """A class outside the package that cannot be imported, or is of another kind."""
    return explain_plugin_import(message)


def _wrong_class(message: str, parser: CommandParser) -> tuple[str, str] | None:
    found = last_groups(CLASS, message) or last_groups(NO_CLASS, message)
    bases = [base for base in SUBTYPES.findall(message) if "." in base]  # not a builtin type
    if not found or not bases:
        return None
    requested = found[0].strip("'\"")
    names = {cls.__name__ for cls in concrete_subclasses(import_class(bases[-1]))}
    known = sorted(name for name in names if not name.startswith("_"))
    if not did_you_mean(requested, known) and (hint := did_you_mean(requested, _package_classes())):
        return f"unknown class {requested!r}{hint}", _see_help(parser)  # the error does not name a callable's type
    kind = bases[-1].rpartition(".")[2]
    return (
        f"unknown class {requested!r}{did_you_mean(requested, known)}",
        f"subclasses of {kind}: {_list_names(known)}; or use a full import path",
    )


def _list_names(names: Sequence[str]) -> str:
    """All names, or the first ones if there are too many to read, such as the metrics of torchmetrics."""
    if len(names) <= MAX_COMPLETE:
        return ", ".join(names)
    return f"{', '.join(names[:MAX_LISTED])} and {len(names) - MAX_LISTED} more"


def _package_classes() -> list[str]:
    modules = [module for name, module in sys.modules.items() if name.startswith("lightning_softprompt.")]
    return sorted({name for module in modules for name, value in vars(module).items() if isinstance(value, type)})


def _wrong_value(message: str, parser: CommandParser) -> tuple[str, str] | None:
    if not (keys := list(KEY.finditer(message))):
        return None
    reasons = block_below(message, keys[-1])
    if not (found := last_groups(VALUE, reasons) or _union(reasons)):
        return None
    expected, value = found
    if option := NESTED.match(value):
        return _early_option(full_option_name(keys), option[1])
    names = LITERAL.sub(format_choices, TYPE.sub(format_type, expected))
    is_scalar = not value.startswith(("{", "["))
    fix = _quote(value) if is_scalar and "str" in names.split(" or ") else _write_as_yaml(names, value)
    return f"{full_option_name(keys)}: expected {names}, got {value}", fix or _see_help(parser)


def _union(reasons: str) -> tuple[str, str] | None:
    """The types and the value of an option that may be of several types."""
    if not reasons.lstrip().startswith("Does not validate") or "Problem with" in reasons:
        return None
    found = [name for types in TYPE_ALONE.findall(reasons) for name in type_names(types)]
    types = [name for name in found if name != "NoneType"]
    value = last_groups(GIVEN, reasons)
    return (" or ".join(dict.fromkeys(types)), value[0]) if types and value else None


def _quote(value: str) -> str:
    """The fix if a text is expected and YAML parsed it as another type."""
    if value in ("True", "False", "None"):
        return "YAML reads unquoted yes, no, on, off, true, false and null as values; put the word in quotes: 'no'"
    return f"put it in quotes to make it text: '{value}'"


def _write_as_yaml(names: str, value: str) -> str | None:
    """The fix if a mapping or list is expected, or None."""
    if not {"dict", "list"} & set(names.split(" or ")):
        return None
    is_file = Path(value).is_file()
    return f"write {'its contents' if is_file else 'it'} as {{name: value, ..}} or [a, b, ..]; spaces follow : and ,"


def _abstract_class(message: str, parser: CommandParser) -> tuple[str, str] | None:
    if not (found := ABSTRACT.search(message)) or not (option := NESTED.search(message, found.end())):
        return None
    return _option_before_class(option_before(message, found.start()), option[1], import_class(found[1]))


def _unknown_option(message: str, parser: CommandParser) -> tuple[str, str] | None:
    if not (found := last_groups(UNKNOWN, message)):
        return None
    return f"unknown option --{found[0]}{did_you_mean(found[0], parser.options)}", _see_help(parser)


def _bad_yaml(message: str, parser: CommandParser) -> tuple[str, str] | None:
    """Find the file with a syntax error, which jsonargparse does not name."""
    for path in _yaml_files(parser):
        if path.is_file():
            try:
                read_yaml(path)
            except ValueError as error:
                return str(error), "fix the file, or generate a valid one with --print_config"
    return None


def creation_error(message: str) -> str | None:
    """The class that could not be created and the reason, from an error of jsonargparse that lists its attempts."""
    found = last_groups(CREATION_ERROR, message)
    if not found:
        return None
    name = last_part(found[0])
    if name in LOGGER_EXTRAS and LACKS_PACKAGE.search(found[1]):
        extra = LOGGER_EXTRAS[name]
        return f"{name} requires the package {extra}: pip install 'lightning-softprompt[{extra}]'"
    return f"{name} cannot be created: {found[1].strip()}"


def _see_help(parser: CommandParser) -> str:
    command = parser.prog
    return f"See `{command} --help`, or `--model.help CLASS` and `--data.help CLASS` for the options of a class"
