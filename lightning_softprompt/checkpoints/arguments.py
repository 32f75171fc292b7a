"""Plain values from a file, read against the type of the argument that they are for.

Reading checks everything and creates nothing: it gives plain values and objects of `Spec`. `build` then calls the
classes of these objects, all of which are registered, and nothing else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from lightning_softprompt.checkpoints.registry import check_class, class_path, find_class

CLASS_KEYS = {"class_path", "init_args", "dict_kwargs"}
MAX_DEPTH = 32
MAX_VALUES = 200_000
SCALARS = (bool, int, float, str)
PLAIN = (*SCALARS, NoneType)


@dataclass(frozen=True)
class Spec:
    """A registered class with checked arguments.

    Args:
        cls: The class.
        arguments: Plain values and further specs, by name.
        path: The import path by which the file names the class.
        deferred: Whether the argument takes a function that makes the object, and not the object itself.
        is_named: Whether a config names the class; where only one class is possible, it holds the arguments alone.
    """

    cls: type
    arguments: Mapping[str, Any]
    path: str
    deferred: bool = False
    is_named: bool = True


@dataclass(frozen=True)
class Parameter:
    """A parameter of a constructor.

    Args:
        hint: Its type.
        required: Whether it has no default.
    """

    hint: Any
    required: bool


def build(value: Any) -> Any:
    """The objects that checked values describe."""
    if isinstance(value, Spec):
        arguments = {name: build(one) for name, one in value.arguments.items()}
        return partial(value.cls, **arguments) if value.deferred else value.cls(**arguments)
    if isinstance(value, list | tuple):
        return type(value)(build(one) for one in value)
    if isinstance(value, dict):
        return {name: build(one) for name, one in value.items()}
    return value


def as_config(value: Any) -> Any:
    """Checked values in the form of a config file, with each class by the path that named it."""
    if isinstance(value, Spec):
        arguments = as_config(dict(value.arguments))
        return {"class_path": value.path, "init_args": arguments} if value.is_named else arguments
    if isinstance(value, list | tuple):
        return [as_config(one) for one in value]
    if isinstance(value, dict):
        return {name: as_config(one) for name, one in value.items()}
    return str(value) if isinstance(value, Path) else value


def check_plain(value: Any, place: str = "") -> None:
    """Refuses what a config file could not hold, deep nesting, and so many values that reading them takes long.

    Raises:
        ValueError: Naming the place.
    """
    left, stack = MAX_VALUES, [(value, 0)]
    while stack:
        one, depth = stack.pop()
        left -= 1
        if depth > MAX_DEPTH or left < 0:
            limit = f"{MAX_DEPTH} levels" if depth > MAX_DEPTH else f"{MAX_VALUES:,} values"
            raise ValueError(f"{place or 'it'} holds more than {limit}")
        if isinstance(one, Mapping):
            stack.extend((inner, depth + 1) for pair in one.items() for inner in pair)
        elif isinstance(one, list | tuple):
            stack.extend((inner, depth + 1) for inner in one)
        elif not isinstance(one, PLAIN):
            raise ValueError(f"{place or 'it'} holds a {type(one).__name__}; expected plain values")


def check_names(value: Any, place: str) -> None:
    """Refuses values that are not needed here but name what no plug-in can be, as only a forged file does.

    Raises:
        ValueError: Naming the place.
    """
    for one in _mappings(value):
        if "class_path" in one:
            try:
                check_class(one["class_path"])
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error


def _mappings(value: Any) -> Iterator[Mapping[Any, Any]]:
    stack = [value]
    while stack:
        one = stack.pop()
        if isinstance(one, Mapping):
            yield one
            stack.extend(one.values())
        elif isinstance(one, list | tuple):
            stack.extend(one)


def read_class(value: Any, base: type, place: str, deferred: int | None = None) -> Spec:
    """A registered class, and its arguments, from `{class_path, init_args}` or from the import path alone.

    Args:
        value: What the file holds.
        base: The class must be a subclass of it.
        place: Names the value in errors.
        deferred: How many leading arguments the caller of a function gives later; None makes the object itself.

    Raises:
        ValueError: If the class may not be named or is not of that base, or an argument is wrong.
    """
    path, arguments = _class_parts(value, place)
    try:
        cls = base if path == class_path(base) else find_class(path)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    if not issubclass(cls, base) or inspect.isabstract(cls):
        raise ValueError(f"{place}: expected a subclass of {base.__name__}, got {path}")
    return replace(read_arguments(cls, arguments, place, deferred), path=path)


def read_arguments(cls: type, arguments: Mapping[str, Any], place: str, deferred: int | None = None) -> Spec:
    """A class with arguments that are checked against its constructor.

    Raises:
        ValueError: If an argument is unknown, missing or of a wrong type.
    """
    parameters = dict(list(parameters_of(cls).items())[deferred or 0 :])
    accepted: dict[str, Any] = {}
    for name, value in arguments.items():
        if name not in parameters:
            raise ValueError(f"{place}: {cls.__name__} has no option {name!r}")
        accepted[name] = read_value(value, parameters[name].hint, f"{place}.{name}" if place else name)
    missing = [name for name, parameter in parameters.items() if parameter.required and name not in accepted]
    if missing:
        raise ValueError(f"{place}: {cls.__name__} needs {', '.join(missing)}")
    return Spec(cls, accepted, class_path(cls), deferred is not None)


def _class_parts(value: Any, place: str) -> tuple[Any, Mapping[str, Any]]:
    if isinstance(value, str):
        return value, {}
    if not isinstance(value, Mapping) or "class_path" not in value or set(value) - CLASS_KEYS:
        raise ValueError(f"{place}: expected a class_path and init_args, got {shorten(value)}")
    arguments: dict[str, Any] = {}
    for key in ("init_args", "dict_kwargs"):
        part = value.get(key) or {}
        if not isinstance(part, Mapping) or not all(isinstance(name, str) for name in part):
            raise ValueError(f"{place}.{key}: expected a mapping, got {shorten(part)}")
        arguments |= part
    return value["class_path"], arguments


def read_value(value: Any, hint: Any, place: str) -> Any:
    """A plain value or a spec, checked against a type.

    Raises:
        ValueError: If it is of another type.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin is not None:
        return _read_generic(value, hint, origin, inner, place)
    if hint in (Any, object, inspect.Parameter.empty):
        return _read_any(value, place)
    if hint in (None, NoneType) and value is None:
        return None
    if isinstance(hint, type):
        return _read_simple(value, hint, place)
    raise _wrong(value, hint, place)


