"""Turns errors of transformers and PyTorch into refusals that name the backbone and the reason."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError

PACKAGE = str(Path(__file__).parents[1])
# The errors that transformers and PyTorch raise for files, configurations and architectures that they cannot use.
FAILURES = (
    *(OSError, ValueError, TypeError, AttributeError, LookupError, AssertionError, ArithmeticError),
    *(RuntimeError, ImportError, StrictDataclassError),
)


class UnsupportedBackboneError(ValueError):
    """A backbone that a method, or the whole package, cannot use."""


class MissingTaskError(ValueError):
    """Rows without task ids, although their prompt depends on the task."""


def refusing(subject: str, remedy: str) -> AbstractContextManager[None]:
    """Turns failures within the context into refusals; the package's own errors pass unchanged.

    Args:
        subject: The failed action, such as `backbone 'x' cannot run`.
        remedy: What to do instead, as a sentence.

    Raises:
        UnsupportedBackboneError: With the reason.
    """
    return _refuse_failures(lambda error: f"{subject}: {reason_of(error)} {remedy}")


def explaining(explanation: str) -> AbstractContextManager[None]:
    """Turns failures of transformers and PyTorch within the context into refusals that begin with an explanation.

    Args:
        explanation: What the failure means, as a clause without a full stop.

    Raises:
        UnsupportedBackboneError: With the explanation, and the first line of the failure in parentheses.
    """
    return _refuse_failures(lambda error: f"{explanation} ({reason_of(error).rstrip('.')}).")


@contextmanager
def _refuse_failures(describe: Callable[[BaseException], str]) -> Iterator[None]:
    """Raises failures within the context as `UnsupportedBackboneError`; the package's own errors pass unchanged."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        if isinstance(error, ValueError) and _is_ours(error):
            raise
        raise UnsupportedBackboneError(describe(error)) from error


def reason_of(error: BaseException) -> str:
    """Returns the first line of an error's message as a sentence, with its type unless the message explains itself."""
    lines = str(error).strip().splitlines()
    if not lines:
        return f"{type(error).__name__}."
    explains_itself = isinstance(error, OSError | ValueError)
    reason = lines[0] if explains_itself else f"{type(error).__name__}: {lines[0]}"
    return reason if reason.endswith((".", "!", "?")) else f"{reason}."


def _is_ours(error: BaseException) -> bool:
    frame = traceback.extract_tb(error.__traceback__)[-1]  # the one that raised it
    return frame.filename.startswith(PACKAGE)
