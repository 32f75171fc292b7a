"""Questions with passages: what retrieval, soft prompts and the number of passages each bring.

    python benchmarks/rag.py --data PATH/TO/qa --out benchmarks/rag.jsonl --png benchmarks/rag.png

Each line trains one way on the first rows of the training split, where it trains at all, and tests it on the first
rows of the test split, by the commands that a user would give; options that are not known here go to all of them.
Ways whose passages the backbone reads anew in each step, since what is trained comes before them, are given
`--short` steps. Results are added to `--out` as they come; what is there already is not run again. Intervals are
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


class Way(NamedTuple):
    """How questions are answered.

    Args:
        model: The method.
        options: Of training and tests.
        tests: What each test of what was trained is called, behind the way's name, and its further options.
        costly: Whether passages are read with gradients.
    """

    model: str
    options: Sequence[str] = ()
    tests: Mapping[str, Sequence[str]] = MappingProxyType({"": ()})
    costly: bool = False


def ways(front: str, passages: int) -> dict[str, Way]:
    """All of them by name; with a template that has the soft tokens in front of that many passages."""
    more = {f", {count} passages": shown(count) for count in (1, 3, 5) if count != passages}
    firsts = {f"{FIRST}{k}": [f"--model.use={k}"] for k in SWEEP}
    gold = {", oracle": ["--data.passages.mode=gold"]}
    return {
        PLAIN: Way("NoPrompt", tests={"": (), **gold, **more}),
        "RAG + prompt tuning behind the passages": Way("PromptTuning", START),
        "RAG + Spring": Way("Spring", [f"--model.length={LENGTH}", *START], {"": (), **firsts, **more}),
        "closed book": Way("NoPrompt", ["--data.passages.mode=closed_book"]),
        "RAG + prefix tuning": Way("PrefixTuning", costly=True),
        "RAG + prompt tuning in front": Way("PromptTuning", [f"--data.template={front}", *START], costly=True),
    }


def shown(count: int) -> list[str]:
    """Options for so many passages, and for the tokens they take."""
    return [f"--data.passages.count={count}", f"--data.max_tokens={128 + 256 * count}"]


def run(command: Sequence[str]) -> Path:
    """Runs a command, or stops; gives its folder."""
    if code := run_command(command):
        sys.exit(code)
    return last_folder()


def tested(way: Way, missing: Sequence[str], common: Sequence[str], prompt: Path) -> Iterator[dict[str, Any]]:
    """Tests one way, once it was trained, in some of its ways."""
    start = [f"--init_from={prompt}"] if way.model != "NoPrompt" else []
    for name in missing:
        folder = run(["test", f"--model={way.model}", *common, *way.options, *start, *way.tests[name]])
        records = read_predictions(folder / PREDICTIONS)
        metrics = json.loads((folder / "metrics.json").read_text())["test"]
        yield {"test": name, "metrics": metrics, "rows": {r["row"]: score(r) for r in records}}


def trained(way: Way, common: Sequence[str], args: argparse.Namespace, prompt: Path) -> None:
    """Trains one way, unless that is done or there is nothing to train, and keeps the prompt."""
    if way.model == "NoPrompt" or prompt.is_file():
        return
    steps = args.short if way.costly else args.steps
    limits = [f"--trainer.max_steps={steps}", "--trainer.max_epochs=-1", "--trainer.limit_val_batches=0"]
    falling = ["--model.scheduler=torch.optim.lr_scheduler.LinearLR", "--model.scheduler.start_factor=1",
               "--model.scheduler.end_factor=0.1", f"--model.scheduler.total_iters={steps}"]  # fmt: skip
    folder = run(["fit", f"--model={way.model}", *common, *way.options, *falling, *limits])
    write_file(prompt, (folder / "prompt.safetensors").read_bytes())


def score(record: Mapping[str, Any]) -> float:
    """A row's F1, or whether the right choice was taken."""
    return float(record["scores"].get("f1", record["prediction"] == record["target"]))


def first_rows(folder: Path, split: str, count: int, to: Path) -> str:
    """The path of a file of the first rows of a split."""
    path = to / f"{folder.name}_{split}.jsonl"
    with (folder / f"{split}.jsonl").open() as rows:
        path.write_text("".join(islice(rows, count)))
    return str(path)


