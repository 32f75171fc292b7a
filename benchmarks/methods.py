"""Compares all methods on several tasks at equal steps: accuracy, parameters, seconds and memory per step.

    python benchmarks/methods.py --data PATH/TO/classification --out methods.jsonl --png benchmarks/methods.png

For each method and task, a run of replicas tries learning rates. The rate with the lowest validation loss then trains
prompts with several seeds, which are evaluated on test rows. `--rates-of TASK` reuses the rates of another task instead
of a search. All methods train on the same rows in the same order.
Results are appended to `--out`, and a run that is started again skips what has a result.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from math import isnan
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import yaml
from measure import measure_peak_bytes
from torch.optim import AdamW

from lightning_softprompt import methods
from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.types import Batch
from lightning_softprompt.data.classification import ClassificationDataModule
from lightning_softprompt.data.readers.sources import read_rows
from lightning_softprompt.evaluation.metrics.intervals import student_interval
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.training.replicas import Replicas, ReplicaSpec

CONFIGS = Path(__file__).parent.parent / "configs" / "data"
TASKS = ("sst2", "rte", "trec6", "medical_abstracts")
FREE, NETWORK = (1e-3, 5e-3, 2e-2), (1e-4, 3e-4, 1e-3)  # learning rates: a network changes a prompt more per step
MethodFactory = Callable[..., SoftPromptModule]
METHODS: dict[str, tuple[MethodFactory, Sequence[float]]] = {
    "prompt tuning": (partial(methods.PromptTuning, length=20), FREE),
    "residual": (partial(methods.ResidualPromptTuning, length=10), NETWORK),
    "P-tuning": (partial(methods.PTuning, blocks=(10,), encoder="mlp"), NETWORK),
    "prefix, network": (partial(methods.PrefixTuning, length=10, width=128), NETWORK),
    "prefix, free": (partial(methods.PrefixTuning, length=10, width=None), FREE),
    "P-tuning v2": (partial(methods.PTuningV2, length=10), FREE),
    "DPT, rank 4": (partial(methods.DPT, length=20, rank=4), FREE),
    "DPT, rank 10": (partial(methods.DPT, length=20, rank=10), FREE),
    "ULPT": (partial(methods.ULPT, length=20, rank=16), FREE),
    "DePT": (partial(methods.DePT, length=10, rank=8), FREE),
    "ADePT": (partial(methods.ADePT, length=10, bottleneck=8), FREE),
    "SMoP": (partial(methods.SMoP, length=5, experts=4), FREE),
    "PT-MoE": (partial(methods.PTMoE, length=20, rank=10, experts=2), FREE),
    "IDPG": (partial(methods.IDPG, length=5), NETWORK),
    "late": (partial(methods.LatePromptTuning, length=5), NETWORK),
    "context-aware": (methods.ContextAware, FREE),
}


def load_data(task: str, args: argparse.Namespace, **overrides: Any) -> ClassificationDataModule:
    """Returns a data module of sampled rows of a task, which do not depend on the seed of a run."""
    options = yaml.safe_load((CONFIGS / f"{task}.yaml").read_text())["init_args"]
    sizes = {"train": args.rows, "validation": args.rows // 4, "test": args.rows // 2}
    options |= {split: sample_rows(str(args.data / task), split, size) for split, size in sizes.items()}
    options |= {"max_tokens": args.tokens, "batch_size": args.batch, "eval_batch_size": 32, "demonstrations": 1}
    data = ClassificationDataModule(**{**options, "path": None, **overrides})
    data.setup("fit")
    return data


def sample_rows(folder: str, split: Any, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Returns `count` random rows of a split."""
    rows = read_rows(folder, split=split)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]
    return [dict(rows[i]) for i in order.tolist()]


def make_replicas(
    make_method: MethodFactory,
    data: ClassificationDataModule,
    backbone: Backbone,
    seeds: Sequence[int],
    rates: Sequence[float],
) -> Replicas:
    """Returns prompts that share the backbone, one per seed, with their learning rates."""
    optimizer = partial(AdamW, lr=rates[0])
    method = make_method(backbone=backbone.spec, classes=data.classes, evaluation=data.evaluation, optimizer=optimizer)
    spec = ReplicaSpec(len(seeds), list(seeds), list(rates)) if len(seeds) > 1 else ReplicaSpec()
    replicas = Replicas(method, spec)
    for replica, seed in zip(replicas.methods, seeds, strict=True):
        replica.attach(backbone, seed)
    return replicas


