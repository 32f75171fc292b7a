"""The arguments that an object was created with."""

from __future__ import annotations

from inspect import getargvalues
from types import FrameType
from typing import Any


def constructor_arguments(frame: FrameType | None) -> dict[str, Any]:
    """Returns the arguments of the constructor call of an object by name, with defaults.

    Args:
        frame: The current frame in the `__init__` of the class or of a base class, which the constructors of subclasses
            have called. Their arguments are returned if they have not changed them.
    """
    arguments: dict[str, Any] = {}
    instance = None
    while frame is not None and frame.f_code.co_name == "__init__":
        names, _, keywords, values = getargvalues(frame)
        if instance is not None and values.get(names[0]) is not instance:
            break  # the object is created inside the constructor of another one
        instance = values[names[0]]
        arguments = {name: values[name] for name in names[1:]}
        arguments |= values[keywords] if keywords else {}
        frame = frame.f_back
    return arguments
