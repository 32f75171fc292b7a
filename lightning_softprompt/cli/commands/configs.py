"""`softprompt configs`: list, print or copy the bundled configs.

Each folder of configs is for one component, and each config begins with a comment that describes it.
"""

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
    """The folder of the configs: inside an installed package, or next to the package in a checkout.

    Raises:
        CommandError: If there is no such folder.
    """
    places = [PACKAGE / "configs", PACKAGE.parent / "configs"]
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        raise CommandError(f"no configs at {places[0]} or {places[1]}; reinstall lightning-softprompt")
    return folder


def config_names(folder: Path) -> list[str]:
    """The sorted names of the configs, such as `data/sst2`."""
    return sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml"))


def opening_comment(text: str) -> str:
    r"""The comment at the start of a file, as one line.

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
    """Copy all configs with their folders, so that their references to each other stay valid.

    Raises:
        CommandError: If one of the files exists; then nothing is copied.
    """
    copies = {file: target / file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file()}
    existing = [str(copy) for copy in copies.values() if copy.exists()]
    if existing:
        raise CommandError(f"{existing[0]} exists ({len(existing)} existing files); copy to another folder")
    for file, copy in copies.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    return list(copies.values())


def parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser("softprompt configs", description="List the bundled configs, print one, or copy all.")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("name", nargs="?", help="config to print, such as method/dept, or dept if the name is unique")
    choice.add_argument(
        "--copy", type=Path, metavar="DIR", help="copy all configs to this folder; existing files are not overwritten"
    )
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
    """The names of all configs with the first sentence of each, grouped by folder."""
    names = config_names(folder)
    width = max(map(len, names), default=0)
    groups = []
    for component, group in groupby(names, key=lambda name: name.rpartition("/")[0]):
        rows = []
        for name in group:
            comment = opening_comment((folder / f"{name}.yaml").read_text("utf-8"))
            rows.append([f"  {name:{width}}", first_sentence(comment)])
        groups.append(f"{component or 'more'}\n{table(rows)}")
    usage = "Print a config: softprompt configs NAME    Copy all configs: softprompt configs --copy DIR"
    return "\n\n".join([f"Configs in {folder}", *groups, usage])


def _find(requested: str, names: Sequence[str]) -> str:
    """The full name of a config.

    Raises:
        CommandError: If there is none of that name, or several.
    """
    name = requested.removeprefix("configs/").removesuffix(".yaml")
    short_names = [full.rpartition("/")[2] for full in names]
    if name in names:
        return name
    matches = [full for full, short in zip(names, short_names, strict=True) if short == name]
    if len(matches) == 1:
        return matches[0]
    close = matches or get_close_matches(name, [*names, *short_names])
    hint = f"did you mean {' or '.join(close)}?" if close else "softprompt configs lists them"
    raise CommandError(f"{'more than one' if matches else 'no'} config {requested!r}; {hint}")
