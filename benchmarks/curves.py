"""Speedup over HF PEFT by prompt length, batch size and text length: training steps on rows of random tokens.

    python benchmarks/curves.py --png benchmarks/curves.png --json curves.json

Like `throughput.py`, with one batch. Both sides use the matrix products of PyTorch, and operations are counted, too.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from statistics import median

import torch
from measure import count_flops, measure_seconds
from sides import load_batches, make_sides

from lightning_softprompt.backbones.loading import load_backbone

Shape = tuple[int, int, int]  # prompt length, batch, text length
SWEEPS: dict[str, tuple[int, list[Shape]]] = {  # what varies, and its index in a shape
    "prompt length": (0, [(length, 8, 32) for length in (5, 20, 50, 100, 200)]),
    "batch": (1, [(100, batch, 32) for batch in (1, 2, 4, 8, 16)]),
    "text length": (2, [(100, 8, text) for text in (16, 32, 64, 128, 256)]),
}


def ratios(shape: Shape, rounds: int) -> dict[str, float]:
    """Returns the ratios of PEFT to this project, in time and operations."""
    length, size, text = shape
    sides = make_sides(load_backbone, length, "fp32", ["ours", "peft"])
    (batch,) = load_batches(sides["ours"].backbone, Path(), f"random:{text}", size, 1)  # type: ignore[union-attr]
    steps = {name: partial(side.train, batch) for name, side in sides.items()}
    for step in steps.values():
        step()
    times = [{name: measure_seconds(step) for name, step in steps.items()} for _ in range(rounds)]
    counts = {name: count_flops(step) for name, step in steps.items()}
    time_ratio = median(time["peft"] / time["ours"] for time in times)
    return {"time": time_ratio, "FLOPs": counts["peft"] / counts["ours"]}


def draw(results: dict[str, dict[Shape, dict[str, float]]], path: Path) -> None:
    """Plots one panel per varied quantity."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True)
    for axes, (name, ratios_by_shape) in zip(panels, results.items(), strict=True):
        index, shapes = SWEEPS[name]
        values = [shape[index] for shape in shapes]
        for kind, color, style in (("time", "#1f4e8c", "o-"), ("FLOPs", "#8fb3d9", "s--")):
            axes.plot(values, [ratios_by_shape[shape][kind] for shape in shapes], style, color=color, label=kind)
        axes.set_xscale("log", base=2)
        axes.set_xticks(values, [str(value) for value in values])
        length, batch, text = shapes[0]
        sizes = [f"prompt {length}", f"batch {batch}", f"text {text}"]
        fixed = [size for i, size in enumerate(sizes) if i != index]
        axes.set_xlabel(f"{name} ({', '.join(fixed)})")
        axes.grid(color="#e3e6ea")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("PEFT / this project, per training step")
    figure.axes[0].legend(frameon=False)
    figure.axes[0].set_ylim(bottom=0)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Runs the sweeps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--png", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, dict[Shape, dict[str, float]]] = {}
    for name, (index, shapes) in SWEEPS.items():
        results[name] = {}
        for shape in shapes:
            results[name][shape] = ratios(shape, args.rounds)
            numbers = [f"{ratio:.2f}" for ratio in results[name][shape].values()]
            print(f"| {name} {shape[index]} | {' | '.join(numbers)} |")
    draw(results, args.png)
    if args.json:
        records = []
        for name, ratios_by_shape in results.items():
            records += [{"sweep": name, "shape": shape, **ratio} for shape, ratio in ratios_by_shape.items()]
        args.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
