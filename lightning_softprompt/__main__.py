"""The `softprompt` command: answers at once what needs no torch, and hands runs over to `cli.app`."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO, cast

from lightning_softprompt import __version__
from lightning_softprompt.cli.commands import LIGHT_COMMANDS, RUN_COMMANDS, TRACEBACK_VARIABLE
from lightning_softprompt.cli.commands.configs import configs_folder
from lightning_softprompt.system.atomic_files import expand_home
from lightning_softprompt.system.errors import CommandError
from lightning_softprompt.system.printable import PrintableStream, one_line, printable
from lightning_softprompt.system.trust import parse_trust_options, trust_modules

HELP = """\
softprompt: soft-prompt tuning of frozen language models in PyTorch Lightning.

Usage: softprompt COMMAND [OPTIONS]

Runs:
{run}

Beside runs:
{light}

Examples:
  softprompt quickstart
  softprompt fit --model PromptTuning --model.length 20 --data {configs}/data/sst2.yaml
  softprompt fit --model PromptTuning --data {configs}/data/sst2.yaml --print_config

A run is put together from configs and options, later ones over earlier ones. The configs that ship are in
{configs}; `softprompt configs` lists them.
Options of a command: softprompt COMMAND --help    Of a class: softprompt fit --model.help NAME
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: The words behind `softprompt`; those of the process if None.
    """
    argv = expand_home(sys.argv[1:] if argv is None else argv)
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if command in {"-h", "--help", "help"}:
        print(help_page(), end="")
    elif command == "--version":
        print(f"softprompt {__version__}")
    elif command in LIGHT_COMMANDS:
        return _light(command, rest)
    elif command in RUN_COMMANDS or command.startswith("-"):
        from lightning_softprompt.cli import app

        code: int = app.main(argv)
        return code
    else:
        return _unknown(command)
    return 0


def help_page() -> str:
    """What `softprompt --help` shows."""
    return HELP.format(run=_listed(RUN_COMMANDS), light=_listed(LIGHT_COMMANDS), configs=_configs())


def _listed(commands: Mapping[str, str]) -> str:
    return "\n".join(f"  {name:11} {text}" for name, text in commands.items())


def _configs() -> str:
    try:
        folder = configs_folder()
    except CommandError:
        return "configs"
    return str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)


def _light(command: str, argv: list[str]) -> int:
    try:
        modules, argv = parse_trust_options(argv)
        with trust_modules(modules), _plain_output(command):
            code: int = import_module(f"lightning_softprompt.cli.commands.{command}").main(argv)
        sys.stdout.flush()
    except CommandError as error:
        print(f"softprompt {command}: error: {printable(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # whatever a damaged or forged file leads to
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
        print(f"softprompt {command}: error: {kind}{one_line(error)}", file=sys.stderr)
        print(f"to see where: {TRACEBACK_VARIABLE}=1", file=sys.stderr)
        return 2
    return code


def _plain_output(command: str) -> AbstractContextManager[Any]:
    """Nothing that a command prints controls the terminal; the quickstart formats its own output."""
    if command == "quickstart":
        return nullcontext()
    return redirect_stdout(cast(TextIO, PrintableStream(sys.stdout)))


def _unknown(command: str) -> int:
    close = get_close_matches(command, [*RUN_COMMANDS, *LIGHT_COMMANDS])
    hint = f"Did you mean {' or '.join(close)}?" if close else f"It has {', '.join([*RUN_COMMANDS, *LIGHT_COMMANDS])}."
    print(f"softprompt: error: no command {command!r}\n{hint} All: softprompt --help", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
