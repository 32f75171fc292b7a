"""Compares K prompts in one run with K runs: seconds per step, and the difference of the prompts after 20 steps.

python benchmarks/replicas.py --data PATH/TO/classification --count 5
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import measure_peak_bytes, measure_seconds
from sides import DEVICE, load_batches
from torch.optim import AdamW

from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.types import Batch
from lightning_softprompt.methods import PromptTuning
from lightning_softprompt.training.replicas import Replicas, ReplicaSpec


def train_replicas(replicas: Replicas, optimizer: Any, batch: Batch) -> None:
    """Trains all prompts for one step, as `Replicas.training_step` does, without the Trainer."""
    optimizer.zero_grad()
    torch.stack([replica.step(batch)["loss"] for replica in replicas.methods]).sum().backward()
    optimizer.step()


def train_separately(modules: list[PromptTuning], optimizers: list[Any], batch: Batch) -> None:
    """Trains each prompt separately for one step."""
    for module, optimizer in zip(modules, optimizers, strict=True):
        optimizer.zero_grad()
        module.step(batch)["loss"].backward()
        optimizer.step()


def main() -> None:
    """Prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    backbone = load_backbone(BackboneSpec()).to(DEVICE)
    replicas = Replicas(PromptTuning(20), ReplicaSpec(args.count, seeds=list(range(args.count))))
    modules = [PromptTuning(20) for _ in range(args.count)]
    pairs: list[tuple[Any, PromptTuning]] = list(zip(replicas.methods, modules, strict=True))
    for (replica, module), seed in zip(pairs, replicas.seeds, strict=True):
        replica.attach(backbone, seed)
        module.attach(backbone, seed)
    optimizer = partial(AdamW, lr=0.005)
    variants: list[Callable[[Batch], None]] = [
        partial(train_replicas, replicas, optimizer([replica.tokens for replica, _ in pairs])),
        partial(train_separately, modules, [optimizer([module.tokens]) for module in modules]),
    ]
    times: list[list[float]] = []
    for batch in load_batches(backbone, args.data, "sst2", args.batch, 20):
        times.append([measure_seconds(partial(train, batch)) for train in variants])
    differences = []
    for replica, module in pairs:
        difference = (replica.tokens - module.tokens).detach().norm() / module.tokens.detach().norm()
        differences.append(float(difference))
    peaks = [measure_peak_bytes(partial(train, batch)) / 2**20 for train in variants]
    measured = times[2:]  # without warm-up
    together, separate = (median(column) for column in zip(*measured, strict=True))
    ratio = median(one / other for one, other in measured)
    print(f"{args.count} prompts together: {together:.3f} s per step, separately: {separate:.3f} s, ratio {ratio:.3f}")
    print(f"peak memory: {peaks[0]:.0f} MB and {peaks[1]:.0f} MB")
    print(f"largest relative difference after 20 steps: {max(differences):.1e}")


if __name__ == "__main__":
    main()
