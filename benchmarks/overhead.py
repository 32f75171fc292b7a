"""Measures the overhead of a training step: `softprompt fit` compared with a plain loop over the same batches.

    python benchmarks/overhead.py --data PATH/TO/classification/sst2

The backbone is so small that loop, logging, callbacks and progress bar dominate. There is no validation. The time per
step is the difference of a long and a short run, divided by the difference of their steps; the best round counts.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import torch
from sides import random_llama
from torch.optim import AdamW

from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.cli.app import main as run_command
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.data.classification import ClassificationDataModule
from lightning_softprompt.methods import PromptTuning

TEMPLATE = "{soft}Review: {text}\nSentiment:{target}"
LABELS: dict[str, Any] = {"negative": " bad", "positive": " good"}
SHORT, LONG = 100, 1100
OPTIONS = {
    "softprompt fit": ["--trainer.enable_progress_bar=false"],
    "with progress bar": [],
    "logging every 10th step, not 50th": ["--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=10"],
}


def measure_fit(folder: Path, data: Path, options: Sequence[str], steps: int) -> float:
    """Measures the seconds of a run."""
    start = time.perf_counter()
    code = run_command([
        "fit", f"--backbone.name={folder}", "--model=PromptTuning", "--data=ClassificationDataModule",
        f"--data.path={data}", f"--data.template={TEMPLATE}", f"--data.labels={LABELS}", "--data.batch_size=1",
        "--trainer.max_epochs=-1", f"--trainer.max_steps={steps}", "--trainer.limit_val_batches=0",
        "--trainer.accelerator=cpu", f"--run.folder={folder / 'runs'}", *options,
    ])  # fmt: skip
    assert code == 0
    return time.perf_counter() - start


def measure_loop(folder: Path, data: Path, steps: int) -> float:
    """Measures the seconds of the same steps in a plain loop."""
    spec = BackboneSpec(name=str(folder))
    rows = ClassificationDataModule(backbone=spec, path=str(data), template=TEMPLATE, labels=LABELS, batch_size=1)
    rows.setup("fit")
    module = PromptTuning(backbone=spec, classes=rows.classes)
    module.attach(load_backbone(spec))
    optimizer = AdamW([p for p in module.parameters() if p.requires_grad], lr=0.005)
    start = time.perf_counter()
    for batch in islice(chain.from_iterable(rows.train_dataloader() for _ in count()), steps):
        optimizer.zero_grad()
        module.step(batch)["loss"].backward()
        optimizer.step()
    return time.perf_counter() - start


def main() -> None:
    """Prints milliseconds per step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of SST-2")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        backbone = random_llama("tiny", BackboneSpec().name)(BackboneSpec())
        backbone.model.save_pretrained(folder)
        backbone.codec.tokenizer.save_pretrained(folder)
        measurements: dict[str, Callable[[int], float]] = {"plain loop": partial(measure_loop, folder, args.data)}
        for label, options in OPTIONS.items():
            measurements[label] = partial(measure_fit, folder, args.data, options)
        times: dict[str, list[float]] = {label: [] for label in measurements}
        for _ in range(args.rounds):
            for label, measure in measurements.items():
                times[label].append(measure(LONG) - measure(SHORT))
        milliseconds = {label: 1000 * min(values) / (LONG - SHORT) for label, values in times.items()}
    print("| | ms per step | overhead, ms | fraction of a step of 30 ms |\n|---|---|---|---|")
    for label, value in milliseconds.items():
        extra = value - milliseconds["plain loop"]
        fraction = extra / 30
        cells = [label, f"{value:.2f}", f"{extra:.2f}", f"{fraction:.1%}"]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
