"""How a run grows with its devices: measured on one and two processes here, worked out on paper for 1,000 GPUs.

    python benchmarks/scaling.py measured --backbone smollm2-135m-instruct --rows 4 --steps 8
    python benchmarks/scaling.py memory
    python benchmarks/scaling.py paper

Weak: each process has as many rows as one has alone; strong: two share them. All rows have as many tokens. Efficiency
is that of a row in the processor's seconds, which others on the machine do not lengthen as they do the clock's. Bytes
are those that the kernel counts on a process's connections, from step to step.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback

from lightning_softprompt.cli.app import main as softprompt
from lightning_softprompt.cli.commands.estimate import parser, read_workload, write_config
from lightning_softprompt.data.samples.movie_sentences import movie_sentences
from lightning_softprompt.training.memory_plan import Plan, plan

ACKNOWLEDGED = 120  # offset of tcpi_bytes_acked in Linux's struct tcp_info
FIRST = 2  # steps that are not counted
SHAPE = (80, 8192, 28672, 64, 8, 128256)  # layers, hidden, intermediate, heads, heads of keys, vocabulary: 70B


def sent_bytes() -> int:
    """Over all of this process's TCP connections."""
    total = 0
    for opened in Path("/proc/self/fd").iterdir():
        if not os.path.realpath(opened).rpartition("/")[2].startswith("socket:"):
            continue
        with suppress(OSError), socket.socket(fileno=os.dup(int(opened.name))) as found:
            if found.type == socket.SOCK_STREAM and found.family in (socket.AF_INET, socket.AF_INET6):
                told = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                total += struct.unpack_from("Q", told, ACKNOWLEDGED)[0]
    return total


class Clock(Callback):
    """Writes when each step began, by the clock and by the processor, and what had been sent by then.

    Args:
        folder: Where to.
    """

    def __init__(self, folder: str) -> None:
        self.folder, self.seen = Path(folder), []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Note where the run is."""
        self.seen.append((time.perf_counter(), time.process_time(), sent_bytes()))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the notes."""
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(self.seen))


def worker(args: Namespace) -> int:
    """A process of a run."""
    torch.set_num_threads(1)
    clock = json.dumps([{"class_path": "scaling.Clock", "init_args": {"folder": args.folder}}])
    return softprompt([
        "fit", "--model=PromptTuning", "--model.length=20", "--data=ClassificationDataModule",
        f"--data.train={args.folder}/train.jsonl", f"--data.batch_size={args.rows}", f"--data.max_tokens={args.tokens}",
        "--data.template={soft}{text}{target}", "--data.labels=[negative, positive]",
        f"--backbone.name={args.backbone}", "--backbone.linear_backend=plain", f"--run.folder={args.folder}/runs",
        "--run.wandb=disabled", "--trainer.accelerator=cpu", f"--trainer.devices={args.world}",
        f"--trainer.strategy={args.strategy}", f"--trainer.max_steps={args.steps + FIRST}",
        f"--trainer.callbacks={clock}", "--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=0",
        "--trainer.log_every_n_steps=1000",
    ])  # fmt: skip


def run(args: Namespace, world: int, rows: int, strategy: str) -> tuple[float, float, float]:
    """Of a step: seconds at best, the processor's seconds in a process, and bytes that one sends; medians."""
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder), 2 * world * rows * (args.steps + FIRST))
        own = [f"--{name}={value}" for name, value in {
            "folder": folder, "rows": rows, "world": world, "strategy": strategy, "backbone": args.backbone,
            "tokens": args.tokens, "steps": args.steps,
        }.items()]  # fmt: skip
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        command = [sys.executable, *(torchrun if world > 1 else []), __file__, "worker", *own]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{Path(__file__).parent}:{os.getcwd()}"}
        subprocess.run(command, check=True, capture_output=True, env=environment)
        seen = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]
    steps = [[y - x for x, y in zip(*two, strict=True)] for of in seen for two in pairwise(of[FIRST:])]
    clock, processor, sent = zip(*steps, strict=True)
    return min(clock), median(processor), median(sent)


def write_rows(folder: Path, count: int) -> None:
    """Rows that are all longer than is read of them."""
    rows = [json.loads(line) for line in (movie_sentences() / "train.jsonl").open()]
    texts = [" ".join(rows[(8 * n + k) % len(rows)]["text"] for k in range(8)) for n in range(count)]
    lines = [json.dumps({"text": text, "label": rows[n % len(rows)]["label"]}) for n, text in enumerate(texts)]
    (folder / "train.jsonl").write_text("\n".join(lines))


