"""K prompts in one run against K runs: seconds of a step, and how far the prompts are apart after 20 steps.

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
from measure import peak_bytes, seconds
from sides import DEVICE, batches
from torch.optim import AdamW

from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.types import Batch
from lightning_softprompt.methods import PromptTuning
from lightning_softprompt.training.replicas import Replicas, ReplicaSpec


def step(together: Replicas, optimizer: Any, batch: Batch) -> None:
    """Of all prompts at once, as `Replicas.training_step` does it, without the Trainer."""
    optimizer.zero_grad()
    torch.stack([replica.step(batch)["loss"] for replica in together.methods]).sum().backward()
    optimizer.step()


def steps(alone: list[PromptTuning], optimizers: list[Any], batch: Batch) -> None:
    """Of each prompt for itself."""
    for module, optimizer in zip(alone, optimizers, strict=True):
        optimizer.zero_grad()
        module.step(batch)["loss"].backward()
        optimizer.step()


def main() -> None:
    """Prints one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    backbone = load_backbone(BackboneSpec()).to(DEVICE)
    together = Replicas(PromptTuning(20), ReplicaSpec(args.count, seeds=list(range(args.count))))
    alone = [PromptTuning(20) for _ in range(args.count)]
    for module, seed in [
        *zip(together.methods, together.seeds, strict=True),
        *zip(alone, together.seeds, strict=True),
    ]:
        module.attach(backbone, seed)  # type: ignore[operator, union-attr]
    rate = partial(AdamW, lr=0.005)
    ways: list[Callable[[Batch], None]] = [
        partial(step, together, rate([r.tokens for r in together.methods])),
        partial(steps, alone, [rate([module.tokens]) for module in alone]),
    ]
    times: list[list[float]] = []
    for batch in batches(backbone, args.data, "sst2", args.batch, 20):
        times.append([seconds(partial(way, batch)) for way in ways])
    apart = [
        float((a.tokens - b.tokens).norm() / b.tokens.norm()) for a, b in zip(together.methods, alone, strict=True)
    ]
    peaks = [peak_bytes(partial(way, batch)) / 2**20 for way in ways]
    one, many = (median(column) for column in zip(*times[2:], strict=True))
    ratio = median(a / b for a, b in times[2:])
    print(f"{args.count} prompts together {one:.3f} s a step, one by one {many:.3f} s, ratio {ratio:.3f}; ", end="")
    print(f"peak {peaks[0]:.0f} MB against {peaks[1]:.0f} MB; after 20 steps apart by {max(apart):.1e}")


if __name__ == "__main__":
    main()
