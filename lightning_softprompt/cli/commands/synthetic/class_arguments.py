"""Options of commands that name a writer or filters, and classes of their arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jsonargparse

from lightning_softprompt.system.errors import CommandError


class ClassParser(jsonargparse.ArgumentParser):  # type: ignore[misc]
    """A parser of options that name classes. Mistakes are errors of the command."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raises a mistake in the options.

        Raises:
            CommandError: Always.
        """
        lines = [line.strip() for line in str(message).splitlines() if line.strip()]
        raise CommandError("\n".join(lines)) from ex


def parse_classes(parser: ClassParser, arguments: Sequence[str]) -> Any:
    """Parses options and returns a namespace of their objects."""
    return parser.instantiate_classes(parser.parse_args(list(arguments)))
