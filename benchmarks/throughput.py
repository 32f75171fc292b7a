"""Compares this project with HF PEFT in one process: training steps, evaluation, generation, and RAG shapes.

    python benchmarks/throughput.py --data PATH/TO/classification --quick --json throughput.json --png throughput.png

Both have the same weights, rows, precision and position of the prompt (before all tokens, as in PEFT). The prompt's
gradient, the scores, or the generated tokens (of the longest rows, because PEFT computes wrong positions for rows that
are padded on the left) are compared before anything is timed. The sides alternate, round by round, over a pool of
batches; a ratio is the median over rounds. Columns:

* PEFT: `PeftModelForCausalLM` with attention mask and labels, as its users run it;
* grouped: PEFT with batches grouped by length;
* target logits: PEFT with logits for target rows only;
* manual: PEFT with both, and in the prepacked rows also with weights packed for oneDNN;
* prepacked PEFT: PEFT as its users run it, with weights packed for oneDNN.

This separates the gain of the algorithm from that of faster matrix products. In `rag`, soft tokens follow a context of
400 tokens, and the second epoch is timed. PEFT puts them before the context, which is another function, so results are
compared with padded rows of this project instead. The floor is the time of this project's operations at the highest
rate that matrix products reach on this machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import count_flops, count_saved_bytes, measure_peak_bytes, measure_peak_rate, measure_seconds
from sides import DEVICE, SHAPES, Loader, Ours, Peft, load_batches, make_sides, random_llama
from torch import Tensor

from lightning_softprompt.backbones.kernels.prepacked_linear import is_supported
from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.types import Batch

Case = tuple[str, str, int, int]  # phase, text, batch, prompt length
QUICK: list[Case] = [
    ("train", "sst2", 16, 100), ("train", "sst2", 16, 20), ("train", "boolq", 8, 100),
    ("eval", "sst2", 16, 100), ("eval", "sst2", 16, 20), ("train", "rag", 4, 20), ("generate", "sst2", 8, 100),
]  # fmt: skip
ALL: list[Case] = [
    *QUICK, ("train", "sst2", 32, 100), ("train", "boolq", 8, 20), ("train", "pubmedqa", 8, 20),
    ("train", "random:32", 8, 20), ("train", "random:32", 8, 100), ("train", "random:128", 8, 20),
    ("train", "random:128", 8, 100), ("train", "random:32", 32, 20), ("train", "random:32", 32, 100),
    ("eval", "boolq", 8, 20), ("generate", "boolq", 8, 20),
]  # fmt: skip


@dataclass
class Record:
    """The result of one case. Seconds are medians per batch, and ratios are PEFT / this project."""

    phase: str
    prompt_length: int
    text: str
    batch: int
    precision: str
    linear_backend: str
    device: str
    threads: int
    ours_s: float
    peft_s: float
    ratio: float
    ratio_min: float
    ratio_max: float
    ratio_grouped: float | None
    ratio_head: float | None
    ratio_prepacked: float | None
    ratio_by_hand: float | None
    ours_peak_bytes: int
    peft_peak_bytes: int
    ours_saved_bytes: int | None
    peft_saved_bytes: int | None
    ours_flops: int
    peft_flops: int
    floor_s: float
    error: float
    equal: bool


class Bench:
    """Runs cases.

    Args:
        load: Loads a backbone.
        args: The arguments of the command line.
    """

    def __init__(self, load: Loader, args: argparse.Namespace) -> None:
        self.load, self.args = load, args

    def records(self, case: Case, precision: str) -> list[Record]:
        """Returns a record with PyTorch's matrix products, and on a CPU one for each supported oneDNN product."""
        phase, text, size, length = case
        on_cpu = precision == "fp32" and DEVICE.type == "cpu"
        prepacked = on_cpu and is_supported(torch.float32)
        has_variants = phase in ("train", "eval") and text != "rag"
        names = ["ours", "peft"] + ["ours_padded"] * (text == "rag") + ["peft_head"] * has_variants
        names += ["ours_prepacked"] * prepacked + ["ours_bf16"] * (on_cpu and is_supported(torch.bfloat16))
        names += ["peft_prepacked", "peft_all_prepacked"] * (prepacked and has_variants)
        kinds = {"ours": "plain", "ours_prepacked": "prepacked", "ours_bf16": "bf16"}
        sides = make_sides(self.load, length, precision, names)
        count = 1 if self.args.quick and text != "sst2" else self.args.pool
        pool = load_batches(self._backbone(sides), self.args.data, text, size, count)
        errors = {name: compare(sides, name, phase, pool[0], precision) for name in kinds if name in names}
        times = self._measure_times(sides, phase, pool)
        grouped = self._measure_grouped(sides, phase, pool) if has_variants else {}
        counts = measure_costs(sides, phase, pool)
        return [
            self._record(case, precision, kinds[name], times, name, grouped, counts, *comparison)
            for name, comparison in errors.items()
        ]

    @staticmethod
    def _backbone(sides: dict[str, Ours | Peft]) -> Any:
        return sides["ours"].backbone  # type: ignore[union-attr]

    def _measure_times(
        self, sides: dict[str, Ours | Peft], phase: str, pool: Sequence[Batch]
    ) -> dict[str, list[float]]:
        """Measures seconds per batch of each round. Sides that only explain the ratio run in the first round."""
        compared_names = ("ours", "ours_prepacked", "ours_bf16", "peft")
        timed_names = (*compared_names, "peft_head", "peft_prepacked")
        steps = {name: getattr(side, phase) for name, side in sides.items() if name in timed_names}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for name in compared_names:
            if name in steps and name != "peft":  # warm-up, and the first epoch of RAG; PEFT has already run
                for batch in pool:
                    steps[name](batch)
        for number in range(self.args.rounds):
            for name, step in steps.items():
                if number == 0 or name in compared_names:
                    times[name].append(measure_seconds(partial(run_pool, step, pool)) / len(pool))
        return times

    def _measure_grouped(self, sides: dict[str, Ours | Peft], phase: str, pool: Sequence[Batch]) -> dict[str, float]:
        regrouped = group_by_length(self._backbone(sides), pool)
        names = [name for name in sides if name in ("peft", "peft_head", "peft_all_prepacked")]
        times = {}
        for name in names:
            step = getattr(sides[name], phase)
            times[name] = measure_seconds(partial(run_pool, step, regrouped)) / len(pool)
        return times

    def _record(
        self, case: Case, precision: str, kind: str, times: dict[str, list[float]], name: str,
        grouped: dict[str, float], counts: dict[str, Any], error: float, equal: bool,
    ) -> Record:  # fmt: skip
        phase, text, size, length = case
        ratios = [peft / ours for peft, ours in zip(times["peft"], times[name], strict=True)]
        ours = median(times[name])

        def to_ours(value: float | None) -> float | None:
            return None if value is None else value / ours

        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        floor = counts["ours_flops"] / measure_peak_rate(kind, dtype, DEVICE)
        by_hand = grouped.get("peft_head" if kind == "plain" else "peft_all_prepacked")  # PEFT has no bfloat16 products
        return Record(
            phase=phase, prompt_length=length, text=text, batch=size, precision=precision, linear_backend=kind,
            device=torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
            threads=torch.get_num_threads(), ours_s=ours, peft_s=median(times["peft"]), ratio=median(ratios),
            ratio_min=min(ratios), ratio_max=max(ratios), ratio_grouped=to_ours(grouped.get("peft")),
            ratio_head=to_ours(times.get("peft_head", [None])[0]),
            ratio_prepacked=None if kind == "plain" else to_ours(times.get("peft_prepacked", [None])[0]),
            ratio_by_hand=to_ours(by_hand), floor_s=floor, error=error,
            equal=equal, **counts,
        )  # fmt: skip


