"""Compares orders of the training rows of an instruction tuning at equal tokens.

python benchmarks/curricula.py --data data/dolly --out curricula.jsonl

Each order uses the same rows once, so that all have the same tokens and steps: `random`, `length` (target tokens, easy
to hard), `bare loss` (easy to hard), and `anti` (bare loss, hard to easy). A run is one line of the file, with the loss
of each validation row; a run that is in the file is not repeated. The table compares each order with `random` on the
same validation rows, by the mean loss of a row over the seeds, with a bootstrap interval over rows. A second table has
the validation loss after each quarter of the steps, with the tokens that each order has used until then. Products are
in bfloat16, also those of the bare backbone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback

import lightning_softprompt as sp
from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.core.types import Encoded
from lightning_softprompt.data.curricula.base import Curriculum
from lightning_softprompt.data.curricula.easy_to_hard import EasyToHard
from lightning_softprompt.data.difficulty.losses import BareLoss
from lightning_softprompt.data.difficulty.row_losses import RowLosses
from lightning_softprompt.data.difficulty.tokens import TargetTokens
from lightning_softprompt.data.instruction.datamodule import InstructionDataModule
from lightning_softprompt.evaluation.metrics.intervals import bootstrap
from lightning_softprompt.reports.text_table import table

EVAL_BATCH = 16
ORDERS: Mapping[str, Curriculum | None] = {
    "random": None,
    "length": EasyToHard(TargetTokens()),
    "bare loss": EasyToHard(BareLoss()),
    "anti": EasyToHard(BareLoss(), reverse=True),
}


def read_rows(path: Path, data: InstructionDataModule, count: int, most_tokens: int) -> list[dict[str, Any]]:
    """Returns the first rows of a file that have at most some tokens."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        encoded = data._encoder.encode(data.example(row, labelled=True))
        if len(encoded.ids) + len(encoded.targets) <= most_tokens:
            rows.append(row)
        if len(rows) == count:
            break
    return rows


