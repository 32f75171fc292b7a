"""Reads the parts of an error message of jsonargparse: options, classes, types and values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile

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


def block_below(message: str, key: re.Match[str]) -> str:
    """The part of a message about a key: the lines below it that are indented further."""
    lines = message[key.end() :].splitlines()[1:]
    deeper = " " * (len(key[1]) + 1)
    return "\n".join(takewhile(lambda line: line.startswith(deeper), lines))


def full_option_name(keys: Sequence[re.Match[str]]) -> str:
    """The full name of the innermost key; the keys around it are indented less."""
    names = [keys[-1][2]]
    indent = len(keys[-1][1])
    for key in reversed(keys[:-1]):
        if len(key[1]) < indent:
            names, indent = [key[2], *names], len(key[1])
    return ".".join(names)


def option_before(message: str, position: int) -> str:
    """The full name of the option that a position in a message refers to; empty if there is none."""
    keys = [key for key in KEY.finditer(message) if key.start() < position and key.end() < position]
    return full_option_name(keys) if keys else ""


def type_names(text: str) -> list[str]:
    """Names of the types and choices in a list of types as jsonargparse formats it."""
    return [*map(last_part, TYPE.findall(text)), *map(format_choices, LITERAL.finditer(text))]


def format_choices(found: re.Match[str]) -> str:
    """The choices of a literal type."""
    return "one of " + found[1].replace("'", "")


def format_type(found: re.Match[str]) -> str:
    """The name of a type."""
    return last_part(found[1])


def last_part(path: str) -> str:
    """The name of a class without its module."""
    return path.rpartition(".")[2]


def last_groups(pattern: re.Pattern[str], message: str) -> tuple[str, ...] | None:
    """The groups of the last match, which is the innermost reason; None if there is no match."""
    found = list(pattern.finditer(message))
    return found[-1].groups() if found else None