def run_pool(step: Callable[[Batch], Tensor], pool: Sequence[Batch]) -> None:
    """Runs a step for each batch of the pool."""
    for batch in pool:
        step(batch)


def group_by_length(backbone: Any, pool: Sequence[Batch]) -> list[Batch]:
    """Returns the rows of the pool in batches of similar length."""
    size = len(pool[0])
    rows = sorted((row for batch in pool for row in batch.require_encoded()), key=lambda row: len(row.ids))
    device = pool[0].input_ids.device
    groups = [rows[begin : begin + size] for begin in range(0, len(rows), size)]
    return [backbone.codec.collate(group).to(device) for group in groups]


def compare(sides: dict[str, Ours | Peft], name: str, phase: str, batch: Batch, precision: str) -> tuple[float, bool]:
    """Returns the relative difference from PEFT, for RAG from padded rows, and whether it is a rounding error."""
    ours, theirs = sides[name], sides.get("ours_padded", sides["peft"])
    results = [getattr(side, phase)(batch) for side in (ours, theirs)]
    if phase == "generate":
        longest = batch.mask.sum(1) == batch.mask.sum(1).max()
        differ = (results[0] != results[1])[longest].float()
        return float(differ.mean()), not differ.any()
    if phase == "train":
        results = [gradient(side) for side in (ours, theirs)]
    error = float((results[0] - results[1]).norm() / results[1].norm())
    return error, error < (1e-3 if precision == "fp32" and name != "ours_bf16" else 0.2)


def gradient(side: Ours | Peft) -> Tensor:
    """Returns the gradient of the prompt, [P, H]."""
    tokens = side.tokens if isinstance(side, Ours) else side.weight
    assert tokens.grad is not None
    return tokens.grad.reshape(tokens.shape[-2:])


def measure_costs(sides: dict[str, Ours | Peft], phase: str, pool: Sequence[Batch]) -> dict[str, Any]:
    """Counts mean operations per batch, and memory for the first batch, with the matrix products of PyTorch."""
    counts: dict[str, Any] = {}
    for name in ("ours", "peft"):
        step = getattr(sides[name], phase)
        first = partial(step, pool[0])
        saved_bytes = count_saved_bytes(first)
        counts[f"{name}_flops"] = count_flops(partial(run_pool, step, pool)) // len(pool)
        counts[f"{name}_saved_bytes"] = saved_bytes if phase == "train" else None
        counts[f"{name}_peak_bytes"] = measure_peak_bytes(first)
    return counts