def _read_generic(value: Any, hint: Any, origin: Any, inner: Sequence[Any], place: str) -> Any:
    """A value against a type with parts, such as `Sequence[int]`."""
    if origin is Annotated:
        return read_value(value, inner[0], place)
    if origin in (Union, UnionType):
        return _read_union(value, inner, place)
    if origin is Callable:
        return _read_callable(value, inner, place)
    if isinstance(origin, type):
        return _read_container(value, origin, inner, place)
    if origin is Literal and any(value == known and type(value) is type(known) for known in inner):
        return value
    raise _wrong(value, hint, place)


def _read_simple(value: Any, hint: type, place: str) -> Any:
    if hint in SCALARS:
        if hint is float and type(value) is int and abs(value) < 2**1000:
            return float(value)
        if type(value) is hint:
            return value
        raise _wrong(value, hint, place)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint in (dict, list, tuple):
        return _read_container(value, hint, (), place)
    is_only_class = is_dataclass(hint) or getattr(hint, "__final__", False)  # the command line asks for no name
    if is_only_class and isinstance(value, Mapping) and "class_path" not in value:
        return replace(read_arguments(hint, value, place), is_named=False)
    return read_class(value, hint, place)


def _read_union(value: Any, members: Sequence[Any], place: str) -> Any:
    """The first member that the value fits; the error is that of the member that comes closest."""
    if value is None and NoneType in members:
        return None
    errors: list[ValueError] = []
    exact = sorted((m for m in members if m is not NoneType), key=lambda member: member is not type(value))
    for member in exact:
        try:
            return read_value(value, member, place)
        except ValueError as error:
            errors.append(error)
    takes_classes = isinstance(value, Mapping) and "class_path" in value
    raise errors[-1 if takes_classes else 0] if errors else _wrong(value, NoneType, place)


