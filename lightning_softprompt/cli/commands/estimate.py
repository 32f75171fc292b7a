"""`softprompt estimate`: the memory, communication and checkpoint size of a run, before it starts."""

from __future__ import annotations

import json
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_softprompt.cli.next_steps import command_line, suggest
from lightning_softprompt.reports.text_table import table
from lightning_softprompt.system.errors import CommandError

if TYPE_CHECKING:
    from lightning_softprompt.core.backbone_spec import BackboneSpec
    from lightning_softprompt.objectives.rollout_work import RolloutWork
    from lightning_softprompt.training.memory_measurement import Workload
    from lightning_softprompt.training.memory_plan import Plan

TOO_LARGE = 1  # exit code if the run does not fit
SHAPE = ("layers", "hidden", "intermediate", "heads", "kv_heads", "vocabulary")
GIB = 2**30


def parser() -> ArgumentParser:
    """The command's own arguments."""
    parser = ArgumentParser(
        "softprompt estimate",
        usage="softprompt estimate [OPTIONS] FIT_OPTIONS",
        description="Estimate what `softprompt fit` with the same options requires on each device: memory, network "
        "traffic per step and checkpoint size. Only the backbone's config.json is needed, not its weights. Every row "
        "is assumed to have data.max_tokens tokens, unless --tokens is given, and no prefix shared with other rows.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--memory", type=float, metavar="GIB", help="device memory; exit with 1 if the run does not fit"
    )
    parser.add_argument(
        "--devices", type=int, metavar="N", help="total devices across all nodes (default: from --trainer)"
    )
    parser.add_argument("--sharding", choices=("ddp", "fsdp"), help="fsdp: each device holds a shard of the layers")
    parser.add_argument("--devices-per-copy", type=int, metavar="N", help="devices per model replica (default: all)")
    parser.add_argument(
        "--tokens", type=int, metavar="T", help="tokens per row, excluding soft tokens (default: data.max_tokens)"
    )
    parser.add_argument(
        "--reserve", type=float, default=0.0, metavar="GIB", help="memory reserved by the driver (default: 0)"
    )
    parser.add_argument(
        "--speed",
        type=float,
        metavar="N",
        help="tokens per second of a forward pass on the device, for the time of a rollout of sampled answers",
    )
    parser.add_argument(
        "--shape",
        metavar="NUMBERS",
        help=f"describe a Llama-like backbone by numbers instead of a folder: {','.join(SHAPE)}",
    )
    parser.add_argument("--json", action="store_true", help="print the estimate as JSON, in bytes")
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args, fit_options = parser().parse_known_args(argv)
    refuse_numbers(args)
    from lightning_softprompt.training.memory_plan import plan

    with tempfile.TemporaryDirectory() as folder:
        if args.shape is not None:
            fit_options.append(f"--backbone.name={write_config(args.shape, Path(folder))}")
        module, spec, workload = read_workload(fit_options, args)
        try:
            estimate = plan(module, spec, workload)
            required = estimate.peak + args.reserve * GIB
            fits = args.memory is None or required <= args.memory * GIB
            fitting = (
                [] if fits or args.json else find_fitting(module, spec, workload, (args.memory - args.reserve) * GIB)
            )
        except ValueError as error:
            raise CommandError(str(error)) from error
    if args.json:
        rollout = {} if workload.rollout is None else {"rollout": vars(workload.rollout)}
        print(json.dumps({**vars(estimate), "peak": estimate.peak, "fits": fits, **rollout}))
    else:
        print(format_plan(estimate, workload))
        if workload.rollout is not None:
            print(f"\n{format_rollout(workload.rollout, args.speed)}")
    if not fits:
        needed = f"{gib(estimate.peak)} GiB and {args.reserve:g} GiB reserved"
        available = f"{args.memory:g} GiB"
        print(f"does not fit: {needed}, but the device has {available}", file=sys.stderr)
        if not args.json:
            print(describe_fits(fitting), file=sys.stderr)
    elif args.shape is None and not args.json:  # numbers alone are no backbone to train
        suggest(command_line("fit", *fit_options))
    return 0 if fits else TOO_LARGE


