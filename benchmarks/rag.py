"""Answers questions with passages: the effect of retrieval, soft prompts and the number of passages.

    python benchmarks/rag.py --data PATH/TO/qa --out benchmarks/rag.jsonl --png benchmarks/rag.png

Each variant is trained on the first rows of the training split, if it has trainable parameters, and tested on the first
rows of the test split, with the commands of the command line. Options that this script does not know are passed to all
commands. Variants whose trained tokens precede the passages encode all passages in each step, and train fewer steps
(`--short`). Results are appended to `--out`, and a run that is started again skips what has a result. Intervals are
bootstrap over test rows; differences from plain RAG are paired by row.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, product
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from lightning_softprompt.cli.app import main as run_command
from lightning_softprompt.evaluation.metrics.intervals import bootstrap
from lightning_softprompt.reports.prediction_file import PREDICTIONS, read_predictions
from lightning_softprompt.runs.run_spec import last_folder
from lightning_softprompt.system.atomic_files import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CONFIGS = Path(__file__).parent.parent / "configs" / "data"
SETS = {
    "squad_dev": ("squad", "f1", "exact_match", "precision", "recall"),
    "pubmedqa": ("pubmedqa", "accuracy", "macro_f1"),
}
PLAIN = "RAG, zero-shot"
START = ("--model.init=FromText", "--model.init.text=Read the passages and answer the question in a few words.")
LENGTH, SWEEP, FIRST = 50, (1, 5, 10, 20), ", first soft tokens: "


class Variant(NamedTuple):
    """A way to answer questions.

    Args:
        model: Name of the method.
        options: Options of training and tests.
        tests: Additional options of each test, by the suffix of its name.
        is_costly: Whether passages are encoded with gradients.
    """

    model: str
    options: Sequence[str] = ()
    tests: Mapping[str, Sequence[str]] = MappingProxyType({"": ()})
    is_costly: bool = False


def read_records(path: Path) -> list[dict[str, Any]]:
    """Returns the records of earlier runs."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_variants(front: str, passages: int) -> dict[str, Variant]:
    """Returns all variants by name.

    Args:
        front: Template whose soft tokens precede the passages.
        passages: Number of passages in training.
    """
    counts = {f", {count} passages": passage_options(count) for count in (1, 3, 5) if count != passages}
    firsts = {f"{FIRST}{k}": [f"--model.use={k}"] for k in SWEEP}
    gold = {", oracle": ["--data.passages.mode=gold"]}
    return {
        PLAIN: Variant("NoPrompt", tests={"": (), **gold, **counts}),
        "RAG + prompt tuning after the passages": Variant("PromptTuning", START),
        "RAG + Spring": Variant("Spring", [f"--model.length={LENGTH}", *START], {"": (), **firsts, **counts}),
        "closed book": Variant("NoPrompt", ["--data.passages.mode=closed_book"]),
        "RAG + prefix tuning": Variant("PrefixTuning", is_costly=True),
        "RAG + prompt tuning before the passages": Variant(
            "PromptTuning", [f"--data.template={front}", *START], is_costly=True
        ),
    }


def passage_options(count: int) -> list[str]:
    """Returns the options for a number of passages, and for the number of tokens that they need."""
    return [f"--data.passages.count={count}", f"--data.max_tokens={128 + 256 * count}"]


def run(command: Sequence[str]) -> Path:
    """Runs a command and returns its folder.

    Raises:
        SystemExit: If it fails.
    """
    if code := run_command(command):
        sys.exit(code)
    return last_folder()


def evaluate(variant: Variant, missing: Sequence[str], common: Sequence[str], prompt: Path) -> Iterator[dict[str, Any]]:
    """Yields the results of the missing tests of a trained variant."""
    initial_prompt = [f"--init_from={prompt}"] if variant.model != "NoPrompt" else []
    options = [f"--model={variant.model}", *common, *variant.options, *initial_prompt]
    for name in missing:
        folder = run(["test", *options, *variant.tests[name]])
        records = read_predictions(folder / PREDICTIONS)
        metrics = json.loads((folder / "metrics.json").read_text())["test"]
        yield {"test": name, "metrics": metrics, "rows": {r["row"]: score(r) for r in records}}