def measured(args: Namespace) -> str:
    """The table of what was timed."""
    runs = {"alone": (1, args.rows, "auto")}
    for strategy in args.strategies:
        runs |= {f"weak, {strategy}": (2, args.rows, strategy), f"strong, {strategy}": (2, args.rows // 2, strategy)}
    rows: list[list[Any]] = []
    alone = 0.0
    for name, how in runs.items():
        clock, processor, sent = run(args, *how)
        each = processor / how[1]  # of a row
        alone = alone or each
        rows.append([name, *how[:2], f"{clock:.3f}", f"{processor:.3f}", f"{alone / each:.2f}", f"{sent:,.0f}"])
        print(*rows[-1], sep=", ", file=sys.stderr, flush=True)
    heads = ["run", "processes", "rows each", "s/step at best", "CPU s/step", "efficiency", "bytes sent a step"]
    return markdown(rows, heads)


def planned(options: list[str], folder: Path) -> tuple[Plan, list[int]]:
    """The estimate for 8 devices that share a 70B backbone in bfloat16, and the peaks of 1, 8 and 64 devices."""
    args, of_fit = parser().parse_known_args([
        f"--backbone.name={write_config(','.join(map(str, SHAPE)), folder)}", "--backbone.dtype=bfloat16",
        "--backbone.checkpointing=true", "--trainer.precision=bf16-mixed", *options,
    ])  # fmt: skip
    module, spec, workload = read_workload(of_fit, args)
    found = plan(module, spec, replace(workload, devices=8, sharded=True))
    held, layers, total = found.training["frozen weights"], found.wire["weights"] * 8 // 14, 2 * found.frozen
    gathered = held - (total - layers) - layers // 8
    weights = [total, held, total - layers + layers // 64 + gathered]  # nothing else depends on the sharing
    return found, [found.peak - held + of for of in weights]


METHODS = {
    "PromptTuning": ["--model=PromptTuning"],
    "PrefixTuning, free": ["--model=PrefixTuning", "--model.width=null"],
    "PTuning, MLP": ["--model=PTuning", "--model.encoder=mlp"],
    "DePT": ["--model=DePT"],
}
DATA = [
    "--data=ClassificationDataModule", "--data.labels=[bad, good]", "--data.template={soft}{text} is{target}",
    "--data.path=nowhere", "--data.batch_size=4",
]  # fmt: skip
LENGTH = {"PTuning, MLP": "--model.blocks=[{}]"}


def memory(args: Namespace) -> str:
    """GiB of a device by method, prompt length, sequence and sharding: 4 rows, layers recomputed."""
    rows: list[list[Any]] = []
    for name, method in METHODS.items():
        for length, tokens in ((20, 512), (100, 512), (100, 4096)):
            of = [*method, LENGTH.get(name, "--model.length={}").format(length), *DATA, f"--data.max_tokens={tokens}"]
            with tempfile.TemporaryDirectory() as folder:
                found, peaks = planned(of, Path(folder))
            sent = f"{found.wire['gradients'] / 2**20:.2f}"
            rows.append([name, length, tokens, f"{found.trainable:,}", *(f"{p / 2**30:.1f}" for p in peaks), sent])
            print(*rows[-1], sep=", ", file=sys.stderr, flush=True)
    heads = ["method", "P", "T", "trained", "whole", "shared by 8", "shared by 64", "gradients sent, MiB"]
    return markdown(rows, heads)


def paper(args: Namespace) -> str:
    """A step of the 70B backbone on 8 to 1,024 GPUs, by what is sent: all numbers that it rests on are arguments."""
    layers, hidden, inner, heads, kv, _ = SHAPE
    each = hidden * (2 * hidden + 2 * hidden * kv // heads + 3 * inner)
    weights, trained = 2 * layers * each, 4 * 20 * hidden  # bytes
    compute = 4 * layers * each * args.tokens * args.rows / (args.flops * args.utilization)  # forth, and back to inputs
    rows = []
    for devices in (8, 64, 256, 1024):
        for name, share in {"copy in a machine": 8, "one copy for all": devices}.items():
            wire = args.inside if share <= 8 else args.between
            gather = 2 * weights * (share - 1) / share / wire
            reduce = (
                2 * trained / args.between + 2 * (devices - 1) * args.hop if devices > 8 else 2 * trained / args.inside
            )
            step = max(compute, gather) + reduce
            hidden_at = gather * args.flops * args.utilization / (4 * layers * each)
            rows.append([
                devices, name, f"{2 * weights * (share - 1) / share / 1e9:.0f} GB", f"{gather:.2f}", f"{compute:.2f}",
                f"{1e3 * reduce:.1f}", f"{compute / step:.2f}", f"{hidden_at:,.0f}",
            ])  # fmt: skip
    heads_ = ["GPUs", "layers", "weights received", "s to gather", "s to compute", "ms to reduce prompts", "efficiency"]
    return markdown(rows, [*heads_, "tokens a GPU that hide gathering"])


def markdown(rows: list[list[Any]], heads: list[str]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [heads, ["---"] * len(heads), *rows])


def main() -> None:
    """Print what is asked for."""
    words = ArgumentParser(description=__doc__)
    words.add_argument("what", choices=("measured", "memory", "paper", "worker"))
    words.add_argument("--backbone", default="smollm2-135m-instruct")
    words.add_argument("--rows", type=int, default=4)
    words.add_argument("--tokens", type=int, default=64)
    words.add_argument("--steps", type=int, default=8)
    words.add_argument("--strategies", nargs="+", default=["ddp", "sharded"])
    words.add_argument("--flops", type=float, default=989e12, help="of a GPU a second, in bfloat16")
    words.add_argument("--utilization", type=float, default=0.4, help="of them, that a step gets")
    words.add_argument("--inside", type=float, default=450e9, help="bytes a second between GPUs of a machine")
    words.add_argument("--between", type=float, default=50e9, help="bytes a second between machines, for each GPU")
    words.add_argument("--hop", type=float, default=1e-5, help="seconds from GPU to GPU around a ring")
    for name in ("--folder", "--strategy"):
        words.add_argument(name)
    words.add_argument("--world", type=int)
    args = words.parse_args()
    if args.what == "worker":
        sys.exit(worker(args))
    print({"measured": measured, "memory": memory, "paper": paper}[args.what](args))


if __name__ == "__main__":
    main()
