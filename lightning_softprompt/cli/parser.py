"""The command line parser. It reports errors in two lines: the problem and the fix."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from enum import Enum
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import yaml
from jsonargparse import Namespace, _typehints, get_loader, set_loader
from jsonargparse._util import NestedArg
from lightning.pytorch.cli import LightningArgumentParser
from torch import optim

from lightning_softprompt.moved import current_class
from lightning_softprompt.renamed_options import rename_keys
from lightning_softprompt.system.atomic_files import expand_home_in
from lightning_softprompt.system.plain_yaml import guard_loader, read_yaml
from lightning_softprompt.system.printable import one_line, printable

OPTION = re.compile(r"Problem with given class_path '([\w.]+)':\s+Option '([\w.]+)' is not accepted")
OPTION_OF_CALLABLE = re.compile(r"Option '([\w.]+)' is not accepted\. Got value: Namespace\(class_path='([\w.]+)'")
CLASS = re.compile(r"Expected a dot import path string: (\S+)")
NO_CLASS = re.compile(r"Import path (\S+?) does not correspond to a subclass of (\S+)")
KEY = re.compile(r'^( *)(?:- )?Parser key "([\w.]+)":', re.MULTILINE)
VALUE = re.compile(r"Expected (?:a )?([^\n]*)\. Got value: ([^\n]*)")
TYPE_ALONE = re.compile(r"Expected a (<class '[\w.]+'>|typing\.Literal\[[^\n]*\])$", re.MULTILINE)
LITERAL = re.compile(r"typing\.Literal\[([^\]]*)\]")
GIVEN = re.compile(r"Given value: ([^\n]*)")
SUBTYPES = re.compile(
    r"(?:Subtypes: \[(?:<class '|list\[)|Callable\[\[[^\]]*\], (?:typing\.Union\[)?)(?!typing\.)([\w.]+)"
)
UNINFORMATIVE = (
    "Does not validate",
    "Subtypes:",
    "Errors:",
    "Expected a <class 'NoneType'>",
    "Expected a path",
    "Given value",
)
TYPE = re.compile(r"<class '([\w.]+)'>")
UNKNOWN = re.compile(r"(?:unrecognized arguments: --|does not accept option '|Key ')([\w.]+)")
NUMBER = re.compile(
    r'Parser key "([\w.]+)":[^"]*?Subtypes: \[(<class \'(?:float|int|bool)\'>[^\n"]*)\]'
    r'[^"]*?Given value: ([^\n"]*?)(?:\. Got value:|\n|$)'
)
MISSING = re.compile(
    r'Parser key "([\w.]+)":[^"]*?a callable class: the following arguments are required: ([\w, ]+)'
    r"[^\"]*?class_path='([\w.]+)'"
)
MISSING_ARGUMENTS = re.compile(
    r"Problem with given class_path '([\w.]+)':\s+the following arguments are required: ([\w, ]+)"
)
REQUIRED = re.compile(r"^the following arguments are required: ([\w., ]+)$")
CREATION_ERROR = re.compile(r"Problem with given class_path '([\w.]+)':\s+([^\n]+)")
FUNCTION = re.compile(r"Expected '([\w.]+)' to be a function that returns (?:Union\[)?(\w+)")
ABSTRACT = re.compile(r"Expected an instantiatable class, but ([\w.]+) is abstract")
NESTED = re.compile(r"NestedArg\(key='([\w.]+)'")
MAX_LISTED = 12  # classes in a message
PYTHON_ONLY = {"data"}  # arguments of methods that the command line sets by links

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
_adapt_class_type = _typehints.adapt_class_type


def _adapt_with_nulls(value: Any, *args: Any, **kwargs: Any) -> Any:
    """Pass `null` to a nested option; jsonargparse would pass the text `None`."""
    nested = value.get("init_args") if isinstance(value, Namespace) else None
    if isinstance(nested, NestedArg) and nested.val is None:
        value["init_args"] = NestedArg(nested.key, "null")
    return _adapt_class_type(value, *args, **kwargs)


_typehints.adapt_class_type = _adapt_with_nulls


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
        super().__init__(*args, allow_abbrev=False, **kwargs)

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


def explain(message: str, parser: Parser) -> tuple[str, str]:
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


def _missing_file(message: str, parser: Parser) -> tuple[str, str] | None:
    """A component may be given as a file; jsonargparse reports a missing file as an invalid class."""
    for path in _yaml_files(parser):
        if not path.is_file():
            return f"{path} does not exist", "list the bundled configs: softprompt configs"
    return None


def _yaml_files(parser: Parser) -> list[Path]:
    words = (word.rpartition("=")[2] for word in parser.words)
    return [Path(word) for word in words if word.endswith((".yaml", ".yml"))]


def _missing_components(message: str, parser: Parser) -> tuple[str, str] | None:
    """Report a missing model or data."""
    if not (found := REQUIRED.search(message.strip())):
        return None
    names = " and ".join(f"--{name.rpartition('.')[2]}" for name in found[1].split(", "))
    return (
        f"{names} must be given",
        "pass a class or a config (see softprompt methods, softprompt configs), or --ckpt_path FILE to use the config "
        "of the checkpoint's run",
    )


def _wrong_option(message: str, parser: Parser) -> tuple[str, str] | None:
    if not (found := list(OPTION.finditer(message))):
        return None
    path, option = found[-1].groups()
    name = _option_before(message, found[-1].start())
    return _missing_class(message, name, path, option) or _unknown_argument(path, option, _arguments(path))


def _wrong_option_of_callable(message: str, parser: Parser) -> tuple[str, str] | None:
    """An option of a class that is instantiated later, such as an optimizer, with its first argument passed then."""
    if not (found := list(OPTION_OF_CALLABLE.finditer(message))):
        return None
    option, path = found[-1].groups()
    name = _option_before(message, found[-1].start())
    no_class = _missing_class(message, name, path, option)
    return no_class or _unknown_argument(path, option, _arguments(path)[1:])


def _unknown_argument(path: str, option: str, arguments: list[str]) -> tuple[str, str]:
    name = path.rpartition(".")[2]
    problem = f"{name} has no option {option!r}{_did_you_mean(option, arguments)}"
    return problem, f"options of {name}: {', '.join(arguments)}"


def _missing_class(message: str, name: str, path: str, option: str) -> tuple[str, str] | None:
    """Report an option of a class that precedes the class; None if the class is named.

    Args:
        message: The error.
        name: The option whose value is the class.
        path: The class that jsonargparse assumes if none is named: the base class.
        option: The option of the class.
    """
    bases = [_imported(base) for base in SUBTYPES.findall(message) if "." in base]
    if path != "typing.Union" and _imported(path) not in bases:
        return None
    return _option_before_class(name, option, bases[-1])


def _option_before_class(name: str, option: str, base: type) -> tuple[str, str]:
    """Report an option that precedes its class, and list the classes that have the option."""
    first = option.partition(".")[0]
    packages = (base.__module__.partition(".")[0], "lightning_softprompt")
    names = set()
    for cls in _subclasses(base):
        is_public = not cls.__name__.startswith("_") and cls.__module__.partition(".")[0] in packages
        if is_public and first in _parameters(cls):
            names.add(cls.__name__)
    problem, fix = _early_option(name, option)
    if names:
        more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
        fix += f"; classes with {first}: {', '.join(sorted(names)[:MAX_LISTED])}{more}"
    return problem, fix


def _early_option(name: str, option: str) -> tuple[str, str]:
    return f"--{name}.{option} precedes --{name}, which names its class", f"pass --{name} CLASS first, then its options"


def _wrong_number(message: str, parser: Parser) -> tuple[str, str] | None:
    """A value of the wrong type, if a number or one of several types is expected."""
    if not (found := list(NUMBER.finditer(message))):
        return None
    key, types, value = found[-1].groups()
    names = [name for name in _types(types) if name != "NoneType"]
    outer = _option_before(message, found[-1].start())
    name = f"{outer}.{key}" if outer else key
    return f"{name}: expected {' or '.join(names)}, got {value}", _see_help(parser)


def _missing_option(message: str, parser: Parser) -> tuple[str, str] | None:
    """A class without a required option."""
    if not (found := _last(MISSING, message)):
        return None
    key, options, path = found
    names, kind = options.split(", "), path.rpartition(".")[2]
    return (
        f"{kind} requires the option {' and '.join(names)}",
        f"pass it after the class: --model.{key}.{names[0]} VALUE",
    )


def _missing_argument(message: str, parser: Parser) -> tuple[str, str] | None:
    """A class in a list, or one of several types, without a required option."""
    if not (found := list(MISSING_ARGUMENTS.finditer(message))):
        return None
    path, options = found[-1].groups()
    names = options.split(", ")
    place = _option_before(message, found[-1].start())
    return (
        f"{path.rpartition('.')[2]} requires the option {' and '.join(names)}",
        f"pass it after the class: --{place}.{names[0]} VALUE; in a config, under init_args",
    )


def _wrong_function(message: str, parser: Parser) -> tuple[str, str] | None:
    """A function whose return annotation is not the expected type."""
    if not (found := _last(FUNCTION, message)):
        return None
    path, kind = found
    return (
        f"{path} is a function that is not annotated to return {kind}",
        "pass a class, such as LinearLR, OneCycleLR or CosineAnnealingLR for a schedule; functions work only in Python",
    )


def _wrong_class(message: str, parser: Parser) -> tuple[str, str] | None:
    found = _last(CLASS, message) or _last(NO_CLASS, message)
    bases = [base for base in SUBTYPES.findall(message) if "." in base]  # not a builtin type
    if not found or not bases:
        return None
    requested = found[0].strip("'\"")
    known = sorted({c.__name__ for c in _subclasses(_imported(bases[-1])) if not c.__name__.startswith("_")})
    if not _did_you_mean(requested, known) and (hint := _did_you_mean(requested, _package_classes())):
        return f"unknown class {requested!r}{hint}", _see_help(parser)  # the error does not name a callable's type
    kind = bases[-1].rpartition(".")[2]
    return (
        f"unknown class {requested!r}{_did_you_mean(requested, known)}",
        f"subclasses of {kind}: {', '.join(known)}; or use a full import path",
    )


def _package_classes() -> list[str]:
    modules = [module for name, module in sys.modules.items() if name.startswith("lightning_softprompt.")]
    return sorted({name for module in modules for name, value in vars(module).items() if isinstance(value, type)})


def _wrong_value(message: str, parser: Parser) -> tuple[str, str] | None:
    if not (keys := list(KEY.finditer(message))):
        return None
    reasons = _block(message, keys[-1])
    if not (found := _last(VALUE, reasons) or _union(reasons)):
        return None
    expected, value = found
    if option := NESTED.match(value):
        return _early_option(_option(keys), option[1])
    names = LITERAL.sub(_choices, TYPE.sub(_name, expected))
    is_scalar = not value.startswith(("{", "["))
    fix = _quote(value) if is_scalar and "str" in names.split(" or ") else _write_as_yaml(names, value)
    return f"{_option(keys)}: expected {names}, got {value}", fix or _see_help(parser)


def _block(message: str, key: re.Match[str]) -> str:
    """The part of a message about a key: the lines below it that are indented further."""
    lines = message[key.end() :].splitlines()[1:]
    return "\n".join(takewhile(lambda line: len(line) - len(line.lstrip()) > len(key[1]), lines))


def _option(keys: Sequence[re.Match[str]]) -> str:
    """The full name of the innermost key; the keys around it are indented less."""
    names = [keys[-1][2]]
    indent = len(keys[-1][1])
    for key in reversed(keys[:-1]):
        if len(key[1]) < indent:
            names, indent = [key[2], *names], len(key[1])
    return ".".join(names)


def _option_before(message: str, position: int) -> str:
    """The full name of the option that a position in a message refers to; empty if there is none."""
    keys = [key for key in KEY.finditer(message) if key.start() < position and key.end() < position]
    return _option(keys) if keys else ""


def _union(reasons: str) -> tuple[str, str] | None:
    """The types and the value of an option that may be of several types."""
    if not reasons.lstrip().startswith("Does not validate") or "Problem with" in reasons:
        return None
    found = [name for types in TYPE_ALONE.findall(reasons) for name in _types(types)]
    types = [name for name in found if name != "NoneType"]
    value = _last(GIVEN, reasons)
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


def _abstract_class(message: str, parser: Parser) -> tuple[str, str] | None:
    if not (found := ABSTRACT.search(message)) or not (option := NESTED.search(message, found.end())):
        return None
    return _option_before_class(_option_before(message, found.start()), option[1], _imported(found[1]))


def _unknown_option(message: str, parser: Parser) -> tuple[str, str] | None:
    if not (found := _last(UNKNOWN, message)):
        return None
    return f"unknown option --{found[0]}{_did_you_mean(found[0], parser.options)}", _see_help(parser)


def _bad_yaml(message: str, parser: Parser) -> tuple[str, str] | None:
    """Find the file with a syntax error, which jsonargparse does not name."""
    for path in _yaml_files(parser):
        if path.is_file():
            try:
                read_yaml(path)
            except ValueError as error:
                return str(error), "fix the file, or generate a valid one with --print_config"
    return None


def _types(text: str) -> list[str]:
    """Names of the types and choices in a list of types as jsonargparse formats it."""
    return [*map(_last_part, TYPE.findall(text)), *map(_choices, LITERAL.finditer(text))]


def _choices(found: re.Match[str]) -> str:
    return "one of " + found[1].replace("'", "")


def _name(found: re.Match[str]) -> str:
    return _last_part(found[1])


def _last_part(path: str) -> str:
    return path.rpartition(".")[2]


def creation_error(message: str) -> str | None:
    """The class that could not be created and the reason, from an error of jsonargparse that lists its attempts."""
    found = _last(CREATION_ERROR, message)
    return f"{_last_part(found[0])} cannot be created: {found[1].strip()}" if found else None


def _last(pattern: re.Pattern[str], message: str) -> tuple[str, ...] | None:
    found = list(pattern.finditer(message))
    return found[-1].groups() if found else None


def _did_you_mean(name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, n=2, cutoff=0.6)
    return f". Did you mean {' or '.join(map(repr, close))}?" if close else ""


def _see_help(parser: Parser) -> str:
    command = parser.prog.replace(" [options]", "")
    return f"See `{command} --help`, or `--model.help CLASS` and `--data.help CLASS` for the options of a class"


def _imported(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)  # type: ignore[no-any-return]


def _subclasses(cls: type) -> Iterator[type]:
    sub: type
    for sub in cls.__subclasses__():
        if not inspect.isabstract(sub):
            yield sub
        yield from _subclasses(sub)


def _arguments(path: str) -> list[str]:
    """Names of a class's constructor arguments; for classes of this package, including those passed to base classes."""
    cls = _imported(path)
    if not cls.__module__.startswith("lightning_softprompt"):
        return _parameters(cls)
    known = [name for base in cls.__mro__[:-1] if "__init__" in vars(base) for name in _package_arguments(base)]
    return [name for name in dict.fromkeys(known) if name not in PYTHON_ONLY]


def _package_arguments(cls: type) -> list[str]:
    return _parameters(cls) if cls.__module__.startswith("lightning_softprompt") else []


def _parameters(cls: type) -> list[str]:
    """Names of the arguments of a class's constructor, without those passed to base classes."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
    return [p.name for p in parameters if p.name != "self" and p.kind not in kinds]
