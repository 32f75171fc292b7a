"""`softprompt wandb-workspace`: save a view of a W&B project."""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from importlib.util import find_spec
from typing import Literal

from lightning_softprompt.system.errors import CommandError

DESCRIPTION = """\
Save a view of a Weights & Biases project: a section each for validation, training, test, prompt, speed, plots and
settings, and runs grouped by experiment. Lines are means over the runs of a group, with their range. Runs are sorted
by their best validation, the best run first: the lowest value if the first metric is a loss, else the highest.

  softprompt wandb-workspace --entity my-team
  softprompt wandb-workspace --entity my-team --project summaries --metrics loss rouge1 rougeL
  softprompt wandb-workspace --entity my-team --project rag --metrics f1 retrieval/mrr retrieval/precision@1

Requires the package wandb-workspaces and an API key of W&B. Each call saves a new view.
"""
Mode = Literal["min", "max"]
METRICS = ("accuracy", "macro_f1", "f1", "rougeL", "loss")


def parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser(
        "softprompt wandb-workspace", description=DESCRIPTION, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("--entity", required=True, help="user or team of the project")
    parser.add_argument("--project", default="lightning-softprompt", help="project (default: lightning-softprompt)")
    parser.add_argument(
        "--metrics", nargs="+", default=list(METRICS), metavar="NAME",
        help=f"metrics of validation and test (default: {' '.join(METRICS)})",
    )  # fmt: skip
    parser.add_argument(
        "--mode", choices=("min", "max"),
        help="whether lower or higher values of the best validation are better (default: as for the first metric)",
    )  # fmt: skip
    parser.add_argument("--name", default="Lightning SoftPrompt", help="name of the view")
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    if find_spec("wandb_workspaces") is None:
        extra = "'lightning-softprompt[wandb-workspace]'"
        raise CommandError(f"the package wandb-workspaces is required: pip install {extra}")
    from lightning_softprompt.evaluation.base import LOWER_IS_BETTER
    from lightning_softprompt.runs.wandb_workspace import build_workspace

    mode_of_first: Mode = "min" if args.metrics[0] in LOWER_IS_BETTER else "max"
    mode: Mode = args.mode or mode_of_first
    workspace = build_workspace(args.entity, args.project, args.metrics, args.name, mode)
    try:
        workspace.save()
    except Exception as error:  # W&B raises errors of several libraries
        raise CommandError(f"W&B did not save the view: {error}") from error
    print(f"Saved {workspace.url}")
    return 0