class Curve(Callback):
    """Records training losses and tokens of each step, and validation losses at some steps.

    Args:
        data: The data of the run.
        every: Steps between two measurements of the validation rows.
    """

    def __init__(self, data: InstructionDataModule, every: int) -> None:
        self.data, self.every = data, every
        self.steps: list[list[float]] = []
        self.validation: list[list[float]] = []
        self.tokens = 0

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Records a step."""
        self.tokens += int(batch.mask.sum())
        self.steps.append([self.tokens, round(float(outputs["loss"]), 4)])
        if trainer.global_step % self.every == 0:
            losses = measure_validation(trainer, self.data).current_losses(self.data.split("validation"))
            self.validation.append([trainer.global_step, self.tokens, round(float(losses.mean()), 4)])


def measure_validation(trainer: Any, data: InstructionDataModule) -> RowLosses:
    """Returns what measures losses of rows with the precision of a trainer."""
    return RowLosses(trainer, data.spec, data._encoder, EVAL_BATCH, cache=False)


def try_largest_batch(module: Any, rows: Sequence[Encoded], batch_size: int) -> None:
    """Lets the backbone select its path for a batch of the longest rows; each larger batch would repeat the trial."""
    longest = sorted(rows, key=lambda row: len(row.ids))[-batch_size:]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        module.lm().cross_entropy(module.loaded.codec.collate(longest))


def train(backbone: Backbone, data: InstructionDataModule, seed: int, args: argparse.Namespace) -> tuple[Any, Curve]:
    """Trains one epoch; returns the method and its course."""
    torch.manual_seed(seed)
    module = sp.PromptTuning(data=data, length=20, lr=args.rate, lr_schedule="linear")
    module.attach(backbone, seed)
    try_largest_batch(module, [*data.split("train").encoded, *data.split("validation").encoded], EVAL_BATCH)
    curve = Curve(data, every=args.rows // args.batch_size // 4)
    trainer = sp.Trainer(
        run=None, max_epochs=1, limit_val_batches=0, enable_progress_bar=False, accelerator="cpu",
        precision=args.precision, callbacks=[curve],
    )  # fmt: skip
    trainer.fit(module, data)
    return module, curve


def measure(args: argparse.Namespace) -> None:
    """Trains the runs that the file lacks."""
    lines = args.out.read_text().splitlines() if args.out.is_file() else []
    complete = {(run["order"], run["seed"]) for run in map(json.loads, lines)}
    bare: list[float] | None = None
    spec = sp.BackboneSpec(**({"name": args.backbone} if args.backbone else {}), linear_backend="plain")
    backbone = load_backbone(spec)
    reader = InstructionDataModule(backbone=spec, system=False, max_target_tokens=args.most_tokens // 2)
    train_rows = read_rows(args.data / "train.jsonl", reader, args.rows, args.most_tokens)
    test_rows = read_rows(args.data / "validation.jsonl", reader, args.test_rows, args.most_tokens)
    for seed in range(args.seeds):
        for order, curriculum in ORDERS.items():
            if (order, seed) in complete:
                continue
            data = InstructionDataModule(
                backbone=spec, train=train_rows, validation=test_rows, batch_size=args.batch_size, seed=seed,
                curriculum=curriculum, system=False, max_target_tokens=args.most_tokens // 2,
            )  # fmt: skip
            data.codec = backbone.codec
            start = process_time()
            module, curve = train(backbone, data, seed, args)
            seconds = process_time() - start
            measuring, validation = measure_validation(module.trainer, data), data.split("validation")
            if bare is None:
                bare = measuring.bare_losses(validation).round(4).tolist()
            run = {
                "order": order, "seed": seed, "tokens": curve.tokens, "cpu_seconds": round(seconds, 1),
                "precision": args.precision, "bare": bare,
                "losses": measuring.current_losses(validation).round(4).tolist(),
                "validation": curve.validation, "steps": curve.steps,
            }  # fmt: skip
            with args.out.open("a") as file:
                file.write(f"{json.dumps(run)}\n")
            print(order, seed, round(float(np.mean(run["losses"])), 4), f"{seconds:.0f} cpu s", flush=True)


def report(path: Path) -> str:
    """Returns the table of a file of runs."""
    runs = [json.loads(line) for line in path.read_text().splitlines()]
    by_order = {order: [run for run in runs if run["order"] == order] for order in ORDERS}
    seeds = {order: {run["seed"] for run in of_order} for order, of_order in by_order.items()}
    common = set.intersection(*seeds.values())
    if not common:
        raise ValueError(f"no seed has all orders yet: {seeds}")
    cells = []
    baseline: Any = None
    for order, of_order in by_order.items():
        losses = np.array([run["losses"] for run in of_order if run["seed"] in common])  # [seeds, rows]
        rows = losses.mean(0)
        baseline = rows if baseline is None else baseline
        by_seed = ", ".join(f"{loss:.3f}" for loss in losses.mean(1))
        cells.append([order, f"{rows.mean():.4f}", by_seed, *difference(rows, baseline)])
    bare = np.array(runs[0]["bare"])
    cells.append(["bare", f"{bare.mean():.4f}", "", *difference(bare, baseline)])
    return table(cells, ["order", "loss", "by seed", "minus random", "95 % interval"])


def difference(rows: Any, baseline: Any) -> list[str]:
    """Returns the cells of a paired difference from the baseline."""
    differences = rows - baseline
    if not differences.any():
        return ["-", "-"]
    low, high = bootstrap(differences.tolist())
    return [f"{differences.mean():+.4f}", f"[{low:+.4f}, {high:+.4f}]"]


def main() -> None:
    """Run the comparison and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of instruction rows")
    parser.add_argument("--out", type=Path, required=True, help="file of runs")
    parser.add_argument("--backbone", help="backbone (default: the packaged one)")
    parser.add_argument("--rows", type=int, default=480, help="training rows")
    parser.add_argument("--test_rows", type=int, default=120, help="validation rows")
    parser.add_argument("--most_tokens", type=int, default=64, help="most tokens of a row")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=0.005, help="learning rate")
    parser.add_argument("--precision", default="bf16-mixed", help="precision of all products (default: bf16-mixed)")
    parser.add_argument("--only_report", action="store_true", help="print the table of the file")
    args = parser.parse_args()
    if not args.only_report:
        measure(args)
    print(report(args.out))


if __name__ == "__main__":
    main()
