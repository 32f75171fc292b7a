"""`softprompt library`: a folder of trained prompts, and which of them a new task might start from."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_softprompt.reports.text_table import table
from lightning_softprompt.system.errors import CommandError
from lightning_softprompt.system.printable import metric_name

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_softprompt.checkpoints.library import Library

DESCRIPTION = """\
Keeps trained prompts of one backbone in a folder, and says which of them are alike (Vu et al. 2022, arXiv 2110.07904).

  add NAME FILE    take a copy of a prompt.safetensors or a checkpoint
  list             what there is
  similar          the similarity of each with each; a heat map with --plot
  suggest FILE     which are most like a task's own prompt, and how to start from them

Similarities mean something among prompts that were trained from one start, by one recipe.
"""
WANTS = {"add": ("NAME", "FILE"), "list": (), "similar": (), "suggest": ("FILE",)}


def parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser("softprompt library", description=DESCRIPTION, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=list(WANTS), help="what to do")
    parser.add_argument("what", nargs="*", metavar="NAME|FILE", help="what it wants, as above")
    parser.add_argument("--folder", type=Path, default=Path("library"), metavar="DIR", help="the library")
    parser.add_argument("--measure", choices=["rows", "mean"], default="rows",
                        help="cosine over all pairs of soft tokens, or of their means")  # fmt: skip
    parser.add_argument("--top", type=int, default=3, metavar="N", help="how many to suggest")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the similarities")
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    wanted = WANTS[args.action]
    if len(args.what) != len(wanted):
        raise CommandError(f"{args.action} wants {' and '.join(wanted) or 'nothing more'}, got {args.what}")
    if args.top < 1:
        raise CommandError(f"--top must be at least 1, got {args.top}")
    from lightning_softprompt.checkpoints.library import Library

    act: dict[str, Callable[[Namespace, Library], None]] = {
        "add": _add, "list": _list, "similar": _similar, "suggest": _suggest
    }  # fmt: skip
    try:
        act[args.action](args, Library(args.folder))
    except ValueError as error:
        raise CommandError(str(error)) from error
    return 0


def _add(args: Namespace, library: Library) -> None:
    name, file = args.what
    library.add(name, Path(file))
    print(f"{library.path(name)}: {len(library.names)} prompts in {library.folder}")


def _list(args: Namespace, library: Library) -> None:
    from lightning_softprompt.checkpoints.library import soft_tokens

    rows = []
    for name, saved in library.read().items():
        length, width = soft_tokens(saved, library.path(name)).shape
        method = str(saved.method.get("_class_path", "")).rpartition(".")[2]
        rows.append([name, method, str(saved.backbone.get("name")), f"{length} x {width}"])
    print(table(rows, ["name", "method", "backbone", "soft tokens"]))


def _tokens(library: Library) -> dict[str, Tensor]:
    """Soft tokens by name, all of one backbone."""
    from lightning_softprompt.checkpoints.library import refuse_other_backbone, soft_tokens

    prompts = library.read()
    first = next(iter(prompts))
    for name, saved in prompts.items():
        refuse_other_backbone(saved, library.path(name), prompts[first], library.path(first))
    return {name: soft_tokens(saved, library.path(name)) for name, saved in prompts.items()}


def _similar(args: Namespace, library: Library) -> None:
    from lightning_softprompt.prompts.similarity import similarities

    tokens = _tokens(library)
    found = similarities(list(tokens.values()), args.measure)
    rows = [[name, *(f"{value:.3f}" for value in row)] for name, row in zip(tokens, found.tolist(), strict=True)]
    print(table(rows, ["", *tokens]))
    if args.plot:
        from lightning_softprompt.evaluation.figures import similarity_figure

        args.plot.parent.mkdir(parents=True, exist_ok=True)
        similarity_figure(found, [metric_name(name) for name in tokens]).savefig(args.plot, dpi=150)
        print(f"drawn: {args.plot}")


def _suggest(args: Namespace, library: Library) -> None:
    from lightning_softprompt.checkpoints.library import refuse_other_backbone, soft_tokens
    from lightning_softprompt.checkpoints.prompt_file import read_prompt
    from lightning_softprompt.prompts.from_checkpoints import likest

    file = Path(args.what[0])
    tokens, own = _tokens(library), read_prompt(file)
    first = library.path(next(iter(tokens)))
    refuse_other_backbone(own, file, read_prompt(first), first)
    chosen = likest(soft_tokens(own, file), tokens, args.top, args.measure)
    print(table([[name, f"{share:.3f}"] for name, share in chosen.items()], ["name", "share"]))
    options = f"query: {file}, folder: {library.folder}, top: {len(chosen)}, measure: {args.measure}"
    best = library.path(next(iter(chosen)))
    print(f"\nfrom the likest:  --model.init FromCheckpoint --model.init.path {best}")
    print(f"from all of them: --model.init '{{class_path: FromLibrary, init_args: {{{options}}}}}'")
