"""`softprompt interpolate`: the loss along the line between two trained prompts."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_softprompt.cli.next_steps import command_line, suggest
from lightning_softprompt.reports.text_table import table
from lightning_softprompt.system.atomic_files import write_file
from lightning_softprompt.system.errors import CommandError

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_softprompt.checkpoints.prompt_file import SavedPrompt
    from lightning_softprompt.cli.dry_parse import ParsedRun

DESCRIPTION = """\
Evaluate the prompts (1 - t) * ONE + t * OTHER on the validation split, for t from 0 to 1. Prompts in the same loss
basin have no barrier between them, and their average is worth trying (`--model.init FromCheckpoints`). The loss
barrier is how far the loss rises above the straight line between the losses of both ends. Both prompts must be of one
method, given by the further options, and of one backbone:

  softprompt interpolate runs/a/prompt.safetensors runs/b/prompt.safetensors --plot interpolation.png \\
      --model PromptTuning --data configs/data/sst2.yaml --trainer.limit_val_batches 10
"""


def parser() -> ArgumentParser:
    """The command's own arguments."""
    parser = ArgumentParser(
        "softprompt interpolate", usage="softprompt interpolate ONE OTHER [OPTIONS] VALIDATE_OPTIONS",
        description=DESCRIPTION, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("one", type=Path, metavar="ONE", help="prompt.safetensors or checkpoint of a run")
    parser.add_argument("other", type=Path, metavar="OTHER", help="prompt.safetensors or checkpoint of another run")
    parser.add_argument(
        "--points", type=int, default=11, metavar="N", help="number of points, including both ends (default: 11)"
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="plot the loss along the line")
    parser.add_argument("--out", type=Path, metavar="JSON", help="write the metrics of each point")
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args, validate_options = parser().parse_known_args(argv)
    if args.points < 2:
        raise CommandError(f"--points must be at least 2, got {args.points}")
    from lightning_softprompt.cli.dry_parse import parse_run

    run = parse_run(["validate", *validate_options])
    try:
        points = list(evaluate_points(run, args.one, args.other, args.points))
    except ValueError as error:
        raise CommandError(str(error)) from error
    metric = run.data.evaluation.monitor[0]
    columns = ["loss"] if metric == "loss" else ["loss", metric]
    rows = []
    for point in points:
        values = [f"{point[name]:.4f}" for name in columns]
        rows.append([f"{point['t']:.2f}", *values])
    print(table(rows, ["t", *columns]))
    barrier = loss_barrier([(point["t"], point["loss"]) for point in points])
    description = describe_barrier(barrier, points[0]["loss"], points[-1]["loss"])
    print(f"\nloss barrier: {barrier:+.4f} ({description})")
    write_outputs(args, points, columns)
    if "init" in (run.config.model.get("init_args") or {}):
        average = json.dumps([str(args.one), str(args.other)])
        start = ["--model.init", "FromCheckpoints", "--model.init.paths", average]
        suggest(command_line("fit", *validate_options, *start))
    return 0


def evaluate_points(run: ParsedRun, one: Path, other: Path, count: int) -> Iterator[dict[str, float]]:
    """Yield the validation metrics at each point.

    Raises:
        ValueError: If the prompts do not match each other, the backbone or the method.
    """
    from lightning_softprompt.checkpoints.prompt_file import read_prompt

    ends = read_prompt(one), read_prompt(other)
    trainer = run.make_validation_trainer()
    run.module.configure_model()
    for end, path in zip(ends, (one, other), strict=True):
        end.check(run.module.loaded, path)
    refuse_other_shapes(ends, (one, other), run.module.state_dict())
    for index in range(count):
        t = index / (count - 1)
        run.module.load_state_dict(interpolate(ends[0].tensors, ends[1].tensors, t))
        (metrics,) = trainer.validate(run.module, run.data, verbose=False)
        yield {"t": t, **{name.removeprefix("val/"): value for name, value in metrics.items()}}


def refuse_other_shapes(
    ends: tuple[SavedPrompt, SavedPrompt], paths: tuple[Path, Path], state: Mapping[str, Tensor]
) -> None:
    """Refuse prompts whose tensors do not have the names and shapes of the method.

    Raises:
        ValueError: Naming the file.
    """
    expected = {name: list(tensor.shape) for name, tensor in state.items()}
    for end, path in zip(ends, paths, strict=True):
        shapes = {name: list(tensor.shape) for name, tensor in end.tensors.items()}
        if shapes != expected:
            raise ValueError(
                f"{path} has {shapes}, but the method has {expected}; set --model and its sizes to the file's"
            )


def interpolate(one: Mapping[str, Tensor], other: Mapping[str, Tensor], t: float) -> dict[str, Tensor]:
    """Interpolate each tensor linearly; integer tensors, such as selected indices, are copied from the nearer end."""
    nearer = one if t < 0.5 else other
    tensors = {}
    for name, tensor in one.items():
        if tensor.is_floating_point():
            tensors[name] = (1 - t) * tensor + t * other[name]
        else:
            tensors[name] = nearer[name]
    return tensors


def loss_barrier(points: list[tuple[float, float]]) -> float:
    """The largest rise of the loss above the straight line between the first and the last point.

    >>> loss_barrier([(0.0, 1.0), (0.5, 2.0), (1.0, 2.0)])
    0.5
    """
    first, last = points[0][1], points[-1][1]
    return max(loss - (1 - t) * first - t * last for t, loss in points)


def describe_barrier(barrier: float, first: float, last: float) -> str:
    """Describes a barrier relative to the mean loss of both ends.

    >>> describe_barrier(0.1, 1.0, 3.0), describe_barrier(0.0, 1.0, 3.0)
    ('5.0 % of the mean loss of both prompts', 'the loss does not rise between the prompts')
    """
    if barrier <= 0:
        return "the loss does not rise between the prompts"
    return f"{barrier / ((first + last) / 2):.1%} of the mean loss of both prompts".replace("%", " %")


def write_outputs(args: Namespace, points: list[dict[str, Any]], columns: list[str]) -> None:
    """Write the metrics and draw the plot, if requested."""
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_file(args.out, f"{json.dumps(points, indent=1)}\n".encode())
        print(f"Wrote {args.out}")
    if args.plot:
        from lightning_softprompt.evaluation.figures import line_figure

        args.plot.parent.mkdir(parents=True, exist_ok=True)
        curves = {name: [point[name] for point in points] for name in columns}
        line_figure([point["t"] for point in points], curves).savefig(args.plot, dpi=150)
        print(f"Wrote {args.plot}")
