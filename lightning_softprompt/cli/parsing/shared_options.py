"""The options of the run commands in addition to those of the method, the data module and the Trainer."""

from __future__ import annotations

from lightning.pytorch.cli import LightningArgumentParser

from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.runs.run_spec import RunSpec
from lightning_softprompt.training.replicas import ReplicaSpec


def add_shared_options(parser: LightningArgumentParser) -> None:
    """Add the options that several classes share, and links: backbone to model and data, classes to the model."""
    parser.add_argument("--backbone", type=BackboneSpec, default=BackboneSpec(), help="The frozen language model.")
    parser.add_argument(
        "--run", type=RunSpec, default=RunSpec(), help="Output folder, loggers and checkpoints of the run."
    )
    parser.add_argument(
        "--replicas",
        type=int | ReplicaSpec,
        default=1,
        help="Train N independent prompts on the same batches in one run; pass a mapping to vary seeds, rates or "
        "inits.",
    )
    parser.add_argument(
        "--init_from",
        type=str | None,
        default=None,
        help="Initialize from a saved prompt or checkpoint; optimizer and schedule start fresh.",
    )
    parser.add_argument(
        "--trust",
        metavar="MODULE",
        type=str | None,
        default=None,
        help="Allow checkpoints, prompts and their configs to name classes of this module; may be repeated.",
    )
    parser.link_arguments("backbone", "model.init_args.backbone")
    parser.link_arguments("backbone", "data.init_args.backbone")
    parser.link_arguments("data.classes", "model.init_args.classes", apply_on="instantiate")
    parser.link_arguments("data.classes_by_task", "model.init_args.classes_by_task", apply_on="instantiate")
    parser.link_arguments("data.evaluation", "model.init_args.evaluation", apply_on="instantiate")


def set_command_defaults(parser: LightningArgumentParser, command: str) -> None:
    """Load checkpoints safely, write predictions instead of returning them, and add the options of a command.

    Args:
        parser: The parser of the command.
        command: Its name.
    """
    parser.set_defaults({"weights_only": True})
    if command in ("validate", "test"):
        parser.set_defaults({"verbose": False})  # a callback prints the results with intervals
    if command == "predict":
        parser.set_defaults({"return_predictions": False})
    if command == "fit":
        parser.add_argument(
            "--find_lr",
            action="store_true",
            help="Run a learning-rate range test of 100 steps instead of a training; it plots the loss over the "
            "rate and suggests a value for --model.lr.",
        )