def _read_any(value: Any, place: str) -> Any:
    """A plain value; a class has no place where nothing says which one is expected."""
    check_plain(value, place)
    if named := next((one for one in _mappings(value) if "class_path" in one), None):
        raise ValueError(f"{place}: expected plain values, got {shorten(named)}")
    return value


def _read_callable(value: Any, inner: Sequence[Any], place: str) -> Spec:
    """A class whose objects the function gives; functions themselves are never named by files."""
    if len(inner) != 2 or not isinstance(inner[0], list):
        raise ValueError(f"{place}: a file cannot give a function")
    results = [one for one in (get_args(inner[1]) or [inner[1]]) if isinstance(one, type) and one is not NoneType]
    errors: list[ValueError] = []
    for result in results:
        try:
            return read_class(value, result, place, deferred=len(inner[0]))
        except ValueError as error:
            errors.append(error)
    raise errors[0] if errors else ValueError(f"{place}: a file cannot give a function")


def _read_container(value: Any, origin: type, inner: Sequence[Any], place: str) -> Any:
    if issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise _wrong(value, origin, place)
        of_key, of_value = inner or (Any, Any)
        return {_read_key(k, of_key, place): read_value(v, of_value, f"{place}.{k}") for k, v in value.items()}
    if issubclass(origin, str) or not issubclass(origin, Iterable):
        raise _wrong(value, origin, place)
    if not isinstance(value, list | tuple):
        raise _wrong(value, origin, place)
    if issubclass(origin, tuple):
        return tuple(_read_items(value, inner, place))
    of_item = inner[0] if inner else Any
    return [read_value(one, of_item, f"{place}[{i}]") for i, one in enumerate(value)]


def _read_items(value: Sequence[Any], inner: Sequence[Any], place: str) -> list[Any]:
    hints = [Any] * len(value) if not inner else list(inner)
    if hints[-1:] == [Ellipsis]:
        hints = hints[:1] * len(value)
    if len(hints) != len(value):
        raise ValueError(f"{place}: expected {len(hints)} values, got {len(value)}")
    return [read_value(one, hint, f"{place}[{i}]") for i, (one, hint) in enumerate(zip(value, hints, strict=True))]


def _read_key(key: Any, hint: Any, place: str) -> Any:
    if hint is int and isinstance(key, str) and key.lstrip("-").isdecimal():
        return int(key)
    if hint is str and type(key) in (int, float):  # YAML reads unquoted names such as 1 as numbers
        return str(key)
    return read_value(key, hint, place)


@cache
def parameters_of(cls: type) -> dict[str, Parameter]:
    """Parameters of a constructor in order, with those that it passes on to the constructors of its bases."""
    found: dict[str, Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        own = list(inspect.signature(base.__init__).parameters.values())[1:]  # type: ignore[misc]
        hints = _hints(base)
        for parameter in own:
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                required = parameter.default is parameter.empty
                found.setdefault(parameter.name, Parameter(hints.get(parameter.name, Any), required))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own):
            break
    return found


def _hints(cls: type) -> dict[str, Any]:
    try:
        return get_type_hints(cls.__init__, include_extras=True)  # type: ignore[misc]
    except NameError:  # names that only a type checker imports: plain values alone are accepted
        return {}


def shorten(value: object) -> str:
    """A value's representation, cut."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}..."


def _wrong(value: Any, hint: Any, place: str) -> ValueError:
    expected = getattr(hint, "__name__", str(hint)) if not get_args(hint) else str(hint)
    return ValueError(f"{place}: expected {expected}, got {shorten(value)}")
