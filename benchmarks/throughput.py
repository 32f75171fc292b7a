"""Ours against HF PEFT, side by side in one process: training steps, evaluation, generation, and the shape of RAG.

    python benchmarks/throughput.py --data PATH/TO/classification --quick --json throughput.json --png throughput.png

The same weights, rows, precision and place of the prompt (before all else, where PEFT puts it); the prompt's gradient,
scores, or generated tokens (of the longest rows: PEFT miscounts positions where rows are padded on the left) are
compared before anything is timed. Sides run in turn, round by round, over a pool of batches; a ratio is the
median over rounds. Columns:

* PEFT: `PeftModelForCausalLM` with attention mask and labels, as its users run it;
* grouped, target logits: PEFT with batches grouped by length; with logits for target rows only;
* by hand: PEFT with both, and in rows that say prepacked with weights laid out for oneDNN too;
* prepacked PEFT: PEFT as its users run it, with weights laid out for oneDNN.

So what the algorithm wins and what a faster product wins stay apart. `rag` puts soft tokens behind a context of 400
tokens and shows a second epoch; PEFT puts them before it, which is another function: there, equality is with our own
padded rows. The floor is the time of our operations at the best rate that this machine's products reach.
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
from measure import flops, peak_bytes, rate, saved_bytes, seconds
from sides import DEVICE, SHAPES, Load, Ours, Peft, batches, make, random_llama
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
    """One case; seconds are medians of a batch, ratios those of PEFT to ours."""

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
        load: Gives a backbone.
        args: The command line's.
    """

    def __init__(self, load: Load, args: argparse.Namespace) -> None:
        self.load, self.args = load, args

    def records(self, case: Case, precision: str) -> list[Record]:
        """One record with PyTorch's own products, and on a CPU one for each kind of oneDNN product that it has."""
        phase, text, size, length = case
        on_cpu = precision == "fp32" and DEVICE.type == "cpu"
        prepacked = on_cpu and is_supported(torch.float32)
        helped = phase in ("train", "eval") and text != "rag"
        names = ["ours", "peft"] + ["ours_padded"] * (text == "rag") + ["peft_head"] * helped
        names += ["ours_prepacked"] * prepacked + ["ours_bf16"] * (on_cpu and is_supported(torch.bfloat16))
        names += ["peft_prepacked", "peft_all_prepacked"] * (prepacked and helped)
        kinds = {"ours": "plain", "ours_prepacked": "prepacked", "ours_bf16": "bf16"}
        sides = make(self.load, length, precision, names)
        count = 1 if self.args.quick and text != "sst2" else self.args.pool
        pool = batches(self._backbone(sides), self.args.data, text, size, count)
        errors = {name: compared(sides, name, phase, pool[0], precision) for name in kinds if name in names}
        times = self._timed(sides, phase, pool)
        grouped = self._grouped(sides, phase, pool) if helped else {}
        counts = counted(sides, phase, pool)
        return [
            self._record(case, precision, kinds[name], times, name, grouped, counts, *off)
            for name, off in errors.items()
        ]

    @staticmethod
    def _backbone(sides: dict[str, Ours | Peft]) -> Any:
        return sides["ours"].backbone  # type: ignore[union-attr]

    def _timed(self, sides: dict[str, Ours | Peft], phase: str, pool: Sequence[Batch]) -> dict[str, list[float]]:
        """Seconds of a batch of the pool, round by round; sides that only explain run in the first round."""
        compared = ("ours", "ours_prepacked", "ours_bf16", "peft")
        timed = {name: side for name, side in sides.items() if name in (*compared, "peft_head", "peft_prepacked")}
        times: dict[str, list[float]] = {name: [] for name in timed}
        for name in compared[
            :-1
        ]:  # what is made at first use, and the contexts of RAG's first epoch; PEFT has run once
            for batch in pool if name in timed else ():
                getattr(timed[name], phase)(batch)
        for number in range(self.args.rounds):
            for name, side in timed.items():
                if number == 0 or name in compared:
                    times[name].append(seconds(whole(getattr(side, phase), pool)) / len(pool))
        return times

    def _grouped(self, sides: dict[str, Ours | Peft], phase: str, pool: Sequence[Batch]) -> dict[str, float]:
        regrouped = by_length(self._backbone(sides), pool)
        names = [name for name in sides if name in ("peft", "peft_head", "peft_all_prepacked")]
        return {name: seconds(whole(getattr(sides[name], phase), regrouped)) / len(pool) for name in names}

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
        by_hand = grouped.get("peft_head" if kind == "plain" else "peft_all_prepacked")  # in float32 at best
        return Record(
            phase=phase, prompt_length=length, text=text, batch=size, precision=precision, linear_backend=kind,
            device=torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
            threads=torch.get_num_threads(), ours_s=ours, peft_s=median(times["peft"]), ratio=median(ratios),
            ratio_min=min(ratios), ratio_max=max(ratios), ratio_grouped=to_ours(grouped.get("peft")),
            ratio_head=to_ours(times.get("peft_head", [None])[0]),
            ratio_prepacked=None if kind == "plain" else to_ours(times.get("peft_prepacked", [None])[0]),
            ratio_by_hand=to_ours(by_hand), floor_s=counts["ours_flops"] / rate(kind, dtype, DEVICE), error=error,
            equal=equal, **counts,
        )  # fmt: skip


