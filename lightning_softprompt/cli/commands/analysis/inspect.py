"""`softprompt inspect`: sizes, nearest words, rank and redundancy of a trained prompt."""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_softprompt.reports.text_table import table
from lightning_softprompt.system.atomic_files import write_file
from lightning_softprompt.system.errors import CommandError

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_softprompt.cli.dry_parse import ParsedRun
    from lightning_softprompt.core.types import SoftPrompt

DESCRIPTION = """\
Show what a trained prompt consists of: the sizes and the effective rank of its parts, the nearest words of each soft
token, and soft tokens that are almost equal. Writes the same as an HTML page with plots.

  softprompt inspect runs/sentiment/20261128-101500-a1b2/prompt.safetensors
  softprompt inspect PROMPT --against INITIAL      how far each soft token moved from another prompt
  softprompt inspect PROMPT --scores               also the validation metrics of the prompt, with each soft token
                                                   replaced by its nearest word, in random order, and without a prompt
Further options are those of `softprompt validate`, for --scores. Without them, the data are those of the prompt's run.
"""


def parser() -> ArgumentParser:
    """The command's own arguments."""
    parser = ArgumentParser(
        "softprompt inspect", usage="softprompt inspect PROMPT [OPTIONS] [VALIDATE_OPTIONS]",
        description=DESCRIPTION, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("prompt", type=Path, metavar="PROMPT", help="prompt.safetensors or a checkpoint of a run")
    parser.add_argument("--against", type=Path, metavar="OTHER", help="another prompt of the same shape")
    parser.add_argument("--task", metavar="NAME", help="the task (multi-task prompts)")
    parser.add_argument("--words", type=int, default=5, metavar="N", help="nearest words of a token (default: 5)")
    parser.add_argument("--scores", action="store_true", help="score variants of the prompt on the validation rows")
    parser.add_argument("--out", type=Path, metavar="FILE", help="page to write (default: PROMPT.inspect.html)")
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args, validate_options = parser().parse_known_args(argv)
    if args.words < 1:
        raise CommandError(f"--words must be at least 1, got {args.words}")
    if validate_options and not args.scores:
        raise CommandError(f"unknown option {validate_options[0]}; options of validate require --scores")
    from lightning_softprompt.analysis.prompt_page import PromptReport
    from lightning_softprompt.analysis.soft_tokens import CAVEAT, find_nearest_words, measure_drift
    from lightning_softprompt.checkpoints.folding import fold_task
    from lightning_softprompt.checkpoints.prompt_file import read_prompt
    from lightning_softprompt.checkpoints.restore import load_method
    from lightning_softprompt.cli.dry_parse import parse_validation

    out = args.out or args.prompt.with_suffix(".inspect.html")
    try:
        run = parse_validation(args.prompt, validate_options) if args.scores else None
        saved = read_prompt(args.prompt)
        method = load_method(saved, args.prompt, None if run is None else run.module.loaded)
        prompt = fold_task(method, args.task)
        drift = None
        if args.against:
            other = fold_task(load_method(read_prompt(args.against), args.against, method.loaded), args.task)
            drift = measure_drift(_only_tokens(prompt, args.prompt), _only_tokens(other, args.against))
        blocks = _blocks(prompt)
        tokens = [] if prompt.tokens is None else find_nearest_words(method.loaded, blocks["tokens"], args.words)
        scores = {} if run is None else dict(_score_variants(run, prompt, args.prompt))
    except ValueError as error:
        raise CommandError(str(error)) from error
    facts = {
        "method": str(saved.method["_class_path"]).rpartition(".")[2],
        "backbone": str(saved.backbone["name"]),
        "file": str(args.prompt),
    }
    title = f"{facts['method']} on {Path(facts['backbone']).name}"
    report = PromptReport(title, facts, blocks, tokens, drift, scores)
    header, rows = report.block_rows()
    print(table(rows, header))
    if tokens:
        header, rows = report.token_rows()
        print(f"\n{table(rows, header)}\n\n{CAVEAT}")
    if scores:
        header, rows = report.score_rows()
        print(f"\n{table(rows, header)}")
    write_file(out, report.to_html().encode())
    print(f"\nWrote {out}")
    return 0


def _blocks(prompt: SoftPrompt) -> dict[str, Tensor]:
    """The parts of a prompt [P, size] by name, the heads of keys and values side by side."""
    from lightning_softprompt.checkpoints.folding import prompt_to_tensors

    blocks = {}
    for name, tensor in prompt_to_tensors(prompt).items():
        part = tensor[0].detach().float().cpu()
        blocks[name] = part if part.ndim == 2 else part.transpose(0, 1).flatten(1)
    return blocks


def _only_tokens(prompt: SoftPrompt, path: Path) -> Tensor:
    """The soft tokens [P, H] of a prompt that has nothing else.

    Raises:
        ValueError: If the prompt has other parts.
    """
    blocks = _blocks(prompt)
    if list(blocks) != ["tokens"]:
        raise ValueError(f"{path} must have soft tokens only, but has {', '.join(list(blocks)[:4])}")
    return blocks["tokens"]


def _score_variants(run: ParsedRun, prompt: SoftPrompt, path: Path) -> Iterator[tuple[str, Mapping[str, float]]]:
    """Yield the validation metrics of a prompt and of its variants."""
    import torch

    from lightning_softprompt.analysis.soft_tokens import project_to_words
    from lightning_softprompt.core.types import SoftPrompt

    tokens = _only_tokens(prompt, path).to(run.module.loaded.word_embeddings.device)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
    variants = {
        "trained": prompt,
        "nearest words": replace(prompt, tokens=project_to_words(run.module.loaded, tokens)[None]),
        "random order": replace(prompt, tokens=tokens[order][None]),
        "none": SoftPrompt(),
    }
    trainer = run.make_validation_trainer()
    for name, variant in variants.items():
        run.module.prompt = lambda batch, variant=variant: variant  # type: ignore[method-assign, misc]
        (metrics,) = trainer.validate(run.module, run.data, verbose=False)
        loss, monitor = "val/loss", f"val/{run.data.evaluation.monitor[0]}"
        yield name, {metric.removeprefix("val/"): metrics[metric] for metric in dict.fromkeys((loss, monitor))}
