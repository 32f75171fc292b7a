"""Questions with passages: what retrieval, soft prompts and the number of passages each bring.

    python benchmarks/rag.py --data PATH/TO/qa --out benchmarks/rag.jsonl

Each line trains one way on the first rows of the training split, where it trains at all, and tests it on the first
rows of the test split, by the commands that a user would give. Results are added to `--out` as they come; what is there
already is not run again. Intervals are bootstrap over test rows; differences from plain RAG are paired by row.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml

from lightning_softprompt.cli import main as run_command
from lightning_softprompt.evaluation.intervals import bootstrap
from lightning_softprompt.run import last_folder

CONFIGS = Path(__file__).parent.parent / "configs" / "data"
SETS = {"squad_dev": ("squad", "exact_match", "f1"), "pubmedqa": ("pubmedqa", "accuracy", "macro_f1")}
PLAIN = "RAG, zero-shot"


class Way(NamedTuple):
    """How questions are answered.

    Args:
        model: The method.
        options: Of training and tests.
        tests: What each test of what was trained is called, behind the way's name, and its further options.
    """

    model: str
    options: Sequence[str] = ()
    tests: Mapping[str, Sequence[str]] = MappingProxyType({"": ()})


def ways(front: str) -> dict[str, Way]:
    """All of them by name; with a template that has the soft tokens in front of the passages."""
    more = {f", {count} passages": shown(count) for count in (1, 5)}
    firsts = {f", first {k} soft tokens": [f"--model.use={k}"] for k in (1, 5, 10)}
    gold = {", gold passages": ["--data.mode=gold"]}
    return {
        "closed book": Way("Bare", ["--data.mode=closed_book"]),
        PLAIN: Way("Bare", tests={"": (), **more, **gold, ", random passages": ["--data.mode=random"]}),
        "RAG + prompt tuning behind the passages": Way("PromptTuning"),
        "RAG + Spring": Way("Spring", ["--model.length=20"], {"": (), **firsts, **more, **gold}),
        "RAG + prefix tuning": Way("PrefixTuning"),
        "RAG + prompt tuning in front": Way("PromptTuning", [f"--data.template={front}"]),
    }


def shown(count: int) -> list[str]:
    """Options for so many passages, and for the tokens they take."""
    return [f"--data.passages={count}", f"--data.max_tokens={128 + 256 * count}"]


def run(command: Sequence[str]) -> Path:
    """Runs a command, or stops; gives its folder."""
    if code := run_command(command):
        sys.exit(code)
    return last_folder()


def tested(way: Way, common: Sequence[str], training: Sequence[str], there: Container[str]) -> Iterator[dict[str, Any]]:
    """Trains one way, and tests it in each of its ways that is not there."""
    missing = {name: further for name, further in way.tests.items() if name not in there}
    options, start = [*common, *way.options, f"--model={way.model}"], []
    if missing and way.model != "Bare":
        start = [f"--init_from={run(['fit', *options, *training]) / 'prompt.safetensors'}"]
    for name, further in missing.items():
        folder = run(["test", *options, *start, *further])
        records = [json.loads(line) for line in (folder / "test_predictions.jsonl").read_text().splitlines()]
        metrics = json.loads((folder / "metrics.json").read_text())["test"]
        yield {"test": name, "metrics": metrics, "rows": {r["row"]: score(r) for r in records}}


def score(record: Mapping[str, Any]) -> float:
    """A row's F1, or whether the right choice was taken."""
    return float(record["scores"].get("f1", record["prediction"] == record["target"]))


def first_rows(folder: Path, split: str, count: int, to: Path) -> str:
    """The path of a file of the first rows of a split."""
    path = to / f"{folder.name}_{split}.jsonl"
    with (folder / f"{split}.jsonl").open() as rows:
        path.write_text("".join(islice(rows, count)))
    return str(path)


def options_of(name: str, args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Options of all runs on a set, and those of training."""
    folder, made = args.data / name, args.out.parent / f"{args.out.stem}_data"
    made.mkdir(parents=True, exist_ok=True)
    files = {
        split: first_rows(folder, split, count, made) for split, count in (("train", args.rows), ("test", args.test))
    }
    common = [
        f"--data={CONFIGS / SETS[name][0]}.yaml", f"--data.corpus={folder}", f"--data.retriever.index={made / name}",
        *(f"--data.{split}={path}" for split, path in files.items()), f"--data.validation={files['test']}",
        *shown(args.passages), f"--data.batch_size={args.batch}", f"--run.folder={made / 'runs'}",
        "--trainer.accelerator=cpu", "--trainer.devices=1", "--seed_everything=1",
    ]  # fmt: skip
    training = [f"--trainer.max_steps={args.steps}", "--trainer.limit_val_batches=0"]
    return common, training


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: metrics with intervals, and the difference from plain RAG by row."""
    lines = []
    for name in dict.fromkeys(record["set"] for record in records):
        metrics = SETS[name][1:]
        lines += ["", f"| {name} | {' | '.join(metrics)} | beside {PLAIN} |", f"|---{'|---' * len(metrics)}|---|"]
        own = [record for record in records if record["set"] == name]
        plain = next((r["rows"] for r in own if (r["way"], r["test"]) == (PLAIN, "")), {})
        for record in own:
            cells = [told(record["metrics"], metric) for metric in metrics]
            lines.append(
                f"| {record['way']}{record['test']} | {' | '.join(cells)} | {difference(record['rows'], plain)} |"
            )
    return "\n".join(lines)


def told(metrics: Mapping[str, float], name: str) -> str:
    """A metric, with its interval where there is one."""
    ends = [metrics.get(f"test/{name}_{end}") for end in ("low", "high")]
    return f"{metrics[f'test/{name}']:.3f}" + ("" if None in ends else f" [{ends[0]:.3f}, {ends[1]:.3f}]")


def difference(rows: Mapping[str, float], plain: Mapping[str, float]) -> str:
    """Mean difference by row, with its interval."""
    if rows == plain or not plain:
        return ""
    differences = [rows[row] - plain[row] for row in rows]
    low, high = bootstrap(differences)
    return f"{fmean(differences):+.3f} [{low:+.3f}, {high:+.3f}]"


def main() -> None:
    """Runs what is not in the file yet, then prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=240, help="training rows")
    parser.add_argument("--test", type=int, default=100, help="test rows")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--passages", type=int, default=3)
    args = parser.parse_args()
    records = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.is_file() else []
    for name in args.sets:
        common, training = options_of(name, args)
        template = yaml.safe_load((CONFIGS / f"{SETS[name][0]}.yaml").read_text())["init_args"]["template"]
        front = template.replace("{soft}", "").replace("{passages}", "{soft}{passages}")
        for way_name, way in ways(front).items():
            there = {r["test"] for r in records if (r["set"], r["way"]) == (name, way_name)}
            for found in tested(way, common, training, there):
                record = json.loads(json.dumps({"set": name, "way": way_name, **found}))
                records.append(record)
                with args.out.open("a") as file:
                    file.write(json.dumps(record) + "\n")
    print(table(records))


if __name__ == "__main__":
    main()