def options_of(name: str, args: argparse.Namespace, further: Sequence[str]) -> list[str]:
    """Options of all runs on a set."""
    folder, made = args.data / name, args.out.parent / f"{args.out.stem}_data"
    made.mkdir(parents=True, exist_ok=True)
    files = {
        split: first_rows(folder, split, count, made) for split, count in (("train", args.rows), ("test", args.test))
    }
    return [
        f"--data={CONFIGS / SETS[name][0]}.yaml", f"--data.corpus={folder}", f"--data.retriever.index={made / name}",
        *(f"--data.{split}={path}" for split, path in files.items()), f"--data.validation={files['test']}",
        *shown(args.passages), f"--data.batch_size={args.batch}", f"--run.folder={made / 'runs'}",
        "--trainer.accelerator=cpu", "--trainer.devices=1", "--seed_everything=1", *further,
    ]  # fmt: skip


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: metrics with intervals, and the difference from plain RAG by row."""
    lines = []
    for name in dict.fromkeys(record["set"] for record in records):
        metrics = SETS[name][1:]
        lines += ["", f"| {name} | {' | '.join(metrics)} | beside {PLAIN} |", f"|---{'|---' * len(metrics)}|---|"]
        own = [record for record in records if record["set"] == name]
        plain = next((r["rows"] for r in own if (r["way"], r["test"]) == (PLAIN, "")), {})
        for record in own:
            cells = [told(record, metric) for metric in metrics]
            lines.append(
                f"| {record['way']}{record['test']} | {' | '.join(cells)} | {difference(record['rows'], plain)} |"
            )
    return "\n".join(lines)


def told(record: Mapping[str, Any], name: str) -> str:
    """A metric, with its interval where it is a mean over rows."""
    mean, low, high = ends(record, name)
    return f"{mean:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")


def ends(record: Mapping[str, Any], name: str) -> tuple[float, float | None, float | None]:
    """A metric and its interval: that of the test, or of its rows where they are what it is the mean of."""
    metrics = record["metrics"]
    if name == "accuracy":
        return metrics["test/accuracy"], *bootstrap(list(record["rows"].values()))
    return metrics[f"test/{name}"], metrics.get(f"test/{name}_low"), metrics.get(f"test/{name}_high")


def difference(rows: Mapping[str, float], plain: Mapping[str, float]) -> str:
    """Mean difference by row, with its interval."""
    if rows == plain or not plain:
        return ""
    differences = [rows[row] - plain[row] for row in rows]
    low, high = bootstrap(differences)
    return f"{fmean(differences):+.3f} [{low:+.3f}, {high:+.3f}]"


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    """A metric of each way with its interval, a panel for each set; and by the number of soft tokens that are used."""
    from matplotlib.figure import Figure

    sets = list(dict.fromkeys(record["set"] for record in records))
    figure = Figure(figsize=(6 * len(sets), 7), layout="constrained")
    for place, panels in enumerate(figure.subplots(2, len(sets), squeeze=False, height_ratios=(2, 1)).T):
        own, metric = [r for r in records if r["set"] == sets[place]], SETS[sets[place]][1]
        bars(panels[0], [r for r in own if not r["test"].startswith(FIRST)], metric)
        sweep(panels[1], [r for r in own if r["way"] == "RAG + Spring"], metric)
        panels[0].set_title(sets[place])
    figure.savefig(path, dpi=120)


def bars(axes: Axes, records: Sequence[dict[str, Any]], metric: str) -> None:
    """Means and intervals, the first on top."""
    names = [record["way"] + record["test"] for record in records]
    means, ends = zip(*(measured(record, metric) for record in records), strict=True)
    axes.barh(names, means, xerr=[*zip(*ends, strict=True)], color="#8fb3d9", ecolor="#1f4e8c", capsize=2)
    axes.invert_yaxis()
    axes.set_xlabel(metric)


def sweep(axes: Axes, records: Sequence[dict[str, Any]], metric: str) -> None:
    """By the number of soft tokens."""
    tests = {"": LENGTH, **{f"{FIRST}{k}": k for k in SWEEP}}
    points = sorted((tests[r["test"]], *measured(r, metric)) for r in records if r["test"] in tests)
    if points:
        counts, means, ends = zip(*points, strict=True)
        axes.errorbar(counts, means, yerr=[*zip(*ends, strict=True)], marker="o", color="#1f4e8c", capsize=2)
    axes.set_xlabel(f"first soft tokens used, of {LENGTH} that Spring trained")
    axes.set_ylabel(metric)


def measured(record: Mapping[str, Any], name: str) -> tuple[float, tuple[float, float]]:
    """A metric, and how far the ends of its interval are from it."""
    mean, low, high = ends(record, name)
    return mean, (max(0.0, mean - (low or 0.0)), max(0.0, (high or 0.0) - mean))


def main() -> None:
    """Runs what is not in the file yet, then prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--ways", nargs="+", help="only these, by name")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--short", type=int, default=30, help="steps where passages are read anew in each")
    parser.add_argument("--rows", type=int, default=240, help="training rows")
    parser.add_argument("--test", type=int, default=100, help="test rows")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--passages", type=int, default=1, help="shown in training and in most tests")
    parser.add_argument("--brief", action="store_true", help="without tests with other numbers of passages")
    parser.add_argument("--png", type=Path)
    args, further = parser.parse_known_args()
    records = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.is_file() else []
    times = (False,) if args.brief else (False, True)  # what costs most and matters least comes last
    for late, name in product(times, args.sets):
        common = options_of(name, args, further)
        template = yaml.safe_load((CONFIGS / f"{SETS[name][0]}.yaml").read_text())["init_args"]["template"]
        front = template.replace("{soft}", "").replace("{passages}", "{soft}{passages}")
        for way_name, way in ways(front, args.passages).items():
            if way_name not in (args.ways or [way_name]):
                continue
            there = {r["test"] for r in records if (r["set"], r["way"]) == (name, way_name)}
            missing = [test for test in way.tests if test not in there and test.endswith(" passages") == late]
            prompt = args.out.parent / f"{args.out.stem}_data" / f"{name} {way_name}.safetensors"
            if missing:
                trained(way, common, args, prompt)
            for found in tested(way, missing, common, prompt):
                record = json.loads(json.dumps({"set": name, "way": way_name, **found}))
                records.append(record)
                with args.out.open("a") as file:
                    file.write(json.dumps(record) + "\n")
    print(table(records))
    if args.png:
        draw(records, args.png)


if __name__ == "__main__":
    main()
