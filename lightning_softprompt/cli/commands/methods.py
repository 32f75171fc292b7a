"""`softprompt methods`: what can be trained, read off the methods' source without importing it.

The convention that a method's file follows: its class derives from `SoftPromptModule`, and the docstring has, after its
first line, the three labelled lines `Paper:`, `Enters:` and `Parameters:`.
"""

from __future__ import annotations

import ast
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from textwrap import indent

from lightning_softprompt.cli.commands.configs import configs_folder
from lightning_softprompt.moved import renamed_classes
from lightning_softprompt.reports.text_table import table
from lightning_softprompt.system.errors import CommandError

BASE = "SoftPromptModule"
LABELS = ("Paper", "Enters", "Parameters")
RATE = "default_rate"
SHIPPED = Path(__file__).parents[2] / "methods"
MODULE = SHIPPED / "base.py"


@dataclass(frozen=True)
class Method:
    """One method, as its file describes it.

    Args:
        name: Name of the class, which is what `--model` takes.
        file: Where it stands.
        docstring: The whole text, without indentation.
        labels: What `Paper`, `Enters` and `Parameters` say.
        defaults: Of the constructor's own arguments, as its source has them, and the learning rate of one that trains.
    """

    name: str
    file: Path
    docstring: str
    labels: dict[str, str]
    defaults: dict[str, str]

    @property
    def summary(self) -> str:
        """The docstring's first line."""
        return self.docstring.partition("\n")[0]


def read_methods(folders: Sequence[Path]) -> list[Method]:
    """The methods in the files of the folders, by name.

    Raises:
        CommandError: If a folder is missing, or a file cannot be parsed, or a method lacks a label.
    """
    methods = [method for folder in folders for file in _files(folder) for method in read_file(file)]
    return sorted(methods, key=lambda method: method.name.lower())


def read_file(file: Path) -> Iterator[Method]:
    """The methods in one file: none where no class derives from `SoftPromptModule`.

    Raises:
        CommandError: If the file is not Python, or a method lacks a label.
    """
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise CommandError(f"{file} cannot be read as Python: {error}") from error
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and BASE in map(_last_name, node.bases):
            docstring = ast.get_docstring(node) or ""
            labels = _labels(docstring, f"{file}: {node.name}")
            yield Method(node.name, file, docstring, labels, _defaults(node) | _rate(node))


def parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser("softprompt methods", description="List the methods, or print the whole text of one.")
    parser.add_argument("name", nargs="?", help="method to describe: its class or its file, such as DePT or dept")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="read the methods in this folder too")
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    methods = read_methods([SHIPPED, args.folder] if args.folder else [SHIPPED])
    if args.name:
        method = _find(args.name, methods)
        print(described(method))
        return 0
    rows = [[m.name, m.summary, *(m.labels[label] for label in LABELS)] for m in methods]
    print(table(rows, ["name", "what it is", *(label.lower() for label in LABELS)]))
    print("\nAll of one: softprompt methods NAME    Its options: softprompt fit --model.help NAME")
    return 0


def described(method: Method) -> str:
    """All there is to say of a method: its text, its defaults, and the paper's settings where they ship."""
    said = [f"{method.name}  ({method.file})", method.docstring]
    if method.defaults:
        said.append(
            "Defaults, for a small instruct backbone:\n" + "\n".join(f"  {k}: {v}" for k, v in method.defaults.items())
        )
    paper = configs_folder() / "method" / f"{method.file.stem}.yaml"
    if paper.is_file():
        said.append(f"The paper's settings, {paper}:\n{indent(paper.read_text(), '  ').rstrip()}")
    return "\n\n".join(said)


def _defaults(node: ast.ClassDef) -> dict[str, str]:
    init = next((part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"), None)
    if init is None:
        return {}
    named = init.args.args[len(init.args.args) - len(init.args.defaults) :]
    return {arg.arg: ast.unparse(value) for arg, value in zip(named, init.args.defaults, strict=True)}


def _rate(node: ast.ClassDef) -> dict[str, str]:
    """The learning rate: the class's own, or what `SoftPromptModule` has for all."""
    own = _assigned(node)
    if own.get("trains") == "False":
        return {}
    common = next(part for part in ast.parse(MODULE.read_text()).body if getattr(part, "name", None) == BASE)
    return {"learning rate": f"{own.get(RATE) or _assigned(common)[RATE]}, of AdamW, constant"}


def _assigned(node: ast.stmt) -> dict[str, str]:
    """What a class body assigns to single names."""
    found = (part for part in getattr(node, "body", ()) if isinstance(part, ast.Assign))
    return {ast.unparse(part.targets[0]): ast.unparse(part.value) for part in found}


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise CommandError(f"no folder {folder}; --folder takes one with a method in each file")
    return sorted(folder.rglob("*.py"))


def _last_name(base: ast.expr) -> str:
    return ast.unparse(base).rpartition(".")[2]


def _labels(docstring: str, where: str) -> dict[str, str]:
    found: dict[str, str] = {}
    current = ""
    for line in docstring.splitlines()[1:]:
        label, colon, text = line.partition(":")
        if colon and label in LABELS:
            current, found[label] = label, text.strip()
        elif current and line.strip():  # a label's text may go on in the next lines
            found[current] = f"{found[current]} {line.strip()}".strip()
        else:
            current = ""
    missing = [label for label in LABELS if not found.get(label)]
    if missing:
        raise CommandError(f"{where} lacks a line '{missing[0]}: ...' in its docstring; wanted are {', '.join(LABELS)}")
    return found


def _find(name: str, methods: Sequence[Method]) -> Method:
    name = renamed_classes().get(name, name)
    by_name = {key.lower(): method for method in methods for key in (method.file.stem, method.name)}
    if name.lower() in by_name:
        return by_name[name.lower()]
    names = {method.name.lower(): method.name for method in methods}
    close = [names[match] for match in get_close_matches(name.lower(), names)]
    hint = f"did you mean {', '.join(close)}?" if close else "softprompt methods lists them"
    raise CommandError(f"no method {name!r}; {hint}")
