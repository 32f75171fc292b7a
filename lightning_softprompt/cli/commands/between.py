"""`softprompt between`: the loss along the line from one trained prompt to another."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_softprompt.reports.text_table import table
from lightning_softprompt.system.atomic_files import write_file
from lightning_softprompt.system.errors import CommandError

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_softprompt.checkpoints.prompt_file import SavedPrompt
    from lightning_softprompt.cli.dry_parse import Parsed

DESCRIPTION = """\
Scores the prompts (1 - t) ONE + t OTHER on the validation rows, for t from 0 to 1: two prompts in one valley have no
hill between them, and their average is worth trying (`--model.init FromCheckpoints`). The hill is how far the loss
rises above the line between its two ends. Both prompts are of one method, as the further options say, on one backbone:

  softprompt between runs/a/prompt.safetensors runs/b/prompt.safetensors --plot between.png \\
      --model PromptTuning --data configs/data/sst2.yaml --trainer.limit_val_batches 10
"""
OF_TRAINER = ("accelerator", "precision", "limit_val_batches")


def parser() -> ArgumentParser:
    """The command's own arguments."""
    parser = ArgumentParser(
        "softprompt between", usage="softprompt between ONE OTHER [OPTIONS] VALIDATE_OPTIONS",
        description=DESCRIPTION, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("one", type=Path, metavar="ONE", help="prompt.safetensors or a checkpoint of a run")
    parser.add_argument("other", type=Path, metavar="OTHER", help="another one")
    parser.add_argument("--points", type=int, default=11, metavar="N", help="of the line, its ends included; 11")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the loss along the line")
    parser.add_argument("--out", type=Path, metavar="JSON", help="write the metrics of each point")
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args, of_validate = parser().parse_known_args(argv)
    if args.points < 2:
        raise CommandError(f"--points must be at least 2, got {args.points}")
    from lightning_softprompt.cli.dry_parse import parsed

    given = parsed(["validate", *of_validate])
    try:
        points = list(scored(given, args.one, args.other, args.points))
    except ValueError as error:
        raise CommandError(str(error)) from error
    name = given.data.evaluation.monitor[0]
    rows = [[f"{p['t']:.2f}", f"{p['loss']:.4f}", *([] if name == "loss" else [f"{p[name]:.4f}"])] for p in points]
    print(table(rows, ["t", "loss", *([] if name == "loss" else [name])]))
    print(f"\nhill: {hill([(p['t'], p['loss']) for p in points]):+.4f}")
    leave(args, points, name)
    return 0


def scored(given: Parsed, one: Path, other: Path, points: int) -> Iterator[dict[str, float]]:
    """Metrics at each point.

    Raises:
        ValueError: If the prompts do not fit each other, the backbone or the method.
    """
    from lightning.pytorch import Trainer

    from lightning_softprompt.checkpoints.prompt_file import read_prompt

    ends = read_prompt(one), read_prompt(other)
    options = {name: given.config.trainer[name] for name in OF_TRAINER}
    trainer = Trainer(
        **options, devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, enable_checkpointing=False,
    )  # fmt: skip
    given.module.configure_model()
    for end, path in zip(ends, (one, other), strict=True):
        end.check(given.module.loaded, path)
    refuse_unlike(ends, (one, other), given.module.state_dict())
    for number in range(points):
        t = number / (points - 1)
        given.module.load_state_dict(between(ends[0].tensors, ends[1].tensors, t))
        (found,) = trainer.validate(given.module, given.data, verbose=False)
        yield {"t": t, **{name.removeprefix("val/"): value for name, value in found.items()}}


def refuse_unlike(ends: tuple[SavedPrompt, SavedPrompt], paths: tuple[Path, Path], own: Mapping[str, Tensor]) -> None:
    """Refuses prompts that are not of the method and of one shape.

    Raises:
        ValueError: Naming the file.
    """
    wanted = {name: list(tensor.shape) for name, tensor in own.items()}
    for end, path in zip(ends, paths, strict=True):
        found = {name: list(tensor.shape) for name, tensor in end.tensors.items()}
        if found != wanted:
            raise ValueError(
                f"{path} has {found}, but the method has {wanted}; set --model and its sizes to the file's"
            )


def between(one: Mapping[str, Tensor], other: Mapping[str, Tensor], t: float) -> dict[str, Tensor]:
    """Each tensor at t of the way; those that are no real numbers, such as choices, are the nearer end's."""
    near = one if t < 0.5 else other
    return {
        name: (1 - t) * tensor + t * other[name] if tensor.is_floating_point() else near[name]
        for name, tensor in one.items()
    }


def hill(points: list[tuple[float, float]]) -> float:
    """The most that losses by t lie above the line between the first and the last.

    >>> hill([(0.0, 1.0), (0.5, 2.0), (1.0, 2.0)])
    0.5
    """
    first, last = points[0][1], points[-1][1]
    return max(loss - (1 - t) * first - t * last for t, loss in points)


def leave(args: Namespace, points: list[dict[str, Any]], name: str) -> None:
    """Writes and draws, where that was asked for."""
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_file(args.out, f"{json.dumps(points, indent=1)}\n".encode())
        print(f"written: {args.out}")
    if args.plot:
        from lightning_softprompt.evaluation.figures import line_figure

        args.plot.parent.mkdir(parents=True, exist_ok=True)
        names = list(dict.fromkeys(["loss", name]))
        line_figure([p["t"] for p in points], {n: [p[n] for p in points] for n in names}).savefig(args.plot, dpi=150)
        print(f"drawn: {args.plot}")