COLUMNS: dict[str, Callable[[Record], str]] = {
    "case": lambda r: case_name((r.phase, r.text, r.batch, r.prompt_length)),
    "products": lambda r: f"{r.precision} {r.linear_backend}",
    "PEFT s": lambda r: f"{r.peft_s:.3g}",
    "ours s": lambda r: f"{r.ours_s:.3g}",
    "**PEFT / ours**": lambda r: f"**{r.ratio:.2f}** ({r.ratio_min:.2f}-{r.ratio_max:.2f})",
    "grouped": lambda r: times(r.ratio_grouped),
    "target logits": lambda r: times(r.ratio_head),
    "prepacked PEFT": lambda r: times(r.ratio_prepacked),
    "manual": lambda r: times(r.ratio_by_hand),
    "FLOPs": lambda r: f"{r.peft_flops / r.ours_flops:.2f}",
    "peak MB": lambda r: megabytes(r.peft_peak_bytes, r.ours_peak_bytes),
    "saved MB": lambda r: megabytes(r.peft_saved_bytes, r.ours_saved_bytes),
    "ours / floor": lambda r: f"{r.ours_s / r.floor_s:.2f}",
    "error": lambda r: f"{r.error:.0e}" + ("" if r.equal else " NOT EQUAL"),
}


def megabytes(peft: int | None, ours: int | None) -> str:
    """Returns the memory of both sides as text; empty if it was not measured."""
    if peft is None or ours is None:
        return ""
    return f"{peft / 2**20:.0f} / {ours / 2**20:.0f}"


def times(ratio: float | None) -> str:
    """Returns a ratio as text; empty if it was not measured."""
    return "" if ratio is None else f"{ratio:.2f}"


def draw(records: Sequence[Record], path: Path) -> None:
    """Plots bars of the speedup over PEFT as it is, and over PEFT with manual optimizations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.9 + 0.55 * len(records)), layout="constrained")
    axes = figure.subplots()
    names = [f"{COLUMNS['case'](r)}\n{COLUMNS['products'](r)}" for r in records]
    groups = {
        "PEFT": ("#1f4e8c", [record.ratio for record in records]),
        "PEFT with manual optimizations": ("#8fb3d9", [record.ratio_by_hand or float("nan") for record in records]),
    }
    for shift, (label, (color, ratios)) in enumerate(groups.items()):
        positions = [number + 0.38 * shift for number in range(len(records))]
        bars = axes.barh(positions, ratios, height=0.36, color=color, label=label)
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
    axes.set_yticks([number + 0.19 for number in range(len(records))], names, fontsize=8)
    axes.axvline(1, color="#d1495b", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("time of PEFT / time of this project")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def case_name(case: Case) -> str:
    """Returns the name of a case in the table."""
    phase, text, size, length = case
    return f"{phase} {text} B={size} l={length}"


def run(args: argparse.Namespace, job: tuple[str, Case]) -> list[Record]:
    """Runs one case; called in a separate process."""
    torch.set_num_threads(args.threads)
    load = random_llama(args.random, args.tokenizer) if args.random else load_backbone
    precision, case = job
    return Bench(load, args).records(case, precision)


def main() -> None:
    """Runs the cases and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets sst2, boolq, pubmedqa_cls")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--pool", type=int, default=2, help="batches per round; with --quick, one batch of long texts")
    parser.add_argument("--quick", action="store_true", help="the first cases only, in float32")
    parser.add_argument("--precisions", nargs="+", help="fp32, bf16")
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name contains one of these")
    parser.add_argument("--random", choices=SHAPES, help="shape of random weights that replace the default backbone")
    parser.add_argument("--tokenizer", default=BackboneSpec().name, help="folder of the tokenizer for random weights")
    parser.add_argument("--json", type=Path, help="file of one record per case")
    parser.add_argument("--png", type=Path, help="file of the plot of ratios")
    args = parser.parse_args()
    precisions = args.precisions or (["fp32"] if args.quick else ["fp32", "bf16"])
    cases = [case for case in (QUICK if args.quick else ALL) if any(part in case_name(case) for part in args.only)]
    records: list[Record] = []
    for linear_backend, dtype in (("prepacked", torch.float32), ("bf16", torch.bfloat16)):
        if DEVICE.type == "cpu" and not is_supported(dtype):
            print(
                f"skipped: linear_backend={linear_backend}, because oneDNN has no {dtype} products on this CPU\n",
                flush=True,
            )
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    with get_context("spawn").Pool(
        1, maxtasksperchild=1
    ) as process:  # a new process per case, because memory and time depend on earlier cases
        for new_records in process.imap(partial(run, args), itertools.product(precisions, cases)):
            records += new_records
            for record in new_records:
                print(f"| {' | '.join(cell(record) for cell in COLUMNS.values())} |", flush=True)
            if args.json:
                args.json.write_text(json.dumps([asdict(record) for record in records], indent=1))
    if args.png:
        draw(records, args.png)


if __name__ == "__main__":
    main()
