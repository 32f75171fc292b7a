"""Reads plain values from a file by the type of the argument that they are for.

Reading checks everything and creates nothing: the result consists of plain values and `ClassSpec` objects, which name
only classes that files may name. `build` then calls these classes and nothing else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from torchmetrics import Metric

from lightning_softprompt.checkpoints.safe_loading.class_spec import ClassSpec
from lightning_softprompt.checkpoints.safe_loading.plain_values import SCALARS, check_plain, iterate_mappings
from lightning_softprompt.checkpoints.safe_loading.registry import class_path, find_class
from lightning_softprompt.system.printable import shorten

CLASS_KEYS = {"class_path", "init_args", "dict_kwargs"}
UNNAMED_OPTIONS: dict[type, dict[str, Any]] = {  # options that a class reads from `**kwargs`, with their types
    Metric: {
        "compute_on_cpu": bool,
        "dist_sync_on_step": bool,
        "sync_on_compute": bool,
        "compute_with_cache": bool,
        "process_group": None,  # the options without a type are functions and groups, which no file can name
        "dist_sync_fn": None,
        "distributed_available_fn": None,
    }
}


class KindError(ValueError):
    """A value of another type or class than the argument.

    Args:
        location: Name of the value in messages.
        reason: What was expected, and the value.
    """

    def __init__(self, location: str, reason: str) -> None:
        super().__init__(f"{location}: {reason}")
        self.location = location


@dataclass(frozen=True)
class Parameter:
    """A parameter of a constructor.

    Args:
        hint: Its type hint.
        is_required: Whether it has no default.
    """

    hint: Any
    is_required: bool


def read_class(value: Any, base: type, location: str, deferred: int | None = None) -> ClassSpec:
    """Reads a class and its arguments from `{class_path, init_args}` or from an import path.

    Args:
        value: The value in the file.
        base: The required base class.
        location: Name of the value in messages.
        deferred: Number of leading arguments that are passed later, if the argument takes a function; None if it takes
            the object itself.

    Raises:
        ValueError: If files may not name the class, it is not a subclass of the base, or an argument is invalid.
    """
    path, arguments = _class_parts(value, location)
    try:
        cls = base if path == class_path(base) else find_class(path)
    except ValueError as error:
        raise ValueError(f"{location}: {error}") from error
    if not issubclass(cls, base) or inspect.isabstract(cls):
        raise KindError(location, f"expected a subclass of {base.__name__}, got {path}")
    return replace(read_arguments(cls, arguments, location, deferred), path=path)


def read_arguments(cls: type, arguments: Mapping[str, Any], location: str, deferred: int | None = None) -> ClassSpec:
    """Checks the arguments of a class against its constructor. See `read_class` for the parameters.

    Raises:
        ValueError: If an argument is unknown, missing or of a wrong type.
    """
    all_parameters = list(constructor_parameters(cls).items())
    parameters = dict(all_parameters[deferred or 0 :])
    accepted: dict[str, Any] = {}
    for name, value in arguments.items():
        if name not in parameters:
            raise ValueError(f"{location}: {cls.__name__} has no option {name!r}")
        inner_location = f"{location}.{name}" if location else name
        accepted[name] = read_value(value, parameters[name].hint, inner_location)
    required = [name for name, parameter in parameters.items() if parameter.is_required]
    missing = [name for name in required if name not in accepted]
    if missing:
        raise ValueError(f"{location}: {cls.__name__} requires {', '.join(missing)}")
    return ClassSpec(cls, accepted, class_path(cls), deferred is not None)


def _class_parts(value: Any, location: str) -> tuple[Any, Mapping[str, Any]]:
    """Returns the import path and the arguments of a class."""
    if isinstance(value, str):
        return value, {}
    if not isinstance(value, Mapping) or "class_path" not in value or set(value) - CLASS_KEYS:
        raise ValueError(f"{location}: expected a class_path and init_args, got {shorten(value)}")
    arguments: dict[str, Any] = {}
    for key in ("init_args", "dict_kwargs"):
        part = value.get(key) or {}
        if not isinstance(part, Mapping) or not all(isinstance(name, str) for name in part):
            raise ValueError(f"{location}.{key}: expected a mapping, got {shorten(part)}")
        arguments |= part
    return value["class_path"], arguments


def read_value(value: Any, hint: Any, location: str) -> Any:
    """Reads a value by its type hint.

    Returns:
        A plain value or a `ClassSpec`.

    Raises:
        ValueError: If the value has another type.
    """
    if get_origin(hint) is not None:
        return _read_generic(value, hint, location)
    if hint in (Any, object, inspect.Parameter.empty):
        return _read_any(value, location)
    if hint in (None, NoneType) and value is None:
        return None
    if isinstance(hint, type):
        return _read_simple(value, hint, location)
    raise _wrong(value, hint, location)


def _read_generic(value: Any, hint: Any, location: str) -> Any:
    """Reads a value by a type hint with parameters, such as `Sequence[int]`."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return read_value(value, inner[0], location)
    if origin in (Union, UnionType):
        return _read_union(value, inner, location)
    if origin is Callable:
        return _read_callable(value, inner, location)
    if isinstance(origin, type):
        return _read_container(value, origin, inner, location)
    if origin is Literal and any(value == literal and type(value) is type(literal) for literal in inner):
        return value
    raise _wrong(value, hint, location)


def _read_simple(value: Any, hint: type, location: str) -> Any:
    """Reads a value by a class: a scalar, a path, a container or an object."""
    if hint in SCALARS:
        return _read_scalar(value, hint, location)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint in (dict, list, tuple):
        return _read_container(value, hint, (), location)
    has_no_subclass = is_dataclass(hint) or getattr(hint, "__final__", False)  # configs then omit the class
    if has_no_subclass and isinstance(value, Mapping) and "class_path" not in value:
        return replace(read_arguments(hint, value, location), is_named=False)
    return read_class(value, hint, location)


