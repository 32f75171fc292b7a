"""`softprompt completion`: one completion script for run commands and light commands.

One part is generated from the parser of the run commands, which takes seconds to build, and one from the parsers of the
light commands. A dispatching function looks at the first word and calls the right part.
"""

from __future__ import annotations

import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from lightning_softprompt.cli.commands import LIGHT_COMMANDS, import_command
from lightning_softprompt.system.atomic_files import write_file
from lightning_softprompt.system.errors import CommandError

INSTALL = """\
Generating the script takes about 10 seconds. Run the command once, and again after an upgrade:

  bash   softprompt completion bash --output ~/.local/share/bash-completion/completions/softprompt
         Without the bash-completion package, source that file in ~/.bashrc.
  zsh    softprompt completion zsh --output ~/.zfunc/_softprompt
         In ~/.zshrc, before compinit: fpath=(~/.zfunc $fpath)
"""

BASH = """
_softprompt() {
  case " %(names)s " in
    *" ${COMP_WORDS[1]} "*)
      if [ "$COMP_CWORD" -gt 1 ]; then %(light)s; return; fi ;;
  esac
  %(run)s
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY+=( $(compgen -W "%(names)s" -- "${COMP_WORDS[1]}") )
  fi
}

complete -o bashdefault -F _softprompt softprompt
"""

ZSH = """
_softprompt() {
  local names=(%(names)s)
  if (( CURRENT > 2 && ${names[(Ie)${words[2]}]} )); then
    %(light)s
  elif (( CURRENT == 2 )) && [[ ${words[2]} != -* ]]; then
    %(light)s_commands
    %(run)s_commands
  else
    %(run)s
  fi
}

typeset -A opt_args
if [[ $zsh_eval_context[-1] == eval ]]; then
  compdef _softprompt softprompt  # sourced: to be called later
else
  _softprompt "$@"  # found in fpath: called now
fi
"""


def script(shell: str) -> str:
    """Generate the completion script of all commands."""
    from lightning_softprompt.cli.completion_script import completion

    return join_scripts(shell, completion(shell), light_script(shell))


def light_script(shell: str) -> str:
    """Generate the completion script of the light commands."""
    import shtab

    root = ArgumentParser("softprompt")
    commands = root.add_subparsers()
    for name, description in LIGHT_COMMANDS.items():
        parents = []
        if name != "quickstart":
            parents.append(import_command(name).parser())
        command = commands.add_parser(name, parents=parents, add_help=not parents, help=description)
        command.description = description
    return str(shtab.complete(root, shell, root_prefix="softprompt_light"))


def join_scripts(shell: str, run: str, light: str) -> str:
    """Join two scripts, and add the function that chooses between them.

    Raises:
        CommandError: If a script registers no function.
    """
    registered, head, join = _DIALECTS[shell]
    functions = [_find_registration(registered, text) for text in (run, light)]
    bodies = [text[: match.start()].removeprefix(head) for text, match in zip((run, light), functions, strict=True)]
    names = {"run": functions[0]["name"], "light": functions[1]["name"], "names": " ".join(LIGHT_COMMANDS)}
    return head + "".join(bodies) + join % names


def write(text: str, file: Path) -> None:
    """Write a file atomically: a shell that starts meanwhile reads the old one."""
    write_file(file, text.encode())


def parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(
        "softprompt completion",
        description="Write the shell completion script for commands, options and class names.",
        epilog=INSTALL,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=sorted(_DIALECTS), help="the shell")
    parser.add_argument("--output", type=Path, metavar="FILE", help="output file (default: print to standard output)")
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    print("Generating the completion script; this takes about 10 seconds.", file=sys.stderr)
    text = script(args.shell)
    if not args.output:
        print(text, end="")
        return 0
    output = args.output.expanduser()
    write(text, output)
    print(f"Wrote {output}; see softprompt completion --help for how to enable it", file=sys.stderr)
    return 0


# for each shell: the statement that registers the function, the first line, and the function appended to both scripts
_DIALECTS = {
    "bash": (re.compile(r"^complete .*-F (?P<name>\S+) ", re.MULTILINE), "", BASH),
    "zsh": (
        re.compile(r"^typeset -A opt_args$(?=.*^\s*compdef (?P<name>\S+))", re.MULTILINE | re.DOTALL),
        "#compdef softprompt\n",
        ZSH,
    ),
}


def _find_registration(pattern: re.Pattern[str], text: str) -> re.Match[str]:
    match = pattern.search(text)
    if match is None:
        raise CommandError("shtab's script registers no function; install shtab>=1.7,<2")
    return match
