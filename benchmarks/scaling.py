"""Scaling over devices: measured with one and two processes, and computed for 1,000 GPUs.

    python benchmarks/scaling.py measured --backbone smollm2-135m-instruct --rows 4 --steps 8
    python benchmarks/scaling.py memory
    python benchmarks/scaling.py paper

Weak scaling: each process has as many rows as a single process; strong scaling: two processes share them. All rows
have the same number of tokens. Efficiency compares the CPU time per row, which other processes on the machine do not
affect. Bytes are counted by the kernel on the connections of a process, from step to step.
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
from lightning_softprompt.cli.commands.estimate import parser as estimate_parser
from lightning_softprompt.cli.commands.estimate import read_workload, write_config
from lightning_softprompt.data.samples.movie_sentences import movie_sentences
from lightning_softprompt.training.memory_plan import Plan, plan

ACKNOWLEDGED = 120  # offset of tcpi_bytes_acked in Linux's struct tcp_info
WARMUP = 2  # steps that are not counted
SHAPE = (80, 8192, 28672, 64, 8, 128256)  # layers, hidden, intermediate, heads, heads of keys, vocabulary: 70B


def count_sent_bytes() -> int:
    """Returns the bytes sent over all TCP connections of this process."""
    total = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        if not os.path.realpath(descriptor).rpartition("/")[2].startswith("socket:"):
            continue
        with suppress(OSError), socket.socket(fileno=os.dup(int(descriptor.name))) as connection:
            is_internet = connection.family in (socket.AF_INET, socket.AF_INET6)
            if connection.type == socket.SOCK_STREAM and is_internet:
                tcp_info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                total += struct.unpack_from("Q", tcp_info, ACKNOWLEDGED)[0]
    return total


class Clock(Callback):
    """Records the start of each step in wall-clock and CPU time, and the bytes sent until then.

    Args:
        folder: Folder of the record.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.starts: list[tuple[float, float, int]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Records the start of a step."""
        self.starts.append((time.perf_counter(), time.process_time(), count_sent_bytes()))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Writes the record."""
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(self.starts))


def worker(args: Namespace) -> int:
    """Runs a process of a training."""
    torch.set_num_threads(1)
    clock = json.dumps([{"class_path": "scaling.Clock", "init_args": {"folder": args.folder}}])
    return softprompt([
        "fit", "--model=PromptTuning", "--model.length=20", "--data=ClassificationDataModule",
        f"--data.train={args.folder}/train.jsonl", f"--data.batch_size={args.rows}", f"--data.max_tokens={args.tokens}",
        "--data.template={soft}{text}{target}", "--data.labels=[negative, positive]",
        f"--backbone.name={args.backbone}", "--backbone.linear_backend=plain", f"--run.folder={args.folder}/runs",
        "--run.wandb=disabled", "--trainer.accelerator=cpu", f"--trainer.devices={args.world}",
        f"--trainer.strategy={args.strategy}", f"--trainer.max_steps={args.steps + WARMUP}",
        f"--trainer.callbacks={clock}", "--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=0",
        "--trainer.log_every_n_steps=1000",
    ])  # fmt: skip


def run(args: Namespace, world: int, rows: int, strategy: str) -> tuple[float, float, float]:
    """Returns the shortest wall-clock time of a step, and the median CPU time and sent bytes of a process."""
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder), 2 * world * rows * (args.steps + WARMUP))
        options = {
            "folder": folder, "rows": rows, "world": world, "strategy": strategy, "backbone": args.backbone,
            "tokens": args.tokens, "steps": args.steps,
        }  # fmt: skip
        arguments = [f"--{name}={value}" for name, value in options.items()]
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        command = [sys.executable, *(torchrun if world > 1 else []), __file__, "worker", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{Path(__file__).parent}:{os.getcwd()}"}
        subprocess.run(command, check=True, capture_output=True, env=environment)
        records = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]
    steps = []
    for starts in records:
        for start, next_start in pairwise(starts[WARMUP:]):
            steps.append([after - before for before, after in zip(start, next_start, strict=True)])
    wall_times, cpu_times, sent = zip(*steps, strict=True)
    return min(wall_times), median(cpu_times), median(sent)


def write_rows(folder: Path, count: int) -> None:
    """Writes rows that are all truncated, so that they have the same number of tokens."""
    sentences = [json.loads(line) for line in (movie_sentences() / "train.jsonl").open()]
    lines = []
    for n in range(count):
        parts = [sentences[(8 * n + k) % len(sentences)]["text"] for k in range(8)]
        label = sentences[n % len(sentences)]["label"]
        lines.append(json.dumps({"text": " ".join(parts), "label": label}))
    (folder / "train.jsonl").write_text("\n".join(lines))


