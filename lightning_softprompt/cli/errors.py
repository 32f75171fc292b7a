"""Error messages for users, in one line each, and the configuration of logging and warnings."""

from __future__ import annotations

import logging
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import lightning
import rich
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_softprompt.cli.output import format_warning
from lightning_softprompt.cli.parsing.explain import creation_error
from lightning_softprompt.system.printable import PrintableFormatter, one_line
from lightning_softprompt.training.notices import LOGGERS, NOISE, is_relevant

USER_FACING_FOLDERS = (str(Path(__file__).parents[1]), str(Path(lightning.__file__).parent))
USER_FACING_ERRORS = (ValueError, RuntimeError, MisconfigurationException)
PLAIN_TEXT = {"markup": False, "emoji": False}  # metric names in tables are not markup
COMPILER_MODULES = ("torch._dynamo", "torch._inductor")  # raise errors if a machine has no working compiler


def configure_output() -> None:
    """Show the package's own log and warnings, and hide messages about how it uses its libraries."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PrintableFormatter("%(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("lightning_softprompt").setLevel(logging.INFO)
    for logger in LOGGERS:
        logger.addFilter(is_relevant)
    logging.getLogger("transformers.tokenization_utils_base").addFilter(_is_about_rows)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # the package itself reports an unreachable hub, once
    rich.reconfigure(**PLAIN_TEXT)
    warnings.formatwarning = format_warning
    for pattern in NOISE:
        warnings.filterwarnings("ignore", message=pattern)


def _is_about_rows(record: logging.LogRecord) -> bool:
    """Whether a message of a tokenizer is not its warning about long texts, which are truncated or refused later."""
    return not record.getMessage().startswith("Token indices sequence length is longer than")


def describe_error(error: Exception) -> str:
    """Describe an error in one line: by its message if that addresses users, else by its type, place and message."""
    user_facing = next((e for e in _chain(error) if isinstance(e, USER_FACING_ERRORS) and _is_user_facing(e)), None)
    if user_facing is not None:
        return one_line(user_facing)
    if isinstance(error, (OSError, ImportError, MisconfigurationException)):
        return one_line(error)
    if reason := creation_error(str(error)):
        return one_line(reason)
    if type(error).__module__.startswith(COMPILER_MODULES):
        details = " ".join(str(error).splitlines()[:2])
        return one_line(f"--backbone.compiled: PyTorch cannot compile the layers here ({details}); set it to false")
    last = traceback.extract_tb(error.__traceback__)[-1]
    file = last.filename.rpartition("site-packages/")[2]
    return f"{type(error).__name__} at {file}:{last.lineno}: {one_line(error)}"


def is_restore_error(error: Exception) -> bool:
    """Whether an error comes from the state in a checkpoint, and not from a check that explains it."""
    frames = traceback.extract_tb(error.__traceback__)
    connector = [frame for frame in frames if Path(frame.filename).name == "checkpoint_connector.py"]
    restores = any(frame.name.lstrip("_").startswith("restore") for frame in connector)
    last = frames[-1]
    is_check = last.filename.startswith(USER_FACING_FOLDERS[0]) and str(last.line).startswith("raise")
    return restores and not is_check


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes; jsonargparse wraps the errors of constructors."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_user_facing(error: BaseException) -> bool:
    """Whether an error was raised in a package whose messages address users."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return last.filename.startswith(USER_FACING_FOLDERS)