def whole(step: Callable[[Batch], Tensor], pool: Sequence[Batch]) -> Callable[[], None]:
    """The pool as one call."""

    def run() -> None:
        for batch in pool:
            step(batch)

    return run


def by_length(backbone: Any, pool: Sequence[Batch]) -> list[Batch]:
    """The rows of the pool in batches of like length."""
    size = len(pool[0])
    rows = sorted((row for batch in pool for row in batch.require_encoded()), key=lambda row: len(row.ids))
    cut = [rows[begin : begin + size] for begin in range(0, len(rows), size)]
    return [backbone.codec.collate(part).to(pool[0].input_ids.device) for part in cut]


def compared(sides: dict[str, Ours | Peft], name: str, phase: str, batch: Batch, precision: str) -> tuple[float, bool]:
    """How far ours is from PEFT, or from our padded rows where PEFT's function is another; whether that is rounding."""
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
    """[P, H] of the prompt."""
    grad = side.tokens.grad[0] if isinstance(side, Ours) else side.weight.grad
    assert grad is not None
    return grad


def counted(sides: dict[str, Ours | Peft], phase: str, pool: Sequence[Batch]) -> dict[str, Any]:
    """Mean operations of a batch, and memory of the first, with PyTorch's own products."""
    counts: dict[str, Any] = {}
    for name in ("ours", "peft"):
        step = getattr(sides[name], phase)
        kept: list[int] = []
        first = lambda step=step, kept=kept: kept.append(saved_bytes(lambda: step(pool[0])))  # noqa: E731
        total = flops(first) + flops(whole(step, pool[1:]))
        counts[f"{name}_flops"] = total // len(pool)
        counts[f"{name}_saved_bytes"] = kept[0] if phase == "train" else None
        counts[f"{name}_peak_bytes"] = peak_bytes(lambda step=step: step(pool[0]))
    return counts


COLUMNS = {
    "case": lambda r: named((r.phase, r.text, r.batch, r.prompt_length)),
    "products": lambda r: f"{r.precision} {r.linear_backend}",
    "PEFT s": lambda r: f"{r.peft_s:.3g}",
    "ours s": lambda r: f"{r.ours_s:.3g}",
    "**PEFT / ours**": lambda r: f"**{r.ratio:.2f}** ({r.ratio_min:.2f}-{r.ratio_max:.2f})",
    "grouped": lambda r: times(r.ratio_grouped),
    "target logits": lambda r: times(r.ratio_head),
    "prepacked PEFT": lambda r: times(r.ratio_prepacked),
    "by hand": lambda r: times(r.ratio_by_hand),
    "FLOPs": lambda r: f"{r.peft_flops / r.ours_flops:.2f}",
    "peak MB": lambda r: f"{r.peft_peak_bytes / 2**20:.0f} / {r.ours_peak_bytes / 2**20:.0f}",
    "kept MB": lambda r: (
        f"{r.peft_saved_bytes / 2**20:.0f} / {r.ours_saved_bytes / 2**20:.0f}" if r.ours_saved_bytes else ""
    ),
    "ours / floor": lambda r: f"{r.ours_s / r.floor_s:.2f}",
    "off by": lambda r: f"{r.error:.0e}" + ("" if r.equal else " NOT EQUAL"),
}


