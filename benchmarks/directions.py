"""Tests claims of papers about soft prompts on a small scale: initial values, length, learning rate and few shots.

    python benchmarks/directions.py --data PATH/TO/classification --out benchmarks/directions.jsonl

The data set is SST-2, with the rows and learning rates of `methods.py`. The variants of a study differ in one setting;
seeds are replicas. Results are appended to `--out`, and a run that is started again skips what has a result.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from methods import (
    MethodFactory,
    append_record,
    evaluate,
    format_interval,
    iterate_batches,
    load_data,
    make_replicas,
    read_records,
    train,
)

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.callbacks.algorithms.pruning import Pruning
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.data.classification import ClassificationDataModule
from lightning_softprompt.methods import ContextAware, PromptTuning, ResidualPromptTuning, XPrompt
from lightning_softprompt.prompts.init import FromText, SampleVocabulary, Uniform

Variant = tuple[MethodFactory, float, dict[str, Any]]  # method, learning rate, options of the data
QUESTION = "Is the review of this film positive or negative? Decide by its words."
SHOTS = {"shots": 4, "demonstrations": 4}
STUDIES: dict[str, dict[str, Variant]] = {
    "initial values (2104.08691: text and words better than random)": {
        "uniform": (partial(PromptTuning, length=20, init=Uniform()), 5e-3, {}),
        "vocabulary": (partial(PromptTuning, length=20, init=SampleVocabulary()), 5e-3, {}),
        "text": (partial(PromptTuning, length=20, init=FromText(QUESTION)), 5e-3, {}),
    },
    "length (2104.08691: little gain beyond 20)": {
        f"{length} soft tokens": (partial(PromptTuning, length=length), 5e-3, {}) for length in (1, 5, 20, 50)
    },
    "learning rate (2305.03937: residual is robust)": {
        f"{name}, {rate:g}": (partial(method, length=10), rate, {})
        for name, method in (("prompt tuning", PromptTuning), ("residual", ResidualPromptTuning))
        for rate in (1e-4, 1e-3, 1e-2, 1e-1)
    },
    "four shots per class (2410.17222: context-aware better than in-context and prompt tuning)": {
        "in context": (ContextAware, 0.0, SHOTS),
        "context-aware": (ContextAware, 1e-3, SHOTS),
        "prompt tuning": (partial(PromptTuning, length=20), 5e-3, SHOTS),
    },
}


PRUNING = "half of the tokens, then half of their pieces (2210.04457: the important ones suffice)"
SELECTIONS = ("all", "best", "random", "worst")


def run_pruning(backbone: Backbone, args: Any) -> Iterator[dict[str, Any]]:
    """Yields results of XPrompt and its controls.

    One training is pruned with each selection, rewound, and resumed for half its steps.
    """
    data = load_data("sst2", args)
    seeds = list(range(1, args.seeds + 1))
    replicas: Any = make_replicas(partial(XPrompt, length=20), data, backbone, seeds, [5e-3] * len(seeds))
    train(replicas, data, args.steps)
    before = deepcopy(replicas.state_dict())
    for selection in SELECTIONS:
        replicas.load_state_dict(before)
        for method in replicas.methods if selection != "all" else ():
            prune(method, data, Pruning(keep=selection))  # type: ignore[arg-type]
        seconds = train(replicas, data, args.steps // 2)
        test = list(data.test_dataloader())
        results = [evaluate(method, test) for method in replicas.eval().methods]
        scores = {name: [result[name] for result in results] for name in ("accuracy", "loss")}
        yield {"task": PRUNING, "method": f"{selection} kept", **scores, "seconds": seconds}


def prune(method: Any, data: ClassificationDataModule, pruning: Pruning) -> None:
    """Prunes tokens, then pieces, by their importance over ten batches."""
    for step, shape in ((pruning._prune_tokens, 1), (pruning._prune_pieces, 0)):
        importance = torch.zeros_like(method.kept_pieces, dtype=torch.float)
        for batch in islice(iterate_batches(data), 10):
            (grad,) = torch.autograd.grad(method.step(batch)["loss"], method.tokens)
            gates = method.in_pieces((grad * method.tokens).detach()).sum(-1)
            importance += gates.sum(1, keepdim=True).abs().expand_as(gates) if shape else gates.abs()
        step(method, importance[:, 0] if shape else importance)


def run_variant(
    make_method: MethodFactory, rate: float, data: ClassificationDataModule, backbone: Backbone, args: Any
) -> dict[str, Any]:
    """Trains a prompt per seed, and returns their test accuracies and losses."""
    seeds = list(range(1, args.seeds + 1)) if rate else [1]
    replicas = make_replicas(make_method, data, backbone, seeds, [rate] * len(seeds))
    seconds = train(replicas, data, args.steps) if rate else 0.0
    test = list(data.test_dataloader())
    results = [evaluate(method, test) for method in replicas.eval().methods]
    scores = {name: [result[name] for result in results] for name in ("accuracy", "loss")}
    return {**scores, "seconds": seconds}


def table(records: Sequence[dict[str, Any]]) -> str:
    """Returns a Markdown table for each study."""
    lines: list[str] = []
    for study in dict.fromkeys(record["task"] for record in records):
        lines += ["", f"| {study} | accuracy | loss |", "|---|---|---|"]
        for record in records:
            if record["task"] == study:
                accuracy, loss = format_interval(record["accuracy"]), format_interval(record["loss"])
                lines.append(f"| {record['method']} | {accuracy} | {loss} |")
    return "\n".join(lines)


def main() -> None:
    """Runs what has no result yet, then prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines of results")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=400, help="training rows; the test has half of this number")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="maximum number of tokens per row")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    backbone = load_backbone(BackboneSpec())
    records = read_records(args.out)
    for study, variants in STUDIES.items():
        for name, (make_method, rate, options) in variants.items():
            if any((r["task"], r["method"]) == (study, name) for r in records):
                continue
            data = load_data("sst2", args, **options)
            records.append({"task": study, "method": name, **run_variant(make_method, rate, data, backbone, args)})
            append_record(args.out, records[-1])
    if not any(r["task"] == PRUNING for r in records):
        for record in run_pruning(backbone, args):
            records.append(record)
            append_record(args.out, record)
    print(table(records))


if __name__ == "__main__":
    main()
