"""`softprompt configs`: the configuration files that ship, one folder a noun, each opening with what it reproduces."""

from __future__ import annotations

import re
import shutil
from argparse import ArgumentParser
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import groupby, takewhile
from pathlib import Path

from lightning_softprompt.reports.text_table import table
from lightning_softprompt.system.errors import CommandError

PACKAGE = Path(__file__).parents[2]


def configs_folder() -> Path:
    """Where the configs stand: inside an installed package, beside it in a checkout.

    Raises:
        CommandError: If neither is there.
    """
    places = [PACKAGE / "configs", PACKAGE.parent / "configs"]
    found = [place for place in places if place.is_dir()]
    if not found:
        raise CommandError(f"no configs at {places[0]} or {places[1]}; install lightning-softprompt anew")
    return found[0]


def config_names(folder: Path) -> list[str]:
    """The files as they are asked for, `noun/name`, in order."""
    return sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml"))


def opening_comment(text: str) -> str:
    r"""The comment that a file opens with, as one line.

    >>> opening_comment("# DePT as its paper has it.\n# Two learning rates.\nlength: 40  # P")
    'DePT as its paper has it. Two learning rates.'
    """
    lines = takewhile(lambda line: line.startswith("#"), text.splitlines())
    return " ".join(filter(None, (line.lstrip("#").strip() for line in lines)))


def first_sentence(text: str) -> str:
    """A text up to the first full stop before a capital letter.

    >>> first_sentence("DePT as Shi et al. 2024 have it. Two learning rates.")
    'DePT as Shi et al. 2024 have it.'
    """
    return re.split(r"(?<=[.!?])\s+(?=[A-Z])", text, maxsplit=1)[0]


def copy_configs(folder: Path, target: Path) -> list[Path]:
    """Copy all configs, sub-folders kept, so that those which name each other still do.

    Raises:
        CommandError: If one of them is there already; then nothing is copied.
    """
    copies = {file: target / file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file()}
    there = [str(copy) for copy in copies.values() if copy.exists()]
    if there:
        raise CommandError(f"{there[0]} is there already ({len(there)} such files); copy to another folder")
    for file, copy in copies.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    return list(copies.values())


def parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser("softprompt configs", description="List the configs that ship, print one, or copy all.")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("name", nargs="?", help="config to print, such as method/dept; dept alone if no other has it")
    choice.add_argument("--copy", type=Path, metavar="DIR", help="copy all of them to this folder, overwriting nothing")
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    folder = configs_folder()
    if args.name:
        print((folder / f"{_find(args.name, config_names(folder))}.yaml").read_text(encoding="utf-8"), end="")
    elif args.copy:
        print(f"{len(copy_configs(folder, args.copy))} files copied to {args.copy}")
    else:
        print(_listing(folder))
    return 0


def _listing(folder: Path) -> str:
    names = config_names(folder)
    rows = {name: first_sentence(opening_comment((folder / f"{name}.yaml").read_text("utf-8"))) for name in names}
    width = max(map(len, names), default=0)
    groups = (
        f"{noun or 'more'}\n" + table([[f"  {name:{width}}", rows[name]] for name in group])
        for noun, group in groupby(names, key=lambda name: name.rpartition("/")[0])
    )
    ways = "Print one: softprompt configs NAME    Copy them all: softprompt configs --copy DIR"
    return "\n\n".join([f"Configs in {folder}", *groups, ways])


def _find(asked: str, names: Sequence[str]) -> str:
    name = asked.removeprefix("configs/").removesuffix(".yaml")
    found = [n for n in names if n == name] or [n for n in names if n.rpartition("/")[2] == name]
    if len(found) == 1:
        return found[0]
    close = found or get_close_matches(name, [*names, *(n.rpartition("/")[2] for n in names)])
    hint = f"did you mean {' or '.join(close)}?" if close else "softprompt configs lists them"
    raise CommandError(f"{'more than one' if found else 'no'} config {asked!r}; {hint}")
