"""`softprompt prompts`: store trained prompts, compare them, and suggest which to initialize a new task from."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_softprompt.cli.next_steps import command_line, suggest
from lightning_softprompt.reports.text_table import table
from lightning_softprompt.system.errors import CommandError
from lightning_softprompt.system.printable import metric_name

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_softprompt.checkpoints.library import Library

DESCRIPTION = """\
Store trained prompts of one backbone in a folder, and compare them (Vu et al. 2022, arXiv 2110.07904).

  add NAME FILE    copy a prompt.safetensors or checkpoint into the folder
  list             list stored prompts
  similar          print the pairwise similarity matrix; --plot draws a heat map
  suggest FILE     find the stored prompts most similar to FILE, and print options that initialize from them

Similarities are meaningful only between prompts trained from the same initialization with the same recipe.
"""
ARGUMENTS = {"add": ("NAME", "FILE"), "list": (), "similar": (), "suggest": ("FILE",)}


def parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser("softprompt prompts", description=DESCRIPTION, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=list(ARGUMENTS), help="what to do")
    parser.add_argument("arguments", nargs="*", metavar="NAME|FILE", help="arguments of the action")
    parser.add_argument(
        "--folder", type=Path, default=Path("library"), metavar="DIR", help="folder of the prompts (default: library)"
    )
    parser.add_argument("--measure", choices=["rows", "mean"], default="rows",
                        help="cosine over all pairs of soft tokens, or of their means (default: rows)")  # fmt: skip
    parser.add_argument("--top", type=int, default=3, metavar="N", help="number of suggestions (default: 3)")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the similarity matrix")
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    required = ARGUMENTS[args.action]
    if len(args.arguments) != len(required):
        expected = " and ".join(required) or "no arguments"
        raise CommandError(f"{args.action} requires {expected}, got {args.arguments}")
    if args.top < 1:
        raise CommandError(f"--top must be at least 1, got {args.top}")
    from lightning_softprompt.checkpoints.library import Library

    actions: dict[str, Callable[[Namespace, Library], None]] = {
        "add": _add, "list": _list, "similar": _similar, "suggest": _suggest
    }  # fmt: skip
    try:
        actions[args.action](args, Library(args.folder))
    except ValueError as error:
        raise CommandError(str(error)) from error
    return 0


def _add(args: Namespace, library: Library) -> None:
    name, file = args.arguments
    library.add(name, Path(file))
    print(f"Added {library.path(name)}: {len(library.names)} prompts in {library.folder}")
    suggest(command_line("prompts", "similar", "--folder", library.folder))


def _list(args: Namespace, library: Library) -> None:
    from lightning_softprompt.checkpoints.library import soft_tokens

    rows = []
    for name, saved in library.read().items():
        length, width = soft_tokens(saved, library.path(name)).shape
        method = str(saved.method.get("_class_path", "")).rpartition(".")[2]
        rows.append([name, method, str(saved.backbone.get("name")), f"{length} x {width}"])
    print(table(rows, ["name", "method", "backbone", "soft tokens"]))


def _read_tokens(library: Library) -> dict[str, Tensor]:
    """Read the soft tokens of every stored prompt; all must belong to one backbone."""
    from lightning_softprompt.checkpoints.library import refuse_other_backbone, soft_tokens

    prompts = library.read()
    first = next(iter(prompts))
    for name, saved in prompts.items():
        refuse_other_backbone(saved, library.path(name), prompts[first], library.path(first))
    return {name: soft_tokens(saved, library.path(name)) for name, saved in prompts.items()}


def _similar(args: Namespace, library: Library) -> None:
    from lightning_softprompt.prompts.similarity import similarities

    tokens = _read_tokens(library)
    matrix = similarities(list(tokens.values()), args.measure)
    rows = []
    for name, values in zip(tokens, matrix.tolist(), strict=True):
        rows.append([name, *(f"{value:.3f}" for value in values)])
    print(table(rows, ["", *tokens]))
    if args.measure == "rows":
        print(
            "\nMean cosine over all pairs of soft tokens. The tokens of a prompt differ, so its similarity with itself "
            "is below 1.\n--measure mean compares the mean tokens instead: 1 for a prompt with itself."
        )
    if args.plot:
        from lightning_softprompt.evaluation.figures import similarity_figure

        args.plot.parent.mkdir(parents=True, exist_ok=True)
        similarity_figure(matrix, [metric_name(name) for name in tokens]).savefig(args.plot, dpi=150)
        print(f"Wrote {args.plot}")


def _suggest(args: Namespace, library: Library) -> None:
    from lightning_softprompt.checkpoints.library import refuse_other_backbone, soft_tokens
    from lightning_softprompt.checkpoints.prompt_file import read_prompt
    from lightning_softprompt.prompts.from_checkpoints import most_similar

    file = Path(args.arguments[0])
    tokens = _read_tokens(library)
    query = read_prompt(file)
    first = library.path(next(iter(tokens)))
    refuse_other_backbone(query, file, read_prompt(first), first)
    weights = most_similar(soft_tokens(query, file), tokens, args.top, args.measure)
    rows = [[name, f"{weight:.3f}"] for name, weight in weights.items()]
    print(table(rows, ["name", "weight"]))
    options = f"query: {file}, folder: {library.folder}, top: {len(weights)}, measure: {args.measure}"
    best = library.path(next(iter(weights)))
    print(f"\nInitialize from the most similar prompt: --model.init FromCheckpoint --model.init.path {best}")
    print(
        f"Initialize from the weighted mixture:    --model.init '{{class_path: FromLibrary, init_args: {{{options}}}}}'"
    )