def train(variant: Variant, common: Sequence[str], args: argparse.Namespace, prompt: Path) -> None:
    """Trains a variant, unless it has no parameters or its prompt exists, and writes its prompt."""
    if variant.model == "NoPrompt" or prompt.is_file():
        return
    steps = args.short if variant.is_costly else args.steps
    limits = [f"--trainer.max_steps={steps}", "--trainer.max_epochs=-1", "--trainer.limit_val_batches=0"]
    schedule = ["--model.scheduler=torch.optim.lr_scheduler.LinearLR", "--model.scheduler.start_factor=1",
               "--model.scheduler.end_factor=0.1", f"--model.scheduler.total_iters={steps}"]  # fmt: skip
    folder = run(["fit", f"--model={variant.model}", *common, *variant.options, *schedule, *limits])
    write_file(prompt, (folder / "prompt.safetensors").read_bytes())


def score(record: Mapping[str, Any]) -> float:
    """Returns the F1 of a row, or for classes whether the prediction is correct."""
    return float(record["scores"].get("f1", record["prediction"] == record["target"]))


def write_first_rows(folder: Path, split: str, count: int, target: Path) -> str:
    """Writes the first rows of a split to a file and returns its path."""
    path = target / f"{folder.name}_{split}.jsonl"
    with (folder / f"{split}.jsonl").open() as rows:
        path.write_text("".join(islice(rows, count)))
    return str(path)


def data_options(name: str, args: argparse.Namespace, more_options: Sequence[str]) -> list[str]:
    """Returns the options of all runs on a data set."""
    source, folder = args.data / name, args.out.parent / f"{args.out.stem}_data"
    folder.mkdir(parents=True, exist_ok=True)
    train = write_first_rows(source, "train", args.rows, folder)
    test = write_first_rows(source, "test", args.test, folder)
    return [
        f"--data={CONFIGS / SETS[name][0]}.yaml", f"--data.corpus={source}", f"--data.retriever.index={folder / name}",
        f"--data.train={train}", f"--data.test={test}", f"--data.validation={test}",
        *passage_options(args.passages), f"--data.batch_size={args.batch}", f"--run.folder={folder / 'runs'}",
        "--trainer.accelerator=cpu", "--trainer.devices=1", "--seed_everything=1", *more_options,
    ]  # fmt: skip


def table(records: Sequence[dict[str, Any]]) -> str:
    """Returns Markdown tables of metrics with intervals, and of paired differences from plain RAG."""
    lines = []
    for name in dict.fromkeys(record["set"] for record in records):
        metrics = SETS[name][1:]
        heads = [name, *metrics, f"difference from {PLAIN}"]
        lines += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        members = [record for record in records if record["set"] == name]
        rows_by_name = {record["variant"] + record["test"]: record["rows"] for record in members}
        plain = rows_by_name.get(PLAIN, {})
        for record in members:
            cells = [record["variant"] + record["test"]]
            cells += [format_metric(record, metric) for metric in metrics]
            cells.append(format_difference(record["rows"], plain))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def format_metric(record: Mapping[str, Any], name: str) -> str:
    """Returns a metric as text, with its interval if it is a mean over rows."""
    mean, low, high = metric_interval(record, name)
    if low is None:
        return f"{mean:.3f}"
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def metric_interval(record: Mapping[str, Any], name: str) -> tuple[float, float | None, float | None]:
    """Returns a metric and its interval, which for accuracy is computed from the rows."""
    metrics = record["metrics"]
    if name == "accuracy":
        return metrics["test/accuracy"], *bootstrap(list(record["rows"].values()))
    low, high = (metrics.get(f"test/{name}_{end}") for end in ("low", "high"))
    return metrics[f"test/{name}"], low, high