def train(replicas: Replicas, data: ClassificationDataModule, steps: int) -> float:
    """Trains all prompts together, and returns the median seconds per step of one prompt."""
    optimizer, seconds = replicas.configure_optimizers(), []
    batches = iterate_batches(data)
    replicas.train()
    for _ in range(steps):
        batch, start = next(batches), time.perf_counter()
        optimizer.zero_grad()
        for replica in replicas.methods:
            replica.step(batch)["loss"].backward()
        optimizer.step()
        seconds.append((time.perf_counter() - start) / len(replicas.methods))
    replicas.eval()
    return median(seconds)


def iterate_batches(data: ClassificationDataModule) -> Any:
    """Yields training batches of all epochs."""
    epoch = 0
    while True:
        loader = data.train_dataloader()
        loader.batch_sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


@torch.no_grad()
def evaluate(method: SoftPromptModule, batches: Sequence[Batch]) -> dict[str, float]:
    """Returns the metrics of a method on batches."""
    method.reset_metrics("test", 0)
    for batch in batches:
        method.score("test", batch)
    return {name.removeprefix("test/"): float(value) for name, value in method.compute_metrics("test").items()}


def search_rate(name: str, data: ClassificationDataModule, backbone: Backbone, steps: int) -> dict[float, float]:
    """Returns the validation loss after training with each learning rate."""
    make_method, rates = METHODS[name]
    search = make_replicas(make_method, data, backbone, [0] * len(rates), rates)
    train(search, data, steps)
    validation = list(data.val_dataloader())
    losses = [evaluate(method, validation)["cross_entropy"] for method in search.methods]
    return dict(zip(rates, losses, strict=True))


def measure_method(
    name: str, data: ClassificationDataModule, backbone: Backbone, args: Any, known_rate: float | None
) -> dict[str, Any]:
    """Searches the learning rate unless it is known, then trains and evaluates a prompt per seed."""
    make_method, test = METHODS[name][0], list(data.test_dataloader())
    losses = search_rate(name, data, backbone, args.steps) if known_rate is None else {known_rate: float("nan")}
    rate = min(losses, key=lambda rate: float("inf") if isnan(losses[rate]) else losses[rate])
    seeds = list(range(1, args.seeds + 1))
    final = make_replicas(make_method, data, backbone, seeds, [rate] * len(seeds))
    seconds = train(final, data, args.steps)
    method = final.train().methods[0]
    batch = next(iter(data.train_dataloader()))
    peak = measure_peak_bytes(lambda: method.step(batch)["loss"].backward())
    results = [evaluate(method, test) for method in final.eval().methods]
    count = sum(p.numel() for p in method.parameters() if p.requires_grad)
    return {
        "rate": rate, "search": {} if known_rate else {str(r): loss for r, loss in losses.items()}, "parameters": count,
        "seconds": seconds, "peak_bytes": peak,
        "accuracy": [r["accuracy"] for r in results], "macro_f1": [r["macro_f1"] for r in results],
    }  # fmt: skip


def evaluate_untrained(data: ClassificationDataModule, backbone: Backbone) -> dict[str, Any]:
    """Evaluates the backbone without a prompt, and with untrained demonstrations (in-context learning)."""
    test = list(data.test_dataloader())
    common: dict[str, Any] = {"classes": data.classes, "evaluation": data.evaluation, "backbone": backbone.spec}
    both = {"bare": methods.NoPrompt(**common), "in context": methods.ContextAware(**common)}
    for method in both.values():
        method.attach(backbone)
    return {name: evaluate(method.eval(), test) for name, method in both.items()}


