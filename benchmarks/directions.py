"""What papers say of soft prompts, tried small: where they start, how long they are, how fast they learn, few shots.

    python benchmarks/directions.py --data PATH/TO/classification --out benchmarks/directions.jsonl

SST-2 with the slices and learning rates of `methods.py`. Each line of a study differs in one thing; seeds are replicas.
Results are added to `--out` as they come; what is there already is not run again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from methods import Made, endless, interval, keep, replicas, scored, slices, train

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.callbacks.algorithms.pruning import Pruning
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.data.classification import ClassificationDataModule
from lightning_softprompt.methods import ContextAware, PromptTuning, ResidualPromptTuning, XPrompt
from lightning_softprompt.prompts.init import FromText, SampleVocabulary, Uniform
from lightning_softprompt.training.replicas import ReplicaSpec

Line = tuple[Made, float, dict[str, Any]]  # method, learning rate, options of the data
TALK = "Is the review of this film positive or negative? Decide by its words."
SHOTS = {"shots": 4, "demonstrations": 4}
STUDIES: dict[str, dict[str, Line]] = {
    "start (2104.08691: text and words ahead of random)": {
        "uniform": (partial(PromptTuning, length=20, init=Uniform()), 5e-3, {}),
        "vocabulary": (partial(PromptTuning, length=20, init=SampleVocabulary()), 5e-3, {}),
        "text": (partial(PromptTuning, length=20, init=FromText(TALK)), 5e-3, {}),
    },
    "length (2104.08691: little beyond 20)": {
        f"{length} soft tokens": (partial(PromptTuning, length=length), 5e-3, {}) for length in (1, 5, 20, 50)
    },
    "learning rate (2305.03937: residual is robust)": {
        f"{name}, {rate:g}": (partial(method, length=10), rate, {})
        for name, method in (("prompt tuning", PromptTuning), ("residual", ResidualPromptTuning))
        for rate in (1e-4, 1e-3, 1e-2, 1e-1)
    },
    "four shots a class (2410.17222: context-aware ahead of in-context and prompt tuning)": {
        "in context": (ContextAware, 0.0, SHOTS),
        "context-aware": (ContextAware, 1e-3, SHOTS),
        "prompt tuning": (partial(PromptTuning, length=20), 5e-3, SHOTS),
    },
}


PRUNING = "half the tokens, then half their pieces (2210.04457: the important ones carry it)"
KEPT = ("all", "best", "random", "worst")


def pruning(backbone: Backbone, args: Any) -> Iterator[dict[str, Any]]:
    """XPrompt and its controls: one training, pruned in each way, rewound to where it was, and trained half as long."""
    data = slices("sst2", args)
    seeds = list(range(1, args.seeds + 1))
    spec = ReplicaSpec(len(seeds), seeds, [5e-3] * len(seeds))
    together: Any = replicas(partial(XPrompt, length=20), data, backbone, spec)
    train(together, data, args.steps)
    before = deepcopy(together.state_dict())
    for kept in KEPT:
        together.load_state_dict(before)
        for method in together.methods if kept != "all" else ():
            prune(method, data, Pruning(keep=kept))  # type: ignore[arg-type]
        seconds = train(together, data, args.steps // 2)
        test = list(data.test_dataloader())
        results = [scored(method, test) for method in together.eval().methods]
        scores = {name: [result[name] for result in results] for name in ("accuracy", "loss")}
        yield {"task": PRUNING, "method": f"{kept} kept", **scores, "seconds": seconds}


def prune(method: Any, data: ClassificationDataModule, pruning: Pruning) -> None:
    """Both prunings of the callback, each by importance over ten batches."""
    for step, shape in ((pruning._prune_tokens, 1), (pruning._prune_pieces, 0)):
        importance = torch.zeros_like(method.kept_pieces, dtype=torch.float)
        for batch in islice(endless(data), 10):
            (grad,) = torch.autograd.grad(method.step(batch)["loss"], method.tokens)
            gates = method.in_pieces((grad * method.tokens).detach()).sum(-1)
            importance += gates.sum(1, keepdim=True).abs().expand_as(gates) if shape else gates.abs()
        step(method, importance[:, 0] if shape else importance)


def line(made: Made, rate: float, data: ClassificationDataModule, backbone: Backbone, args: Any) -> dict[str, Any]:
    """Accuracies of the seeds."""
    seeds = list(range(1, args.seeds + 1)) if rate else [1]
    together = replicas(made, data, backbone, ReplicaSpec(len(seeds), seeds, [rate or 1.0] * len(seeds)))
    seconds = train(together, data, args.steps) if rate else 0.0
    test = list(data.test_dataloader())
    results = [scored(method, test) for method in together.eval().methods]
    return {"accuracy": [r["accuracy"] for r in results], "loss": [r["loss"] for r in results], "seconds": seconds}


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: a table for each study."""
    said: list[str] = []
    for study in dict.fromkeys(r["task"] for r in records):
        said += ["", f"| {study} | accuracy | loss |", "|---|---|---|"]
        own = [r for r in records if r["task"] == study]
        said += [f"| {r['method']} | {interval(r['accuracy'])} | {interval(r['loss'])} |" for r in own]
    return "\n".join(said)


def main() -> None:
    """Runs what is not in the file yet, then prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=400, help="training rows; half as many test")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="most tokens of a row")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    backbone = load_backbone(BackboneSpec())
    there = [json.loads(text) for text in args.out.read_text().splitlines()] if args.out.is_file() else []
    for study, lines in STUDIES.items():
        for name, (made, rate, options) in lines.items():
            if any((r["task"], r["method"]) == (study, name) for r in there):
                continue
            data = slices("sst2", args, **options)
            there.append({"task": study, "method": name, **line(made, rate, data, backbone, args)})
            keep(args.out, there[-1])
    if not any(r["task"] == PRUNING for r in there):
        for record in pruning(backbone, args):
            there.append(record)
            keep(args.out, record)
    print(table(there))


if __name__ == "__main__":
    main()