def format_difference(rows: Mapping[str, float], plain: Mapping[str, float]) -> str:
    """Returns the mean paired difference and its interval as text."""
    if rows == plain or not plain:
        return ""
    differences = [rows[row] - plain[row] for row in rows]
    low, high = bootstrap(differences)
    return f"{fmean(differences):+.3f} [{low:+.3f}, {high:+.3f}]"


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Plots a metric of each variant, and by the number of soft tokens, with a panel for each data set."""
    from matplotlib.figure import Figure

    sets = list(dict.fromkeys(record["set"] for record in records))
    figure = Figure(figsize=(6 * len(sets), 7), layout="constrained")
    grid = figure.subplots(2, len(sets), squeeze=False, height_ratios=(2, 1))
    for name, (upper, lower) in zip(sets, grid.T, strict=True):
        members = [record for record in records if record["set"] == name]
        metric = SETS[name][1]
        draw_bars(upper, [record for record in members if not record["test"].startswith(FIRST)], metric)
        draw_sweep(lower, [record for record in members if record["variant"] == "RAG + Spring"], metric)
        upper.set_title(name)
    figure.savefig(path, dpi=120)


def draw_bars(axes: Axes, records: Sequence[dict[str, Any]], metric: str) -> None:
    """Plots means and intervals as bars, from top to bottom."""
    names = [record["variant"] + record["test"] for record in records]
    means, below, above = zip(*(metric_error(record, metric) for record in records), strict=True)
    axes.barh(names, means, xerr=[below, above], color="#8fb3d9", ecolor="#1f4e8c", capsize=2)
    axes.invert_yaxis()
    axes.set_xlabel(metric)


def draw_sweep(axes: Axes, records: Sequence[dict[str, Any]], metric: str) -> None:
    """Plots means and intervals by the number of soft tokens."""
    tests = {"": LENGTH, **{f"{FIRST}{k}": k for k in SWEEP}}
    members = [record for record in records if record["test"] in tests]
    points = [(tests[record["test"]], *metric_error(record, metric)) for record in members]
    if points:
        counts, means, below, above = zip(*sorted(points), strict=True)
        axes.errorbar(counts, means, yerr=[below, above], marker="o", color="#1f4e8c", capsize=2)
    axes.set_xlabel(f"number of first soft tokens used, of {LENGTH} that Spring trains")
    axes.set_ylabel(metric)


def metric_error(record: Mapping[str, Any], name: str) -> tuple[float, float, float]:
    """Returns a metric, and its distances from the lower and the upper end of its interval."""
    mean, low, high = metric_interval(record, name)
    below, above = mean - (low or 0.0), (high or 0.0) - mean
    return mean, max(0.0, below), max(0.0, above)


def main() -> None:
    """Runs what has no result yet, then prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines of results")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--variants", "--ways", nargs="+", help="names of variants to run (default: all)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--short", type=int, default=30, help="steps of variants that encode passages in each step")
    parser.add_argument("--rows", type=int, default=240, help="training rows")
    parser.add_argument("--test", type=int, default=100, help="test rows")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--passages", type=int, default=1, help="number of passages in training and most tests")
    parser.add_argument("--brief", action="store_true", help="skip tests with other numbers of passages")
    parser.add_argument("--png", type=Path)
    args, more_options = parser.parse_known_args()
    records = read_records(args.out)
    phases = (False,) if args.brief else (False, True)  # tests with other numbers of passages come last
    for is_late, name in product(phases, args.sets):
        common = data_options(name, args, more_options)
        template = yaml.safe_load((CONFIGS / f"{SETS[name][0]}.yaml").read_text())["init_args"]["template"]
        front = template.replace("{soft}", "").replace("{passages}", "{soft}{passages}")
        for title, variant in make_variants(front, args.passages).items():
            if args.variants and title not in args.variants:
                continue
            done = {r["test"] for r in records if (r["set"], r["variant"]) == (name, title)}
            tests = [test for test in variant.tests if test.endswith(" passages") == is_late]
            missing = [test for test in tests if test not in done]
            prompt = args.out.parent / f"{args.out.stem}_data" / f"{name} {title}.safetensors"
            if missing:
                train(variant, common, args, prompt)
            for result in evaluate(variant, missing, common, prompt):
                record = json.loads(json.dumps({"set": name, "variant": title, **result}))
                records.append(record)
                with args.out.open("a") as file:
                    file.write(json.dumps(record) + "\n")
    print(table(records))
    if args.png:
        draw(records, args.png)


if __name__ == "__main__":
    main()
