"""Generated tokens a second and memory, against HF PEFT on the same weights, rows and prompt.

    python benchmarks/generation.py --data PATH/TO/summarization/scitldr --png benchmarks/generation.png

Abstracts cut to one length, since PEFT miscounts positions where rows are padded on the left, and so that both must say
the same tokens, which is checked first. Greedy, 32 new tokens. Sides run in turn; a ratio is the median over rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import peak_bytes, seconds
from sides import DEVICE, Ours, Peft, make

from lightning_softprompt.backbones.kernels.prepacked_linear import is_supported
from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import Batch
from lightning_softprompt.data.readers.sources import read_rows

Side = Ours | Peft
SKIPPED = "-"  # a cell of what the machine cannot run
COLUMNS = ("soft tokens", "rows", "PEFT tokens/s", "ours tokens/s", "ours prepacked", "ratio", "prepacked", "peak MB")


def rows_of_one_length(codec: Codec, folder: Path, size: int, tokens: int) -> Batch:
    """Abstracts cut to so many tokens, with the soft prompt before all else, where PEFT puts it."""
    template = Template("{soft}{document}\nTL;DR: {target}", ["document"])
    long = [
        row["document"] for row in read_rows(str(folder), split="train") if len(codec.ids(row["document"])) >= tokens
    ]
    pieces = [template.pieces({"document": document}) for document in long[:size]]
    batch = codec.collate([codec.encode(row, "", max_tokens=tokens) for row in pieces])
    batch.slots = torch.zeros_like(batch.slots)
    return batch.to(DEVICE)


def measured(sides: dict[str, Side], batch: Batch, new: int, rounds: int) -> dict[str, Any]:
    """Tokens a second of each side, and the most memory of a call."""
    said = {name: side.generate(batch, new) for name, side in sides.items()}
    equal = all(torch.equal(ids, said["peft"]) for ids in said.values())
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            times[name].append(seconds(lambda side=side: side.generate(batch, new)))
    peaks = {name: peak_bytes(lambda side=side: side.generate(batch, new)) for name, side in sides.items()}
    ratios = {n: median(p / o for p, o in zip(times["peft"], t, strict=True)) for n, t in times.items()}
    rates = {name: len(batch) * new / median(t) for name, t in times.items()}
    return {"rates": rates, "ratios": ratios, "peaks": peaks, "equal": equal}


def side_names() -> list[str]:
    """The sides that this machine can run; says which it cannot."""
    if DEVICE.type != "cpu":
        reason = "weights are prepacked on a CPU alone"
    elif not is_supported(torch.float32):
        reason = "oneDNN has no torch.float32 products on this CPU"
    else:
        return ["ours", "ours_prepacked", "peft"]
    print(f"skipped: ours prepacked, since {reason}\n", flush=True)
    return ["ours", "peft"]


def line(length: int, size: int, found: dict[str, Any]) -> str:
    """A row of the table."""
    rates, ratios, peaks = found["rates"], found["ratios"], found["peaks"]
    cells = [
        str(length), str(size),
        *(f"{rates[name]:.1f}" if name in rates else SKIPPED for name in ("peft", "ours", "ours_prepacked")),
        *(f"**{ratios[name]:.2f}**" if name in ratios else SKIPPED for name in ("ours", "ours_prepacked")),
        f"{peaks['peft'] / 2**20:.0f} / {peaks['ours'] / 2**20:.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |" + ("" if found["equal"] else " TOKENS DIFFER")


def draw(results: Sequence[tuple[int, int, dict[str, Any]]], path: Path) -> None:
    """Tokens a second against the number of rows, a panel for each prompt length."""
    from matplotlib.figure import Figure

    lengths = sorted({length for length, *_ in results})
    figure = Figure(figsize=(4.5 * len(lengths), 3.6), layout="constrained")
    names = {"peft": ("PEFT", "#8fb3d9"), "ours": ("ours", "#1f4e8c"), "ours_prepacked": ("ours, prepacked", "#d1495b")}
    for axes, length in zip(figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0], lengths, strict=True):
        for name, (label, color) in names.items():
            if any(name not in found["rates"] for *_, found in results):
                continue
            points = [(size, found["rates"][name]) for at, size, found in results if at == length]
            axes.plot(*zip(*points, strict=True), marker="o", color=color, label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks([size for size, _ in points], [str(size) for size, _ in points])
        axes.set_title(f"{length} soft tokens")
        axes.set_xlabel("rows of a batch")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("tokens a second")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Prints a Markdown table and draws it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of documents")
    parser.add_argument("--tokens", type=int, default=128, help="of a row, soft ones not counted")
    parser.add_argument("--new", type=int, default=32, help="tokens generated")
    parser.add_argument("--lengths", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--png", type=Path)
    args = parser.parse_args()
    names = side_names()
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    results = []
    for length, size in product(args.lengths, args.batches):
        sides: dict[str, Side] = make(load_backbone, length, "fp32", names)
        batch = rows_of_one_length(sides["ours"].backbone.codec, args.data, size, args.tokens)  # type: ignore[union-attr]
        results.append((length, size, measured(sides, batch, args.new, args.rounds)))
        print(line(*results[-1]), flush=True)
    if args.png:
        draw(results, args.png)


if __name__ == "__main__":
    main()