def _read_scalar(value: Any, hint: type, location: str) -> Any:
    if hint is float and type(value) is int and abs(value) < 2**1000:
        return float(value)
    if type(value) is hint:
        return value
    raise _wrong(value, hint, location)


def _read_union(value: Any, members: Sequence[Any], location: str) -> Any:
    """Reads a value by the first matching member; the error is that of the most plausible member."""
    if value is None and NoneType in members:
        return None
    errors: list[ValueError] = []
    types = [member for member in members if member is not NoneType]
    for member in sorted(types, key=lambda member: not _is_type_of(value, member)):  # the exact type first
        try:
            return read_value(value, member, location)
        except ValueError as error:
            errors.append(error)
    if not errors:
        raise _wrong(value, NoneType, location)
    is_other_kind = [isinstance(error, KindError) and error.location == location for error in errors]
    specific = [error for error, is_other in zip(errors, is_other_kind, strict=True) if not is_other] or errors
    names_class = isinstance(value, Mapping) and "class_path" in value
    raise specific[-1 if names_class else 0]


def _is_type_of(value: Any, hint: Any) -> bool:
    """Whether a hint, such as `list[int]`, is of exactly the type of a value."""
    origin: Any = get_origin(hint)
    return (origin or hint) is type(value)


def _read_any(value: Any, location: str) -> Any:
    """Reads a plain value of any type. Classes are refused, because no base class is known."""
    check_plain(value, location)
    for mapping in iterate_mappings(value):
        if "class_path" in mapping:
            raise ValueError(f"{location}: expected plain values, got {shorten(mapping)}")
    return value


def _read_callable(value: Any, inner: Sequence[Any], location: str) -> ClassSpec:
    """Reads a class whose objects the function returns; a file never names functions."""
    error = ValueError(f"{location}: a file cannot name a function")
    if len(inner) != 2 or not isinstance(inner[0], list):
        raise error
    parameters, result = inner
    errors: list[ValueError] = []
    for member in get_args(result) or [result]:
        if isinstance(member, type) and member is not NoneType:
            try:
                return read_class(value, member, location, deferred=len(parameters))
            except ValueError as refusal:
                errors.append(refusal)
    raise errors[0] if errors else error


def _read_container(value: Any, origin: type, inner: Sequence[Any], location: str) -> Any:
    if issubclass(origin, Mapping):
        return _read_mapping(value, origin, inner, location)
    is_sequence = issubclass(origin, Iterable) and not issubclass(origin, str)
    if not is_sequence or not isinstance(value, list | tuple):
        raise _wrong(value, origin, location)
    if issubclass(origin, tuple):
        return tuple(_read_items(value, inner or (Any, Ellipsis), location))
    hint = inner[0] if inner else Any
    return _read_items(value, (hint, Ellipsis), location)


def _read_mapping(value: Any, origin: type, inner: Sequence[Any], location: str) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(value, origin, location)
    key_hint, value_hint = inner or (Any, Any)
    items = {}
    for key, item in value.items():
        items[_read_key(key, key_hint, location)] = read_value(item, value_hint, f"{location}.{key}")
    return items


def _read_items(value: Sequence[Any], inner: Sequence[Any], location: str) -> list[Any]:
    """Reads the items of a sequence by the parameters of a tuple: one for each item, or one and an ellipsis."""
    hints = list(inner)
    if hints[-1:] == [Ellipsis]:
        hints = hints[:1] * len(value)
    if len(hints) != len(value):
        raise ValueError(f"{location}: expected {len(hints)} values, got {len(value)}")
    pairs = enumerate(zip(value, hints, strict=True))
    return [read_value(item, hint, f"{location}[{position}]") for position, (item, hint) in pairs]


def _read_key(key: Any, hint: Any, location: str) -> Any:
    if hint is int and isinstance(key, str) and key.lstrip("-").isdecimal():
        return int(key)
    if hint is str and type(key) in (int, float):  # YAML reads unquoted names such as 1 as numbers
        return str(key)
    return read_value(key, hint, location)


@cache
def constructor_parameters(cls: type) -> dict[str, Parameter]:
    """Returns the parameters of a constructor in order, including those that it passes to its base classes.

    A class lists the parameters of base classes that it sets itself in `fixed_options`.
    """
    fixed: Sequence[str] = getattr(cls, "fixed_options", ())
    parameters: dict[str, Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        for name, hint in UNNAMED_OPTIONS.get(base, {}).items():
            parameters.setdefault(name, Parameter(hint, is_required=False))
        signature = inspect.signature(base.__init__)  # type: ignore[misc]
        base_parameters = list(signature.parameters.values())[1:]
        hints = _type_hints(base)
        for parameter in base_parameters:
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) and parameter.name not in fixed:
                is_required = parameter.default is parameter.empty
                parameters.setdefault(parameter.name, Parameter(hints.get(parameter.name, Any), is_required))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in base_parameters):
            break
    return parameters


def _type_hints(cls: type) -> dict[str, Any]:
    try:
        if is_dataclass(cls) and "__init__" in vars(cls):  # inherited fields have the names of their own modules
            return get_type_hints(cls, include_extras=True)
        return get_type_hints(cls.__init__, include_extras=True)  # type: ignore[misc]
    except NameError:  # the names are imported only for type checkers: only plain values are accepted
        return {}


def _wrong(value: Any, hint: Any, location: str) -> ValueError:
    expected = str(hint) if get_args(hint) else getattr(hint, "__name__", str(hint))
    return KindError(location, f"expected {expected}, got {shorten(value)}")
