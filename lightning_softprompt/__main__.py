"""The `softprompt` command: starts the commands that need no torch itself, and passes runs to `cli.app`."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO, cast

from lightning_softprompt import __version__
from lightning_softprompt.cli.commands import (
    LIGHT_COMMANDS,
    RENAMED_COMMANDS,
    RUN_COMMANDS,
    TRACEBACK_HINT,
    TRACEBACK_VARIABLE,
    import_command,
)
from lightning_softprompt.cli.commands.configs import configs_folder
from lightning_softprompt.cli.output import show_warning
from lightning_softprompt.moved import REMOVED_IN
from lightning_softprompt.system.atomic_files import expand_home
from lightning_softprompt.system.errors import CommandError
from lightning_softprompt.system.printable import PrintableStream, one_line, printable
from lightning_softprompt.system.trust import parse_trust_options, trust_modules

HELP = """\
softprompt: soft-prompt tuning of frozen language models in PyTorch Lightning.

Usage: softprompt COMMAND [OPTIONS]

Train and evaluate:
{run}

Other commands:
{light}

Examples:
  softprompt quickstart
  softprompt fit --model PromptTuning --model.length 20 --data {configs}/data/sst2.yaml
  softprompt fit --model PromptTuning --data {configs}/data/sst2.yaml --print_config

Configs and options are merged in order; later values override earlier ones. `softprompt configs` lists the bundled
configs in {configs}.
Options of a command: softprompt COMMAND --help    Options of a class: softprompt fit --model.help NAME
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: The arguments after `softprompt`; the arguments of the process if None.
    """
    argv = expand_home(sys.argv[1:] if argv is None else argv)
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if command in RENAMED_COMMANDS:
        command = _current_name(command)
    if command in {"-h", "--help", "help"}:
        print(help_page(), end="")
    elif command == "--version":
        print(f"softprompt {__version__}")
    elif command in LIGHT_COMMANDS:
        return _run_light(command, rest)
    elif command in RUN_COMMANDS or command.startswith("-"):
        app = _import_app()
        code: int = app.main(argv)
        return code
    else:
        return _report_unknown(command)
    return 0


def _import_app() -> ModuleType:
    """Import torch, Lightning and the commands that need them.

    These imports create more than a million objects that stay in use. To search them for garbage, during the imports
    and again at exit, takes a third of the time of `softprompt fit --help`.
    """
    name = "lightning_softprompt.cli.app"
    if name in sys.modules:
        return sys.modules[name]
    gc.disable()
    try:
        app = import_module(name)
        gc.freeze()
    finally:
        gc.enable()
    return app


def _current_name(command: str) -> str:
    """The current name of a renamed command, announced in one line."""
    name = RENAMED_COMMANDS[command]
    print(
        f"softprompt {command} is now softprompt {name}; the old name will be removed in {REMOVED_IN}", file=sys.stderr
    )
    return name


def help_page() -> str:
    """The text of `softprompt --help`."""
    return HELP.format(run=_format(RUN_COMMANDS), light=_format(LIGHT_COMMANDS), configs=_configs())


def _format(commands: Mapping[str, str]) -> str:
    width = max(map(len, LIGHT_COMMANDS))
    return "\n".join(f"  {name:{width}} {text}" for name, text in commands.items())


def _configs() -> str:
    try:
        folder = configs_folder()
    except CommandError:
        return "configs"
    return str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)


def _run_light(command: str, argv: list[str]) -> int:
    try:
        modules, argv = parse_trust_options(argv)
        with trust_modules(modules), _plain_output(command), warnings.catch_warnings():
            warnings.showwarning = show_warning
            code: int = import_command(command).main(argv)
        sys.stdout.flush()
    except CommandError as error:
        print(f"softprompt {command}: error: {printable(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # a damaged or forged file may raise any error
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
        print(f"softprompt {command}: error: {kind}{one_line(error)}", file=sys.stderr)
        print(TRACEBACK_HINT, file=sys.stderr)
        return 2
    return code


def _plain_output(command: str) -> AbstractContextManager[Any]:
    """Escape control characters in what a command prints, except the quickstart, which formats its own output."""
    if command == "quickstart":
        return nullcontext()
    return redirect_stdout(cast(TextIO, PrintableStream(sys.stdout)))


def _report_unknown(command: str) -> int:
    commands = [*RUN_COMMANDS, *LIGHT_COMMANDS]
    close = get_close_matches(command, commands)
    hint = f"Did you mean {' or '.join(close)}?" if close else f"Commands: {', '.join(commands)}."
    print(f"softprompt: error: unknown command {command!r}\n{hint} See `softprompt --help`", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
