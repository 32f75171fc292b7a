"""`softprompt methods`: list the methods, from their source code without importing it, or advise which one to choose.

The class of a method derives from `SoftPromptModule`, and its docstring has the labels `Paper:`, `Enters:` and
`Parameters:` after its first line.
"""

from __future__ import annotations

import ast
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from textwrap import indent

from lightning_softprompt.cli.commands.configs import configs_folder
from lightning_softprompt.cli.method_advice import Question, advise, read_choices, read_comparisons
from lightning_softprompt.moved import class_renames
from lightning_softprompt.reports.text_table import table
from lightning_softprompt.system.errors import CommandError

BASE = "SoftPromptModule"
LABELS = ("Paper", "Enters", "Parameters")
RATE = "default_rate"
ADVICE_OPTIONS = ("task", "rows", "max_parameters", "max_seconds")  # valid only with --advise
SHIPPED = Path(__file__).parents[2] / "methods"
MODULE = SHIPPED / "base.py"


@dataclass(frozen=True)
class Method:
    """A method as described by its source file.

    Args:
        name: Name of the class, as in `--model NAME`.
        file: The source file.
        docstring: The docstring without indentation.
        labels: The texts of `Paper`, `Enters` and `Parameters`.
        defaults: Default values of the arguments as source code, and the learning rate if the method is trained.
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
    """Read the methods in the files of some folders, sorted by name.

    Raises:
        CommandError: If a folder is missing, or a file cannot be parsed, or a method lacks a label.
    """
    methods = [method for folder in folders for file in _files(folder) for method in read_file(file)]
    return sorted(methods, key=lambda method: method.name.lower())


def read_file(file: Path) -> Iterator[Method]:
    """Yield the methods in a file, which are the classes that derive from `SoftPromptModule`.

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
    parser = ArgumentParser(
        "softprompt methods", description="List the methods, describe one, or advise which one to choose."
    )
    parser.add_argument("name", nargs="?", help="method to describe: its class or its file, such as DePT or dept")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="also list the methods in this folder")
    advice = parser.add_argument_group("advice")
    advice.add_argument(
        "--advise",
        action="store_true",
        help="show measured methods with scores, intervals and costs, and which one to choose; for tasks without "
        "measurements, the recommendations of the guide",
    )
    advice.add_argument(
        "--task",
        metavar="KIND",
        help="kind of task, such as classification or qa, or a measured data set, such as sst2",
    )
    advice.add_argument("--rows", type=_count, metavar="N", help="number of training rows, over all classes")
    advice.add_argument("--max-parameters", type=_count, metavar="N", help="largest number of trainable parameters")
    advice.add_argument("--max-seconds", type=float, metavar="S", help="longest time of a training step")
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    if args.advise:
        return _advise(args)
    unused = [option for option in ADVICE_OPTIONS if getattr(args, option) is not None]
    if unused:
        raise CommandError(f"--{unused[0].replace('_', '-')} requires --advise")
    methods = read_methods([SHIPPED, args.folder] if args.folder else [SHIPPED])
    if args.name:
        method = _find(args.name, methods)
        print(describe(method))
        return 0
    rows = [[method.name, method.summary, *map(method.labels.__getitem__, LABELS)] for method in methods]
    print(table(rows, ["name", "description", *(label.lower() for label in LABELS)]))
    print("\nDescribe a method: softprompt methods NAME    List its options: softprompt fit --model.help NAME")
    print("Choose a method: softprompt methods --advise --task classification --rows 64")
    return 0


def _advise(args: Namespace) -> int:
    if args.name or args.folder:
        raise CommandError("--advise compares methods; it takes no name and no --folder")
    limits = {"max_parameters": args.max_parameters, "max_seconds": args.max_seconds}
    question = Question(args.task, args.rows, **{name: limit for name, limit in limits.items() if limit is not None})
    print("\n\n".join(advise(question, read_comparisons(), read_choices())))
    return 0


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise ValueError(f"{text} is less than 1")
    return count


def describe(method: Method) -> str:
    """The docstring of a method, its default values, and the config with the settings of its paper."""
    sections = [f"{method.name}  ({method.file})", method.docstring]
    if method.defaults:
        values = "\n".join(f"  {name}: {value}" for name, value in method.defaults.items())
        sections.append(f"Defaults, for a small instruct backbone:\n{values}")
    config = configs_folder() / "method" / f"{method.file.stem}.yaml"
    if config.is_file():
        text = indent(config.read_text(), "  ").rstrip()
        sections.append(f"Settings of the paper, {config}:\n{text}")
    return "\n\n".join(sections)


def _defaults(node: ast.ClassDef) -> dict[str, str]:
    """The default values of the constructor as source code, by name of the argument."""
    functions = [part for part in node.body if isinstance(part, ast.FunctionDef)]
    init = next((function for function in functions if function.name == "__init__"), None)
    if init is None:
        return {}
    count = len(init.args.defaults)
    with_default = init.args.args[-count:] if count else []
    return {arg.arg: ast.unparse(value) for arg, value in zip(with_default, init.args.defaults, strict=True)}


def _rate(node: ast.ClassDef) -> dict[str, str]:
    """The learning rate that the class or `SoftPromptModule` sets; empty if the method is not trained."""
    values = _class_values(node)
    if values.get("trains") == "False":
        return {}
    classes = [part for part in ast.parse(MODULE.read_text()).body if isinstance(part, ast.ClassDef)]
    base = next(cls for cls in classes if cls.name == BASE)
    rate = values.get(RATE) or _class_values(base)[RATE]
    return {"learning rate": f"{rate}, of AdamW, constant"}


def _class_values(node: ast.ClassDef) -> dict[str, str]:
    """The values that a class body assigns to names, as source code."""
    assignments = (part for part in node.body if isinstance(part, ast.Assign))
    return {ast.unparse(part.targets[0]): ast.unparse(part.value) for part in assignments}


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise CommandError(f"no folder {folder}; --folder takes one with a method in each file")
    return sorted(folder.rglob("*.py"))


def _last_name(base: ast.expr) -> str:
    return ast.unparse(base).rpartition(".")[2]


def _labels(docstring: str, where: str) -> dict[str, str]:
    """The text of each label in a docstring.

    Raises:
        CommandError: If a label is missing.
    """
    texts: dict[str, str] = {}
    current = ""
    for line in docstring.splitlines()[1:]:
        label, colon, text = line.partition(":")
        if colon and label in LABELS:
            current, texts[label] = label, text.strip()
        elif current and line.strip():  # the text of a label may continue on the next lines
            texts[current] = f"{texts[current]} {line.strip()}".strip()
        else:
            current = ""
    missing = [label for label in LABELS if not texts.get(label)]
    if missing:
        raise CommandError(
            f"{where} lacks a line '{missing[0]}: ...' in its docstring; required are {', '.join(LABELS)}"
        )
    return texts


def _find(name: str, methods: Sequence[Method]) -> Method:
    name = class_renames().get(name, name)
    by_name = {key.lower(): method for method in methods for key in (method.file.stem, method.name)}
    if name.lower() in by_name:
        return by_name[name.lower()]
    names = {method.name.lower(): method.name for method in methods}
    close = [names[match] for match in get_close_matches(name.lower(), names)]
    hint = f"did you mean {', '.join(close)}?" if close else "softprompt methods lists them"
    raise CommandError(f"no method {name!r}; {hint}")