def find_fitting(module: Any, spec: BackboneSpec, workload: Workload, memory: float) -> list[str]:
    """Find options of `fit` with which a run that is too large fits into a memory in bytes, one change at a time."""
    from lightning_softprompt.training.memory_plan import plan

    found = []
    low, high = 0, workload.rows  # the largest number of rows that fits is at least `low` and below `high`
    while high - low > 1:
        rows = (low + high) // 2
        if plan(module, spec, replace(workload, rows=rows)).peak <= memory:
            low = rows
        else:
            high = rows
    if low:
        found.append(f"--data.batch_size {low} (batches of {low} instead of {workload.rows} rows)")
    if not spec.checkpointing and plan(module, replace(spec, checkpointing=True), workload).peak <= memory:
        found.append("--backbone.checkpointing true (slower)")
    if spec.dtype == "float32" and plan(module, replace(spec, dtype="bfloat16"), workload).peak <= memory:
        found.append("--backbone.dtype bfloat16 (frozen weights in half precision)")
    return found


def describe_fits(fitting: Sequence[str]) -> str:
    """The options that make a run fit, in one line."""
    if not fitting:
        return "No batch size fits, nor do checkpointing and bfloat16 alone; use a smaller backbone or shorter rows"
    return f"What fits: {'; or '.join(fitting)}"


