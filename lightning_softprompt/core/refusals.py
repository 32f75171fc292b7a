"""Errors of transformers and PyTorch as refusals that name the backbone and the reason."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError

PACKAGE = str(Path(__file__).parents[1])
# What transformers and PyTorch raise for files, configurations and architectures that they cannot use.
FAILURES = (
    *(OSError, ValueError, TypeError, AttributeError, LookupError, AssertionError, ArithmeticError),
    *(RuntimeError, ImportError, StrictDataclassError),
)


class UnsupportedBackboneError(ValueError):
    """A backbone that a method, or the whole package, cannot use."""


def refusing(subject: str, way_out: str) -> AbstractContextManager[None]:
    """Turns failures of what runs inside into refusals; messages of the package itself pass unchanged.

    Args:
        subject: What cannot be done, such as `backbone 'x' cannot run`.
        way_out: What to do instead, as a sentence.

    Raises:
        UnsupportedBackboneError: With the reason.
    """
    return _refuse_failures(lambda error: f"{subject}: {reason_of(error)} {way_out}")


def explaining(explanation: str) -> AbstractContextManager[None]:
    """Turns failures of transformers and PyTorch inside into refusals that open with an explanation.

    Args:
        explanation: What the failure means, as a clause without a full stop.

    Raises:
        UnsupportedBackboneError: With the explanation, and the first line of the failure in parentheses.
    """
    return _refuse_failures(lambda error: f"{explanation} ({reason_of(error).rstrip('.')}).")


@contextmanager
def _refuse_failures(describe: Callable[[BaseException], str]) -> Iterator[None]:
    """Raises failures inside as `UnsupportedBackboneError` with a description; the package's own errors pass."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        if isinstance(error, ValueError) and _is_ours(error):
            raise
        raise UnsupportedBackboneError(describe(error)) from error


def reason_of(error: BaseException) -> str:
    """The first line of an error's message as a sentence, with its type where the message does not explain itself."""
    lines = str(error).strip().splitlines()
    if not lines:
        return f"{type(error).__name__}."
    reason = lines[0] if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {lines[0]}"
    return reason if reason.endswith((".", "!", "?")) else f"{reason}."


def _is_ours(error: BaseException) -> bool:
    return traceback.extract_tb(error.__traceback__)[-1].filename.startswith(PACKAGE)
