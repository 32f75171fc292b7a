"""What a training step costs beside its arithmetic: `softprompt fit` against a plain loop over the same batches.

    python benchmarks/overhead.py --data PATH/TO/classification/sst2

A backbone too small to matter, so that what is left is loop, logging, callbacks and progress bar; validation is left
out. The time of a step is that of a long run less that of a short one, over the steps between them; best of the rounds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from itertools import chain, count, islice
from pathlib import Path

import torch
from sides import random_llama
from torch.optim import AdamW

from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.cli.app import main as run_command
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.data.classification import ClassificationDataModule
from lightning_softprompt.methods import PromptTuning

TEMPLATE = "{soft}Review: {text}\nSentiment:{target}"
LABELS = {"negative": " bad", "positive": " good"}
SHORT, LONG = 100, 1100
OPTIONS = {
    "softprompt fit": ["--trainer.enable_progress_bar=false"],
    "with progress bar": [],
    "logging every 10th step, not 50th": ["--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=10"],
}


def fitted(folder: Path, data: Path, options: Sequence[str], steps: int) -> float:
    """Seconds of a run."""
    start = time.perf_counter()
    code = run_command([
        "fit", f"--backbone.name={folder}", "--model=PromptTuning", "--data=ClassificationDataModule",
        f"--data.path={data}", f"--data.template={TEMPLATE}", f"--data.labels={LABELS}", "--data.batch_size=1",
        "--trainer.max_epochs=-1", f"--trainer.max_steps={steps}", "--trainer.limit_val_batches=0",
        "--trainer.accelerator=cpu", f"--run.folder={folder / 'runs'}", *options,
    ])  # fmt: skip
    assert code == 0
    return time.perf_counter() - start


def looped(folder: Path, data: Path, steps: int) -> float:
    """Seconds of the same steps in a plain loop."""
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
    """Prints milliseconds."""
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
        ways = {"plain loop": partial(looped, folder, args.data)} | {
            label: partial(fitted, folder, args.data, options) for label, options in OPTIONS.items()
        }
        times: dict[str, list[float]] = {label: [] for label in ways}
        for _ in range(args.rounds):
            for label, way in ways.items():
                times[label].append(way(LONG) - way(SHORT))
        each = {label: 1000 * min(values) / (LONG - SHORT) for label, values in times.items()}
    print("| | ms a step | more than the loop | of a step of 30 ms |\n|---|---|---|---|")
    for label, value in each.items():
        more = value - each["plain loop"]
        print(f"| {label} | {value:.2f} | {more:.2f} | {more / 30:.1%} |")


if __name__ == "__main__":
    main()