def refuse_numbers(args: Namespace) -> None:
    """Refuse numbers that are out of range.

    Raises:
        CommandError: Naming the option.
    """
    for name in ("devices", "devices_per_copy", "tokens"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise CommandError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for name in ("memory", "reserve"):
        if (value := getattr(args, name)) is not None and not 0 <= value < inf:
            raise CommandError(f"--{name} must be a number of GiB that is at least 0, got {value}")
    if args.speed is not None and not 0 < args.speed < inf:
        raise CommandError(f"--speed must be a number of tokens per second above 0, got {args.speed}")
    if args.devices and args.devices_per_copy and args.devices % args.devices_per_copy:
        raise CommandError(
            f"--devices must be a multiple of --devices-per-copy {args.devices_per_copy}, got {args.devices}"
        )


def write_config(shape: str, folder: Path) -> Path:
    """Write a Llama config of the given shape to a folder, and return the folder.

    Raises:
        CommandError: If the shape is not six whole numbers.
    """
    numbers = [number.replace("_", "") for number in shape.split(",")]
    are_whole = all(number.isdecimal() for number in numbers)
    if len(numbers) != len(SHAPE) or not are_whole:
        raise CommandError(f"--shape requires {','.join(SHAPE)} as whole numbers, got {shape!r}")
    from transformers import LlamaConfig

    layers, hidden, intermediate, heads, kv_heads, vocabulary = map(int, numbers)
    LlamaConfig(
        num_hidden_layers=layers, hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, max_position_embeddings=131072,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def read_workload(options: list[str], args: Namespace) -> tuple[Any, Any, Workload]:
    """Parse the options of `fit` into the method, the backbone spec and the workload of each device."""
    from lightning_softprompt.cli.dry_parse import parse_run
    from lightning_softprompt.cli.option_checks import replica_spec
    from lightning_softprompt.training.memory_measurement import Workload

    run = parse_run(["fit", *options])
    trainer, data, module = run.config.trainer, run.data, run.module
    strategy, strategy_options = _strategy(trainer.strategy)
    is_sharded = any(word in strategy.lower() for word in ("fsdp", "modelparallel", "shard"))
    tokens = args.tokens or data.max_tokens
    rows = data.batch_size
    if data.batch_tokens is not None:
        rows = max(1, data.batch_tokens // tokens)
    max_target_tokens = int(getattr(data, "max_target_tokens", None) or 0)
    answers = data.eval_batch_size if max_target_tokens else 0
    new_tokens = max_target_tokens
    rollout = module.objective.rollout_work(rows, tokens + int(getattr(module, "length", 0)))
    if rollout is not None:
        rows, tokens = rollout.learned_rows, tokens + rollout.new_tokens
        max_target_tokens = rollout.new_tokens
        answers = max(answers, rollout.questions * rollout.answers)
        new_tokens = max(new_tokens, rollout.new_tokens)
    uses_whole_vocabulary = module.classes is None and module.classes_by_task is None
    workload = Workload(
        rows=rows,
        tokens=tokens,
        targets=(max_target_tokens or data.max_tokens) if uses_whole_vocabulary else 0,
        devices=args.devices or device_count(trainer.devices) * (trainer.num_nodes or 1),
        sharded=is_sharded if args.sharding is None else args.sharding == "fsdp",
        per_copy=args.devices_per_copy or strategy_options.get("devices_per_copy") or 0,
        autocast=autocast_dtype(str(trainer.precision)),
        replicas=replica_spec(run.config.replicas).count,
        answers=answers,
        new_tokens=new_tokens,
        rollout=rollout,
    )
    return module, module.spec, workload


def _strategy(strategy: Any) -> tuple[str, Any]:
    """The name or class path of a strategy, and its arguments."""
    if hasattr(strategy, "get"):
        return str(strategy.get("class_path")), strategy.get("init_args") or {}
    return str(strategy), {}


def device_count(devices: Any) -> int:
    """The number of devices that a Trainer uses; 1 for `auto`.

    Raises:
        CommandError: For -1, all devices of the machine.
    """
    if devices in (-1, "-1"):
        raise CommandError("--trainer.devices -1 means all devices of a machine; give their number with --devices")
    if isinstance(devices, list | tuple):
        return len(devices)
    return int(devices) if str(devices).isdigit() else 1


def autocast_dtype(precision: str) -> Any:
    """The precision of matrix products under mixed precision, or None."""
    import torch

    return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)


def format_plan(plan: Plan, workload: Workload) -> str:
    """The estimate as tables."""
    weights = "all of them"
    if workload.shares > 1:
        weights = "embeddings, head, a shard of the layers, and two gathered layers"
    notes = {"frozen weights": weights, "kept for the backward pass": "measured on a small copy of the backbone"}
    memory = []
    for name, size in plan.training.items():
        if size:
            memory.append([name, gib(size), notes.get(name, "")])
    for name, size in plan.answering.items():
        memory.append([name, gib(size), "during generation"])
    batch = f"{workload.rows} rows of {workload.tokens} tokens on each of {workload.devices} devices"
    memory.append(["peak", gib(plan.peak), batch])
    other = []
    for name, size in plan.wire.items():
        other.append([f"{name}, communicated per step", format_size(size), "sent by each device"])
    if plan.start:
        other.append(["received before the first step", format_size(plan.start), ""])
    other.append(["checkpoint", format_size(plan.checkpoint), ""])
    percent = 100 * plan.trainable / plan.frozen
    share = f"{percent:.4g} % of the backbone's {plan.frozen:,}"
    summary = f"{plan.trainable:,} trainable parameters, {share}"
    memory_table = table(memory, ["memory of a device", "GiB", ""])
    return f"{summary}\n\n{memory_table}\n\n{table(other)}"


def format_rollout(work: RolloutWork, speed: float | None) -> str:
    """The work of sampling answers and learning from them as a table.

    Args:
        work: The work.
        speed: Tokens per second of a forward pass; None if it is unknown.
    """
    answers = f"{work.questions} questions, {work.answers} answers of {work.new_tokens} tokens"
    rows = [["sampled tokens", f"{work.sampled_tokens:,}", answers]]
    for name, passes in {**work.passes, "in all": sum(work.passes.values())}.items():
        seconds = "" if speed is None else f"{passes / speed:.3g} s"
        rows.append([name, f"{passes:,}", seconds])
    steps = f"rollout of {work.steps} training step{'s' if work.steps > 1 else ''}"
    return table(rows, [steps, "tokens in forward passes", ""])


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / GIB:.3f}"


def format_size(size: float) -> str:
    """Bytes in the largest unit that gives a number of at least 1."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = max(0, (int(size).bit_length() - 1) // 10)
    step = min(len(units) - 1, power)
    number = size / 2 ** (10 * step)
    return f"{number:.4g} {units[step]}"
