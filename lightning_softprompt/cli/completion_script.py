"""The shell completion script of the run commands, from their parsers."""

from __future__ import annotations

from argparse import HelpFormatter
from collections.abc import Sequence

from lightning_softprompt.cli.app import SoftPromptCLI, make_cli
from lightning_softprompt.cli.parsing.parser import Parser


class CompletionCLI(SoftPromptCLI):
    """Builds the parsers of the run commands and raises their completion script instead of parsing."""

    def parse_arguments(self, parser: Parser, args: Sequence[str]) -> None:  # type: ignore[override]
        """Raise `CompletionScript` for the shell, the only argument."""
        for each in (parser, *self._subcommand_parsers.values()):
            each.formatter_class = HelpFormatter  # jsonargparse's own formatter requires parsed values
        raise CompletionScript(parser.get_completion_script(f"shtab-{args[0]}"))


class CompletionScript(Exception):  # noqa: N818 (not an error: it carries the script out of the constructor)
    """Carries a completion script as its only argument."""


def completion(shell: str) -> str:
    """The completion script of the run commands for `bash` or `zsh`."""
    try:
        make_cli([shell], CompletionCLI)
    except CompletionScript as script:
        return str(script)
    raise AssertionError("CompletionCLI stops before anything runs")