def measure(args: Namespace) -> str:
    """Returns a table of measured runs."""
    runs = {"alone": (1, args.rows, "auto")}
    for strategy in args.strategies:
        runs[f"weak, {strategy}"] = (2, args.rows, strategy)
        runs[f"strong, {strategy}"] = (2, args.rows // 2, strategy)
    rows: list[list[Any]] = []
    baseline = 0.0
    for name, (world, num_rows, strategy) in runs.items():
        wall_time, cpu_time, sent = run(args, world, num_rows, strategy)
        time_per_row = cpu_time / num_rows
        baseline = baseline or time_per_row
        efficiency = baseline / time_per_row
        cells = [f"{wall_time:.3f}", f"{cpu_time:.3f}", f"{efficiency:.2f}", f"{sent:,.0f}"]
        rows.append([name, world, num_rows, *cells])
        print(*rows[-1], sep=", ", file=sys.stderr, flush=True)
    heads = ["run", "processes", "rows per process", "best s/step", "CPU s/step", "efficiency", "bytes sent per step"]
    return markdown(rows, heads)


def estimate_memory(options: list[str], folder: Path) -> tuple[Plan, list[int]]:
    """Returns the estimate for a 70B bfloat16 backbone sharded over 8 devices, and peaks for 1, 8 and 64 devices."""
    args, fit_options = estimate_parser().parse_known_args([
        f"--backbone.name={write_config(','.join(map(str, SHAPE)), folder)}", "--backbone.dtype=bfloat16",
        "--backbone.checkpointing=true", "--trainer.precision=bf16-mixed", *options,
    ])  # fmt: skip
    module, spec, workload = read_workload(fit_options, args)
    estimate = plan(module, spec, replace(workload, devices=8, sharded=True))
    sharded_by_8, layers = estimate.training["frozen weights"], estimate.wire["weights"] * 8 // 14
    total = 2 * estimate.frozen
    gathered = sharded_by_8 - (total - layers) - layers // 8
    sharded_by_64 = total - layers + layers // 64 + gathered
    others = estimate.peak - sharded_by_8  # only the weights depend on the number of devices
    return estimate, [others + weights for weights in (total, sharded_by_8, sharded_by_64)]


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
    """Returns GiB per device by method, prompt length, text length and sharding, for 4 rows with checkpointing."""
    rows: list[list[Any]] = []
    for name, method in METHODS.items():
        for length, tokens in ((20, 512), (100, 512), (100, 4096)):
            length_option = LENGTH.get(name, "--model.length={}").format(length)
            with tempfile.TemporaryDirectory() as folder:
                options = [*method, length_option, *DATA, f"--data.max_tokens={tokens}"]
                estimate, peaks = estimate_memory(options, Path(folder))
            sent = f"{estimate.wire['gradients'] / 2**20:.2f}"
            peaks_gib = [f"{peak / 2**30:.1f}" for peak in peaks]
            rows.append([name, length, tokens, f"{estimate.trainable:,}", *peaks_gib, sent])
            print(*rows[-1], sep=", ", file=sys.stderr, flush=True)
    heads = ["method", "P", "T", "trainable", "unsharded", "8 shards", "64 shards", "gradients sent, MiB"]
    return markdown(rows, heads)


def paper(args: Namespace) -> str:
    """Returns the computed duration of a step of the 70B backbone on 8 to 1,024 GPUs, from the arguments."""
    layers, hidden, inner, heads, kv, _ = SHAPE
    attention_parameters = 2 * hidden + 2 * hidden * kv // heads
    parameters = layers * hidden * (attention_parameters + 3 * inner)
    weights, gradients = 2 * parameters, 4 * 20 * hidden  # bytes
    flops = args.flops * args.utilization
    compute = 4 * parameters * args.tokens * args.rows / flops  # forward, and backward to the inputs
    rows = []
    for devices in (8, 64, 256, 1024):
        within_machine = 2 * gradients / args.inside
        ring = 2 * gradients / args.between + 2 * (devices - 1) * args.hop
        reduce = ring if devices > 8 else within_machine
        for name, shards in {"one copy per machine": 8, "one copy in total": devices}.items():
            bandwidth = args.inside if shards <= 8 else args.between
            received = 2 * weights * (shards - 1) / shards
            gather = received / bandwidth
            efficiency = compute / (max(compute, gather) + reduce)
            tokens_to_hide_gather = gather * flops / (4 * parameters)
            rows.append([
                devices, name, f"{received / 1e9:.0f} GB", f"{gather:.2f}", f"{compute:.2f}",
                f"{1e3 * reduce:.1f}", f"{efficiency:.2f}", f"{tokens_to_hide_gather:,.0f}",
            ])  # fmt: skip
    header = ["GPUs", "layers", "weights received", "s to gather", "s to compute", "ms to reduce prompts", "efficiency"]
    return markdown(rows, [*header, "tokens per GPU that hide gathering"])


def markdown(rows: list[list[Any]], header: list[str]) -> str:
    """Returns a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main() -> None:
    """Prints the selected table."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("measured", "memory", "paper", "worker"))
    parser.add_argument("--backbone", default="smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--strategies", nargs="+", default=["ddp", "sharded"])
    parser.add_argument("--flops", type=float, default=989e12, help="peak bfloat16 operations per second of a GPU")
    parser.add_argument("--utilization", type=float, default=0.4, help="fraction of the peak that a step achieves")
    parser.add_argument("--inside", type=float, default=450e9, help="bytes per second between GPUs of a machine")
    parser.add_argument("--between", type=float, default=50e9, help="bytes per second between machines, for each GPU")
    parser.add_argument("--hop", type=float, default=1e-5, help="seconds of one hop between GPUs of a ring")
    for name in ("--folder", "--strategy"):
        parser.add_argument(name)
    parser.add_argument("--world", type=int)
    args = parser.parse_args()
    if args.what == "worker":
        sys.exit(worker(args))
    print({"measured": measure, "memory": memory, "paper": paper}[args.what](args))


if __name__ == "__main__":
    main()
