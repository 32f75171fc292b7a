"""`softprompt plan`: what a run takes of memory, wire and disk, and whether it fits, before it is begun."""

from __future__ import annotations

import json
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_softprompt.reports.text_table import table
from lightning_softprompt.system.errors import CommandError

if TYPE_CHECKING:
    from lightning_softprompt.training.memory_measurement import Load
    from lightning_softprompt.training.memory_plan import Plan

TOO_LARGE = 1  # exit code of a run that does not fit
SHAPE = ("layers", "hidden", "intermediate", "heads", "kv_heads", "vocabulary")


def parser() -> ArgumentParser:
    """The command's own arguments."""
    parser = ArgumentParser(
        "softprompt plan",
        usage="softprompt plan [OPTIONS] FIT_OPTIONS",
        description="Print what `softprompt fit` with the same options would take on each device: memory, bytes on the "
        "wire in a step, and the size of a checkpoint. Of the backbone only config.json is needed, no weights. Rows "
        "are taken to be as long as data.max_tokens allows, unless --tokens says how long, and to share nothing.",
        allow_abbrev=False,
    )
    parser.add_argument("--memory", type=float, metavar="GIB", help="of a device: exit with 1 if the run does not fit")
    parser.add_argument("--devices", type=int, metavar="N", help="of all nodes; those of the trainer unless given")
    parser.add_argument("--sharding", choices=("ddp", "fsdp"), help="fsdp: each device holds a share of the layers")
    parser.add_argument("--devices-per-copy", type=int, metavar="N", help="that share one copy of the layers; all")
    parser.add_argument(
        "--tokens", type=int, metavar="T", help="of a row, without soft ones; data.max_tokens if not given"
    )
    parser.add_argument(
        "--reserve", type=float, default=0.0, metavar="GIB", help="what the driver takes of a device; 0"
    )
    parser.add_argument(
        "--shape",
        metavar="NUMBERS",
        help=f"a backbone such as Llama by numbers instead of a folder: {','.join(SHAPE)}",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON, in bytes")
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args, of_fit = parser().parse_known_args(argv)
    refuse_numbers(args)
    from lightning_softprompt.training.memory_plan import plan

    with tempfile.TemporaryDirectory() as folder:
        named = [] if args.shape is None else [f"--backbone.name={written(args.shape, Path(folder))}"]
        module, spec, load = asked([*of_fit, *named], args)
        try:
            found = plan(module, spec, load)
        except ValueError as error:
            raise CommandError(str(error)) from error
    fits = args.memory is None or found.peak + args.reserve * 2**30 <= args.memory * 2**30
    print(json.dumps({**vars(found), "peak": found.peak, "fits": fits}) if args.json else told(found, load))
    if not fits:
        print(f"does not fit: {gib(found.peak)} and {args.reserve:g} reserved, of {args.memory:g} GiB", file=sys.stderr)
    return 0 if fits else TOO_LARGE


def refuse_numbers(args: Namespace) -> None:
    """Refuses numbers that no run has.

    Raises:
        CommandError: Naming the option.
    """
    for name in ("devices", "devices_per_copy", "tokens"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise CommandError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for name in ("memory", "reserve"):
        if (value := getattr(args, name)) is not None and not 0 <= value < inf:
            raise CommandError(f"--{name} must be a number of GiB that is at least 0, got {value}")
    if args.devices and args.devices_per_copy and args.devices % args.devices_per_copy:
        raise CommandError(
            f"--devices must be a multiple of --devices-per-copy {args.devices_per_copy}, got {args.devices}"
        )


def written(shape: str, folder: Path) -> Path:
    """A folder with the configuration of numbers.

    Raises:
        CommandError: If they are not six whole numbers.
    """
    numbers = [number.replace("_", "") for number in shape.split(",")]
    if len(numbers) != len(SHAPE) or not all(number.isdecimal() for number in numbers):
        raise CommandError(f"--shape wants {','.join(SHAPE)} as whole numbers, got {shape!r}")
    from transformers import LlamaConfig

    layers, hidden, intermediate, heads, kv_heads, vocabulary = map(int, numbers)
    LlamaConfig(
        num_hidden_layers=layers, hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, max_position_embeddings=131072,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def asked(options: list[str], args: Namespace) -> tuple[Any, Any, Load]:
    """Method, backbone and load of the options of `fit`."""
    from lightning_softprompt.cli.app import replica_spec
    from lightning_softprompt.cli.dry_parse import parsed
    from lightning_softprompt.training.memory_measurement import Load

    given = parsed(["fit", *options])
    trainer, data, module = given.config.trainer, given.data, given.module
    strategy = str(trainer.strategy.get("class_path") if hasattr(trainer.strategy, "get") else trainer.strategy)
    sharded = any(word in strategy.lower() for word in ("fsdp", "modelparallel", "shard"))
    of_strategy = trainer.strategy.get("init_args") if hasattr(trainer.strategy, "get") else None
    per_copy = args.devices_per_copy or (of_strategy or {}).get("devices_per_copy") or 0
    answers = int(getattr(data, "max_target_tokens", None) or 0)
    rows = (
        data.batch_size if data.batch_tokens is None else max(1, data.batch_tokens // (args.tokens or data.max_tokens))
    )
    whole_vocabulary = module.classes is None and module.classes_by_task is None
    load = Load(
        rows=rows,
        tokens=args.tokens or data.max_tokens,
        targets=(answers or data.max_tokens) if whole_vocabulary else 0,
        devices=args.devices or device_count(trainer.devices) * (trainer.num_nodes or 1),
        sharded=sharded if args.sharding is None else args.sharding == "fsdp",
        per_copy=per_copy,
        autocast=autocast(str(trainer.precision)),
        replicas=replica_spec(given.config.replicas).count,
        answers=data.eval_batch_size if answers else 0,
        new_tokens=answers,
    )
    return module, module.spec, load


def device_count(devices: Any) -> int:
    """How many devices a Trainer is given: by number, by list, or on its own finding, which is one here.

    Raises:
        CommandError: If they are all that there are.
    """
    if devices in (-1, "-1"):
        raise CommandError("--trainer.devices -1 takes all that a machine has; say how many with --devices")
    if isinstance(devices, list | tuple):
        return len(devices)
    return int(devices) if str(devices).isdigit() else 1


def autocast(precision: str) -> Any:
    """The precision of products under mixed precision, or None."""
    import torch

    return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)


def told(plan: Plan, load: Load) -> str:
    """The plan for people."""
    weights = "embeddings, head, a share of the layers and two of them gathered" if load.shares > 1 else "all of them"
    notes = {"frozen weights": weights, "kept for the backward pass": "measured on a narrow copy"}
    rows = [[name, gib(size), notes.get(name, "")] for name, size in plan.training.items() if size]
    rows += [[name, gib(size), "while text is generated"] for name, size in plan.answering.items()]
    rows += [["at most at once", gib(plan.peak), f"{load.rows} rows of {load.tokens} tokens on each of {load.devices}"]]
    rest = [
        [f"{name}, on the wire in a step", size_of(size), "sent by each device"] for name, size in plan.wire.items()
    ]
    rest += [["received before the first step", size_of(plan.start), ""]] if plan.start else []
    rest += [["checkpoint", size_of(plan.checkpoint), ""]]
    share = 100 * plan.trainable / plan.frozen
    head = f"{plan.trainable:,} parameters are trained, {share:.4g} % of the backbone's {plan.frozen:,}"
    return f"{head}\n\n{table(rows, ['memory of a device', 'GiB', ''])}\n\n{table(rest)}"


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / 2**30:.3f}"


def size_of(size: float) -> str:
    """Bytes in the unit that suits them."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    step = min(len(units) - 1, max(0, (int(size).bit_length() - 1) // 10))
    return f"{size / 2 ** (10 * step):.4g} {units[step]}"