def times(ratio: float | None) -> str:
    """A ratio, or nothing."""
    return "" if ratio is None else f"{ratio:.2f}"


def draw(records: Sequence[Record], path: Path) -> None:
    """Bars: how many times faster ours is than each way to run PEFT."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.9 + 0.55 * len(records)), layout="constrained")
    axes = figure.subplots()
    names = [f"{COLUMNS['case'](r)}\n{COLUMNS['products'](r)}" for r in records]
    for shift, (label, color, value) in enumerate(
        (
            ("PEFT as it is used", "#1f4e8c", lambda r: r.ratio),
            ("PEFT helped by hand", "#8fb3d9", lambda r: r.ratio_by_hand or float("nan")),
        )
    ):
        places = [number + 0.38 * shift for number in range(len(records))]
        bars = axes.barh(places, [value(r) for r in records], height=0.36, color=color, label=label)
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
    axes.set_yticks([number + 0.19 for number in range(len(records))], names, fontsize=8)
    axes.axvline(1, color="#d1495b", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("times the time of ours")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def named(case: Case) -> str:
    """A case as the table calls it."""
    return f"{case[0]} {case[1]} B={case[2]} l={case[3]}"


def run(args: argparse.Namespace, what: tuple[str, Case]) -> list[Record]:
    """One case, in a process of its own."""
    torch.set_num_threads(args.threads)
    load = random_llama(args.random, args.tokenizer) if args.random else load_backbone
    return Bench(load, args).records(what[1], what[0])


def main() -> None:
    """Runs the cases and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets sst2, boolq, pubmedqa_cls")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--pool", type=int, default=2, help="batches timed in a row; long texts have one with --quick")
    parser.add_argument("--quick", action="store_true", help="the first cases only, in float32")
    parser.add_argument("--precisions", nargs="+", help="fp32, bf16")
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name contains one of these")
    parser.add_argument("--random", choices=SHAPES, help="random weights of this shape instead of the packaged ones")
    parser.add_argument("--tokenizer", default=BackboneSpec().name, help="folder of the tokenizer for random weights")
    parser.add_argument("--json", type=Path, help="writes one record a case")
    parser.add_argument("--png", type=Path, help="draws the ratios")
    args = parser.parse_args()
    precisions = args.precisions or (["fp32"] if args.quick else ["fp32", "bf16"])
    cases = [case for case in (QUICK if args.quick else ALL) if any(part in named(case) for part in args.only)]
    records: list[Record] = []
    for linear_backend, dtype in (("prepacked", torch.float32), ("bf16", torch.bfloat16)):
        if DEVICE.type == "cpu" and not is_supported(dtype):
            print(
                f"skipped: rows of linear_backend={linear_backend}, since oneDNN has no {dtype} products on this CPU\n",
                flush=True,
            )
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    with get_context("spawn").Pool(1, maxtasksperchild=1) as process:  # what ran before would change memory and time
        for made in process.imap(partial(run, args), itertools.product(precisions, cases)):
            records += made
            for record in made:
                print(f"| {' | '.join(cell(record) for cell in COLUMNS.values())} |", flush=True)
            if args.json:
                args.json.write_text(json.dumps([asdict(record) for record in records], indent=1))
    if args.png:
        draw(records, args.png)


if __name__ == "__main__":
    main()
