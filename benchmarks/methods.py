"""Every method on several tasks at equal steps: accuracy with interval, parameters, seconds and memory of a step.

    python benchmarks/methods.py --data PATH/TO/classification --out methods.jsonl --png benchmarks/methods.png

For each method and task, one run of replicas tries learning rates; the one with the lowest validation loss then trains
prompts of several seeds, which are scored on test rows. With `--rates-of TASK` the rate is the one found there, and
none are tried. All see the same slices of the data, in the same order.
Results are added to `--out` as they come; what is there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from measure import peak_bytes
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
FREE, NETWORK = (1e-3, 5e-3, 2e-2), (1e-4, 3e-4, 1e-3)  # learning rates tried: a network moves a prompt farther a step
Made = Callable[..., SoftPromptModule]
METHODS: dict[str, tuple[Made, Sequence[float]]] = {
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


def slices(task: str, args: argparse.Namespace, **changed: Any) -> ClassificationDataModule:
    """Slices of a task's rows, drawn once and for all; perhaps with other options of the data module."""
    options = yaml.safe_load((CONFIGS / f"{task}.yaml").read_text())["init_args"]
    sizes = {"train": args.rows, "validation": args.rows // 4, "test": args.rows // 2}
    options |= {split: drawn(str(args.data / task), split, size) for split, size in sizes.items()}
    options |= {"max_tokens": args.tokens, "batch_size": args.batch, "eval_batch_size": 32, "demonstrations": 1}
    data = ClassificationDataModule(**{**options, "path": None, **changed})
    data.setup("fit")
    return data


def drawn(folder: str, split: Any, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Random rows of a split, by the seed."""
    rows = read_rows(folder, split=split)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]
    return [dict(rows[i]) for i in order.tolist()]


def replicas(made: Made, data: ClassificationDataModule, backbone: Backbone, spec: ReplicaSpec) -> Replicas:
    """Prompts on the one backbone."""
    common = {"classes": data.classes, "evaluation": data.evaluation, "optimizer": partial(AdamW, lr=1e-3)}
    together = Replicas(made(backbone=backbone.spec, **common), spec)
    for replica, seed in zip(together.methods, together.seeds, strict=True):
        replica.attach(backbone, seed)  # type: ignore[operator, union-attr]
    return together


def train(together: Replicas, data: ClassificationDataModule, steps: int) -> float:
    """Trains all prompts side by side; gives the seconds of a step of one."""
    optimizer, seconds = together.configure_optimizers(), []
    batches = endless(data)
    together.train()
    for _ in range(steps):
        batch, start = next(batches), time.perf_counter()
        optimizer.zero_grad()
        for replica in together.methods:
            replica.step(batch)["loss"].backward()
        optimizer.step()
        seconds.append((time.perf_counter() - start) / len(together.methods))
    together.eval()
    return median(seconds)


def endless(data: ClassificationDataModule) -> Any:
    """Training batches, epoch after epoch."""
    epoch = 0
    while True:
        loader = data.train_dataloader()
        loader.batch_sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


@torch.no_grad()
def scored(method: SoftPromptModule, batches: Sequence[Batch]) -> dict[str, float]:
    """Metrics of a pass."""
    method.reset_metrics("test", 0)
    for batch in batches:
        method.score("test", batch)
    return {name.removeprefix("test/"): float(value) for name, value in method.compute_metrics("test").items()}


def searched(name: str, data: ClassificationDataModule, backbone: Backbone, steps: int) -> dict[float, float]:
    """The validation loss after training at each rate."""
    made, rates = METHODS[name]
    search = replicas(made, data, backbone, ReplicaSpec(len(rates), [0] * len(rates), list(rates)))
    train(search, data, steps)
    validation = list(data.val_dataloader())
    losses = [scored(method, validation)["cross_entropy"] for method in search.methods]
    return dict(zip(rates, losses, strict=True))


def measured(
    name: str, data: ClassificationDataModule, backbone: Backbone, args: Any, known: float | None
) -> dict[str, Any]:
    """Searches the learning rate unless it is known, then trains the seeds."""
    made, test = METHODS[name][0], list(data.test_dataloader())
    losses = searched(name, data, backbone, args.steps) if known is None else {known: float("nan")}
    rate = min(losses, key=lambda rate: losses[rate] if losses[rate] == losses[rate] else float("inf"))
    seeds = list(range(1, args.seeds + 1))
    final = replicas(made, data, backbone, ReplicaSpec(args.seeds, seeds, [rate] * args.seeds))
    seconds = train(final, data, args.steps)
    one = final.train().methods[0]
    batch = next(iter(data.train_dataloader()))
    peak = peak_bytes(lambda: one.step(batch)["loss"].backward())
    results = [scored(method, test) for method in final.eval().methods]
    count = sum(p.numel() for p in one.parameters() if p.requires_grad)
    return {
        "rate": rate, "search": {} if known else {str(r): loss for r, loss in losses.items()}, "parameters": count,
        "seconds": seconds, "peak_bytes": peak,
        "accuracy": [r["accuracy"] for r in results], "macro_f1": [r["macro_f1"] for r in results],
    }  # fmt: skip


def bare(data: ClassificationDataModule, backbone: Backbone) -> dict[str, Any]:
    """The backbone without a prompt, and in-context learning: the demonstrations untrained."""
    test = list(data.test_dataloader())
    common = {"classes": data.classes, "evaluation": data.evaluation, "backbone": backbone.spec}
    both = {"bare": methods.NoPrompt(**common), "in context": methods.ContextAware(**common)}
    for method in both.values():
        method.attach(backbone)
    return {name: scored(method.eval(), test) for name, method in both.items()}


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each method, a column for each task."""
    tasks = [task for task in TASKS if any(r["task"] == task for r in records)]
    lines = [
        f"| method | parameters | s / step | peak MB | {' | '.join(tasks)} | mean |",
        "|---" * (5 + len(tasks)) + "|",
    ]
    for name in dict.fromkeys(r["method"] for r in records):
        of = {r["task"]: r for r in records if r["method"] == name}
        cells = [interval(of[task]["accuracy"]) if task in of else "" for task in tasks]
        first = next(iter(of.values()))
        mean = sum(sum(r["accuracy"]) / len(r["accuracy"]) for r in of.values()) / len(of)
        cost = [f"{first['parameters']:,}", f"{first['seconds']:.2f}", f"{first['peak_bytes'] / 2**20:.0f}"]
        lines.append(f"| {' | '.join([name, *cost, *cells, f'{mean:.3f}'])} |")
    return "\n".join(lines)


def interval(values: Sequence[float]) -> str:
    """Mean and half of the 95 % interval."""
    mean, half = student_interval(list(values))
    return f"{mean:.3f} ± {half:.3f}" if len(values) > 1 else f"{mean:.3f}"


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy of the methods by number of parameters, a panel for each task."""
    from matplotlib.figure import Figure

    tasks = [task for task in TASKS if any(r["task"] == task for r in records)]
    trained = sorted((r for r in records if r["parameters"]), key=lambda r: r["parameters"])
    sizes = {r["method"]: r["parameters"] for r in reversed(trained)}
    names = sorted(sizes, key=sizes.__getitem__)
    figure = Figure(figsize=(2 + 2.6 * len(tasks), 0.6 + 0.28 * len(names)), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0], tasks, strict=True):
        for record in (r for r in trained if r["task"] == task):
            mean, half = student_interval(list(record["accuracy"]))
            place = names.index(record["method"])
            axes.errorbar(mean, place, xerr=half, fmt="o", color="#1f4e8c", ecolor="#8fb3d9")
        for record in (r for r in records if r["task"] == task and not r["parameters"]):
            style = "-" if record["method"] == "bare" else ":"
            axes.axvline(record["accuracy"][0], color="#d1495b", linewidth=1, linestyle=style)
        axes.set_title(task)
        axes.set_xlabel("test accuracy")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_yticks(range(len(names)), [f"{name}, {sizes[name]:,}" for name in names])
    figure.savefig(path, dpi=120)


def main() -> None:
    """Runs what is not in the file yet, then prints the table and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one for each method and task")
    parser.add_argument("--png", type=Path)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=400, help="training rows; a quarter validates, half tests")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="most tokens of a row")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates-of", help="a task whose learning rates are in --out")
    parser.add_argument("--linear-backend", default="auto")
    args = parser.parse_args()
    backbone = load_backbone(BackboneSpec(linear_backend=args.linear_backend))
    there = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.is_file() else []
    for task in args.tasks:
        data = slices(task, args)
        if not any(r["task"] == task and r["method"] == "bare" for r in there):
            for name, metrics in bare(data, backbone).items():
                cost = {"parameters": 0, "seconds": 0.0, "peak_bytes": 0}
                there.append({"task": task, "method": name, **cost, "accuracy": [metrics["accuracy"]]})
                keep(args.out, there[-1])
        for name in args.methods:
            if any(r["task"] == task and r["method"] == name for r in there):
                continue
            known = next((r["rate"] for r in there if (r["task"], r["method"]) == (args.rates_of, name)), None)
            there.append({"task": task, "method": name, **measured(name, data, backbone, args, known)})
            keep(args.out, there[-1])
    print(table(there))
    if args.png:
        draw(there, args.png)


def keep(path: Path, record: dict[str, Any]) -> None:
    """Adds a line, and says it."""
    with path.open("a") as file:
        file.write(f"{json.dumps(record)}\n")
    print({k: record[k] for k in ("task", "shots", "method", "accuracy", "seconds") if k in record}, flush=True)


if __name__ == "__main__":
    main()