def table(records: Sequence[dict[str, Any]]) -> str:
    """Returns a Markdown table with a row for each method and a column for each task."""
    tasks = [task for task in TASKS if any(r["task"] == task for r in records)]
    lines = [
        f"| method | parameters | s / step | peak MB | {' | '.join(tasks)} | mean |",
        "|---" * (5 + len(tasks)) + "|",
    ]
    for name in dict.fromkeys(r["method"] for r in records):
        by_task = {r["task"]: r for r in records if r["method"] == name}
        cells = [format_interval(by_task[task]["accuracy"]) if task in by_task else "" for task in tasks]
        first = next(iter(by_task.values()))
        mean = fmean(fmean(record["accuracy"]) for record in by_task.values())
        peak_mb = first["peak_bytes"] / 2**20
        costs = [f"{first['parameters']:,}", f"{first['seconds']:.2f}", f"{peak_mb:.0f}"]
        columns = [name, *costs, *cells, f"{mean:.3f}"]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def format_interval(values: Sequence[float]) -> str:
    """Returns the mean and the half-width of the 95 % interval as text."""
    mean, half = student_interval(list(values))
    if len(values) == 1:
        return f"{mean:.3f}"
    return f"{mean:.3f} ± {half:.3f}"


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Plots the accuracy of methods, sorted by number of parameters, with a panel for each task."""
    from matplotlib.figure import Figure

    tasks = [task for task in TASKS if any(r["task"] == task for r in records)]
    trained = sorted((r for r in records if r["parameters"]), key=lambda r: r["parameters"])
    sizes = {r["method"]: r["parameters"] for r in reversed(trained)}
    names = sorted(sizes, key=sizes.__getitem__)
    figure = Figure(figsize=(2 + 2.6 * len(tasks), 0.6 + 0.28 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    for axes, task in zip(panels, tasks, strict=True):
        for record in (r for r in trained if r["task"] == task):
            mean, half = student_interval(list(record["accuracy"]))
            position = names.index(record["method"])
            axes.errorbar(mean, position, xerr=half, fmt="o", color="#1f4e8c", ecolor="#8fb3d9")
        for record in (r for r in records if r["task"] == task and not r["parameters"]):
            style = "-" if record["method"] == "bare" else ":"
            axes.axvline(record["accuracy"][0], color="#d1495b", linewidth=1, linestyle=style)
        axes.set_title(task)
        axes.set_xlabel("test accuracy")
        axes.spines[["top", "right"]].set_visible(False)
    labels = [f"{name}, {sizes[name]:,}" for name in names]
    figure.axes[0].set_yticks(range(len(names)), labels)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Runs what has no result yet, then prints the table and plots it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines of results, one per method and task")
    parser.add_argument("--png", type=Path)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument(
        "--rows", type=int, default=400, help="training rows; a quarter of it for validation, half for test"
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="maximum number of tokens per row")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates-of", help="task in --out whose learning rates are used")
    parser.add_argument("--linear-backend", default="auto")
    args = parser.parse_args()
    backbone = load_backbone(BackboneSpec(linear_backend=args.linear_backend))
    records = read_records(args.out)
    for task in args.tasks:
        data = load_data(task, args)
        done = {record["method"] for record in records if record["task"] == task}
        if "bare" not in done:
            for name, metrics in evaluate_untrained(data, backbone).items():
                cost = {"parameters": 0, "seconds": 0.0, "peak_bytes": 0}
                records.append({"task": task, "method": name, **cost, "accuracy": [metrics["accuracy"]]})
                append_record(args.out, records[-1])
        for name in args.methods:
            if name in done:
                continue
            rates = {record["method"]: record.get("rate") for record in records if record["task"] == args.rates_of}
            known_rate = rates.get(name)
            records.append({"task": task, "method": name, **measure_method(name, data, backbone, args, known_rate)})
            append_record(args.out, records[-1])
    print(table(records))
    if args.png:
        draw(records, args.png)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Returns the records of earlier runs."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Appends a record to the file, and prints it."""
    with path.open("a") as file:
        file.write(f"{json.dumps(record)}\n")
    names = ("task", "shots", "method", "accuracy", "seconds")
    print({name: record[name] for name in names if name in record}, flush=True)


if __name__ == "__main__":
    main()
