"""Generated tokens per second and memory, compared with HF PEFT on the same weights, rows and prompt.

    python benchmarks/generation.py --data PATH/TO/summarization/scitldr --png benchmarks/generation.png

Abstracts are truncated to one length, because PEFT computes wrong positions for rows that are padded on the left.
Both sides must generate the same tokens, which is checked first. Decoding is greedy, with 32 new tokens. The sides
alternate; a ratio is the median over rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import measure_peak_bytes, measure_seconds
from sides import DEVICE, Ours, Peft, make_sides

from lightning_softprompt.backbones.kernels.prepacked_linear import is_supported
from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import Batch
from lightning_softprompt.data.readers.sources import read_rows

Side = Ours | Peft
SKIPPED = "-"  # cell of a side that the machine cannot run
COLUMNS = ("soft tokens", "rows", "PEFT tokens/s", "ours tokens/s", "ours prepacked", "ratio", "prepacked", "peak MB")


def collate_equal_lengths(codec: Codec, folder: Path, size: int, tokens: int) -> Batch:
    """Returns a batch of abstracts of `tokens` tokens. The soft prompt precedes all tokens, as in PEFT."""
    template = Template("{soft}{document}\nTL;DR: {target}", ["document"])
    documents = [row["document"] for row in read_rows(str(folder), split="train")]
    long_documents = [document for document in documents if len(codec.ids(document)) >= tokens]
    pieces = [template.pieces({"document": document}) for document in long_documents[:size]]
    batch = codec.collate([codec.encode(row, "", max_tokens=tokens) for row in pieces])
    batch.slots = torch.zeros_like(batch.slots)
    return batch.to(DEVICE)


def measure_sides(sides: dict[str, Side], batch: Batch, new: int, rounds: int) -> dict[str, Any]:
    """Returns tokens per second, ratios to PEFT and peak memory by side, and whether all sides generate the same."""
    calls = {name: partial(side.generate, batch, new) for name, side in sides.items()}
    outputs = {name: call() for name, call in calls.items()}
    equal = all(torch.equal(ids, outputs["peft"]) for ids in outputs.values())
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(measure_seconds(call))
    peaks = {name: measure_peak_bytes(call) for name, call in calls.items()}
    rates, ratios = {}, {}
    for name, side_times in times.items():
        rates[name] = len(batch) * new / median(side_times)
        ratios[name] = median(peft / time for peft, time in zip(times["peft"], side_times, strict=True))
    return {"rates": rates, "ratios": ratios, "peaks": peaks, "equal": equal}


def select_sides() -> list[str]:
    """Returns the names of the sides that this machine can run, and prints which it cannot."""
    if DEVICE.type != "cpu":
        reason = "weights are prepacked only on a CPU"
    elif not is_supported(torch.float32):
        reason = "oneDNN has no torch.float32 products on this CPU"
    else:
        return ["ours", "ours_prepacked", "peft"]
    print(f"skipped: ours prepacked, because {reason}\n", flush=True)
    return ["ours", "peft"]


def format_row(length: int, size: int, result: dict[str, Any]) -> str:
    """Returns a row of the table."""
    rates, ratios, peaks = result["rates"], result["ratios"], result["peaks"]
    peft_mb, ours_mb = peaks["peft"] / 2**20, peaks["ours"] / 2**20
    cells = [
        str(length), str(size),
        *(f"{rates[name]:.1f}" if name in rates else SKIPPED for name in ("peft", "ours", "ours_prepacked")),
        *(f"**{ratios[name]:.2f}**" if name in ratios else SKIPPED for name in ("ours", "ours_prepacked")),
        f"{peft_mb:.0f} / {ours_mb:.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |" + ("" if result["equal"] else " TOKENS DIFFER")


def draw(results: Sequence[tuple[int, int, dict[str, Any]]], path: Path) -> None:
    """Plots tokens per second against the number of rows, with a panel for each prompt length."""
    from matplotlib.figure import Figure

    lengths = sorted({length for length, *_ in results})
    figure = Figure(figsize=(4.5 * len(lengths), 3.6), layout="constrained")
    names = {"peft": ("PEFT", "#8fb3d9"), "ours": ("ours", "#1f4e8c"), "ours_prepacked": ("ours, prepacked", "#d1495b")}
    for axes, length in zip(figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0], lengths, strict=True):
        for name, (label, color) in names.items():
            if any(name not in result["rates"] for *_, result in results):
                continue
            points = [
                (size, result["rates"][name]) for prompt_length, size, result in results if prompt_length == length
            ]
            axes.plot(*zip(*points, strict=True), marker="o", color=color, label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks([size for size, _ in points], [str(size) for size, _ in points])
        axes.set_title(f"{length} soft tokens")
        axes.set_xlabel("rows per batch")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("tokens per second")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Prints a Markdown table and plots it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of documents")
    parser.add_argument("--tokens", type=int, default=128, help="tokens per row, without soft tokens")
    parser.add_argument("--new", type=int, default=32, help="generated tokens per row")
    parser.add_argument("--lengths", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--png", type=Path)
    args = parser.parse_args()
    names = select_sides()
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    results = []
    for length, size in product(args.lengths, args.batches):
        sides: dict[str, Side] = make_sides(load_backbone, length, "fp32", names)
        batch = collate_equal_lengths(sides["ours"].backbone.codec, args.data, size, args.tokens)  # type: ignore[union-attr]
        results.append((length, size, measure_sides(sides, batch, args.new, args.rounds)))
        print(format_row(*results[-1]), flush=True)
    if args.png:
        draw(results, args.png)


if __name__ == "__main__":
    main()
