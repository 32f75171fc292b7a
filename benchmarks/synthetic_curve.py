"""Places synthetic rows on the curve of N real rows, for SST-2 and TREC-6 (acceptance of synthetic data).

python benchmarks/synthetic_curve.py --data data --work runs/synthetic_curve

DATA has the folders `sst2` and `trec6`. Each training is a prompt of 20 soft tokens, with the same steps, learning rate
and batch size and without validation: no setting is selected on real rows. The training rows are N real rows (as even
over classes as possible), the rows that the bare backbone wrote (`written`), those that pass the filters (`filtered`),
filtered rows with 32 real rows in one training (`mixed`), and filtered rows, then 32 real rows with the same number of
steps again (`filtered, then 32`). All test the same rows.

A training is one line of `results.jsonl` in the folder WORK, with the correctness of each test row. Started again with
this folder, the command continues with the first training that has no result. Products are in
bfloat16, also those of the bare backbone.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from curricula import try_largest_batch
from sacrebleu import sentence_bleu

import lightning_softprompt as sp
from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.evaluation.metrics.intervals import bootstrap
from lightning_softprompt.inference.prompt import Prompt, save_prompt
from lightning_softprompt.reports.text_table import table
from lightning_softprompt.synthetic.filtering import apply_filters
from lightning_softprompt.synthetic.filters.agreement import Agreement
from lightning_softprompt.synthetic.filters.balance import Balance
from lightning_softprompt.synthetic.filters.base import Filter
from lightning_softprompt.synthetic.filters.duplicates import Duplicates
from lightning_softprompt.synthetic.filters.leaked_words import LeakedWords
from lightning_softprompt.synthetic.filters.length import Length
from lightning_softprompt.synthetic.filters.near_duplicates import NearDuplicates
from lightning_softprompt.synthetic.filters.overlap import Overlap
from lightning_softprompt.synthetic.filters.unfinished import Unfinished
from lightning_softprompt.synthetic.generator import Generator
from lightning_softprompt.synthetic.writers.label_text import LabelText
from lightning_softprompt.synthetic.writing import WritingPlan, write_rows

SPEC = sp.BackboneSpec(linear_backend="plain")
RESULTS = "results.jsonl"
FEW = 32  # real rows of the trainings that also use synthetic rows, and of the filter of TREC-6
ALL = "all"
EVAL_BATCH = 32
SIZES = (FEW, 8, 128, ALL)
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """A classification task and its writer.

    Args:
        name: Folder of the real rows.
        template: Template of a row.
        labels: Label word of each class.
        writer: Writes rows.
        count: Number of written rows.
        max_new_tokens: Maximum tokens of a written row.
        uses_real_rows: Whether `Agreement` uses a prompt that was trained on 32 real rows, not the bare backbone.
        leaked_words: Words of labels that a text must not contain.
        must_end: Whether rows that reach the limit of tokens are dropped.
    """

    name: str
    template: str
    labels: Mapping[str, str]
    writer: LabelText
    count: int
    max_new_tokens: int
    uses_real_rows: bool
    leaked_words: tuple[str, ...] = ()
    must_end: bool = True


SENTIMENTS = {"negative": "negative", "positive": "positive"}
QUESTIONS = {
    "ABBR": ("abbreviation", "what an abbreviation stands for"),
    "DESC": ("description", "the definition or reason of something"),
    "ENTY": ("thing", "the name of a thing or an animal"),
    "HUM": ("person", "the name of a person"),
    "LOC": ("place", "the name of a place"),
    "NUM": ("number", "a number or a date"),
}
TASKS = (
    Task(
        "sst2",
        template="{soft}Review: {text}\nSentiment: {target}",
        labels=SENTIMENTS,
        writer=LabelText(SENTIMENTS, "Write one sentence of a {label} movie review."),
        count=192,
        max_new_tokens=32,
        uses_real_rows=False,
        leaked_words=("negative", "positive"),
        must_end=False,  # two thirds of the sentences are longer
    ),
    Task(
        "trec6",
        template="{soft}Question: {text}\nAsks for: {target}",
        labels={name: word for name, (word, _) in QUESTIONS.items()},
        writer=LabelText(
            {name: description for name, (_, description) in QUESTIONS.items()},
            "Write one short trivia question. The answer must be {label}.",
        ),
        count=288,
        max_new_tokens=24,
        uses_real_rows=True,  # the bare backbone does not separate these classes
    ),
)


class Curve:
    """The trainings of a task.

    Args:
        task: The task.
        args: Options of the command.
        backbone: The backbone of all trainings.
    """

    def __init__(self, task: Task, args: argparse.Namespace, backbone: Backbone) -> None:
        self.task, self.args, self.backbone = task, args, backbone
        self.folder = args.data / task.name
        self.real = read_rows(self.folder / "train.jsonl")
        tests = read_rows(self.folder / "test.jsonl")
        self.tests = random.Random(0).sample(tests, args.test_rows)
        self.written = args.work / f"{task.name}.jsonl"
        self.few_prompt = args.work / f"{task.name}.safetensors"

    def data(self, rows: Sequence[Row], seed: int) -> sp.ClassificationDataModule:
        """Returns the data of a training. Fewer rows than a batch are repeated, so that all batches have one size."""
        repeats = -(-self.args.batch_size // len(rows))
        task = self.task
        return sp.ClassificationDataModule(
            template=task.template, labels=dict(task.labels), backbone=SPEC, train=[*rows] * repeats, test=self.tests,
            batch_size=self.args.batch_size, max_tokens=128, seed=seed, validation=self.tests[:2],
        )  # fmt: skip

    def train(self, rows: Sequence[Row], seed: int, module: Any = None) -> Any:
        """Trains a new prompt, or continues the training of one."""
        data = self.data(rows, seed)
        if module is None:
            module = sp.PromptTuning(data=data, length=20, lr=self.args.rate, lr_schedule="linear")
            module.attach(self.backbone, seed)
        encoded = [*data.split("train").encoded, *data.split("test").encoded]
        try_largest_batch(module, encoded, EVAL_BATCH)
        trainer = sp.Trainer(
            run=None, max_steps=self.args.steps, max_epochs=-1, limit_val_batches=0, enable_progress_bar=False,
            accelerator="cpu", precision=self.args.precision,
        )  # fmt: skip
        trainer.fit(module.train(), data)
        return module

    def is_correct(self, module: Any, rows: Sequence[Row]) -> str:
        """Returns 1 for each row whose class is predicted, and 0 for the others."""
        by_length = sorted(range(len(rows)), key=lambda number: len(rows[number]["text"]))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.args.precision == "bf16-mixed"):
            records = Prompt(module).predict([rows[number] for number in by_length], batch_size=EVAL_BATCH)
        predictions = dict(zip(by_length, (record["prediction"] for record in records), strict=True))
        return "".join(str(int(predictions[number] == row["label"])) for number, row in enumerate(rows))

    def write(self) -> list[Row]:
        """Returns the rows of the bare backbone, which are written once."""
        if not self.written.is_file():
            decoding = Decoding(do_sample=True, top_p=0.9, max_new_tokens=self.task.max_new_tokens)
            plan = WritingPlan(self.task.writer, self.task.count, batch_size=64)
            write_rows(plan, Generator(SPEC, decoding), self.written)
        return read_rows(self.written)

    def filters(self) -> list[Filter]:
        """Returns the filters of the task, in their order."""
        task = self.task
        unfinished = [Unfinished()] if task.must_end else []
        leaked = [LeakedWords(task.leaked_words)] if task.leaked_words else []
        if task.uses_real_rows:
            agreement = Agreement(prompt=str(self.few_prompt))
        else:
            agreement = Agreement(template=task.template.replace("{soft}", ""), labels=dict(task.labels))
        others = [Duplicates(), NearDuplicates(), *leaked, Overlap(str(self.folder / "test.jsonl"))]
        return [Length(low=4), *unfinished, *others, agreement, Balance()]

    def select(self, rows: Sequence[Row]) -> tuple[list[Row], list[dict[str, Any]]]:
        """Returns the rows that pass the filters, and the counts of the filters. Both are kept in a file."""
        path = self.written.with_suffix(".filtered.json")
        if not path.is_file():
            with torch.autocast("cpu", torch.bfloat16):
                result = apply_filters(rows, self.filters())
            counts = [asdict(count) for count in result.counts]
            path.write_text(json.dumps({"rows": [row["row"] for row in result.rows], "counts": counts}))
        stored = json.loads(path.read_text())
        return [rows[number] for number in stored["rows"]], stored["counts"]

    def measure(self, seed: int) -> None:
        """Runs the trainings of a seed that the results lack."""
        results = Results(self.args.work / RESULTS, self.task.name, seed)
        if seed == 0 and results.lacks("bare"):
            data = self.data(self.real[:32], seed)
            module = sp.NoPrompt(data=data)
            module.attach(self.backbone, seed)
            results.add("bare", correct=self.is_correct(module, self.tests))
        for size in SIZES:
            if results.lacks(f"real {size}"):
                rows = self.real if size == ALL else sample_evenly(self.real, int(size), seed)
                module = self.train(rows, seed)
                if seed == 0 and size == FEW:
                    save_prompt(module, self.few_prompt)
                values = {"correct": self.is_correct(module, self.tests)}
                if size == ALL:
                    values["agrees"] = self.is_correct(module, self.write())
                results.add(f"real {size}", **values)
            if size == FEW:
                self.measure_synthetic(results, seed)

    def measure_synthetic(self, results: Results, seed: int) -> None:
        """Runs the trainings on synthetic rows."""
        written = self.write()
        filtered, counts = self.select(written)
        few = sample_evenly(self.real, FEW, seed)
        if seed == 0 and results.lacks("rows"):
            numbers = [row["row"] for row in filtered]
            texts = {"written": written, "filtered": filtered, "real": random.Random(0).sample(self.real, 256)}
            bleu = {name: measure_self_bleu([row["text"] for row in rows]) for name, rows in texts.items()}
            pairs = {name: share_of_distinct_pairs([row["text"] for row in rows]) for name, rows in texts.items()}
            tokens = sum(row["num_tokens"] for row in written)
            results.add("rows", counts=counts, filtered=numbers, self_bleu=bleu, distinct_2=pairs, tokens=tokens)
        if results.lacks("filtered") or results.lacks(f"filtered, then {FEW}"):
            module = self.train(filtered, seed)
            if results.lacks("filtered"):
                results.add("filtered", correct=self.is_correct(module, self.tests))
            module = self.train(few, seed, module)
            results.add(f"filtered, then {FEW}", correct=self.is_correct(module, self.tests))
        for name, rows in (("written", written), (f"mixed with {FEW}", [*filtered, *few])):
            if results.lacks(name):
                results.add(name, correct=self.is_correct(self.train(rows, seed), self.tests))


class Results:
    """The results of a task and a seed in a file.

    Args:
        path: The file.
        task: Name of the task.
        seed: The seed.
    """

    def __init__(self, path: Path, task: str, seed: int) -> None:
        self.path, self.task, self.seed = path, task, seed
        self.known = [line for line in read_rows(path) if (line["task"], line["seed"]) == (task, seed)]
        self.start = process_time()

    def lacks(self, rows: str) -> bool:
        """Returns whether there is no result of some training rows."""
        return rows not in {line["rows"] for line in self.known}

    def add(self, rows: str, **values: Any) -> None:
        """Appends a result."""
        seconds = round(process_time() - self.start, 1)
        self.start = process_time()
        line = {"task": self.task, "rows": rows, "seed": self.seed, "cpu_seconds": seconds, **values}
        self.known.append(line)
        with self.path.open("a") as file:
            file.write(f"{json.dumps(line)}\n")
        correct = values.get("correct")
        score = "" if correct is None else f"{correct.count('1') / len(correct):.3f}"
        print(self.task, rows, self.seed, score, f"{seconds:.0f} cpu s", flush=True)


def read_rows(path: Path) -> list[Any]:
    """Returns the lines of a file of JSON lines; none if it does not exist."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def sample_evenly(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """Returns random rows of each class in turn."""
    by_class: dict[str, list[Row]] = {}
    for row in random.Random(seed).sample(rows, len(rows)):
        by_class.setdefault(row["label"], []).append(row)
    return [by_class[name][number] for number in range(count) for name in sorted(by_class)][:count]


def measure_self_bleu(texts: Sequence[str], sample: int = 64) -> float:
    """Returns the mean BLEU-4 of a sample of texts with a second sample as references; high for similar texts."""
    shuffled = random.Random(0).sample(texts, len(texts))
    references = shuffled[sample : 2 * sample]
    scores = [sentence_bleu(text, references).score for text in shuffled[:sample]]
    return round(float(np.mean(scores)), 2)


def share_of_distinct_pairs(texts: Sequence[str]) -> float:
    """Returns the distinct pairs of adjacent words, divided by all pairs."""
    words = [text.lower().split() for text in texts]
    pairs = [pair for of_text in words for pair in pairwise(of_text)]
    return round(len(set(pairs)) / len(pairs), 3)


def report(path: Path) -> str:
    """Returns the tables of the results."""
    lines = read_rows(path)
    parts = []
    for name in dict.fromkeys(line["task"] for line in lines):
        of_task = [line for line in lines if line["task"] == name]
        parts.append(f"{name}\n{accuracy_table(of_task)}\n{describe_rows(of_task)}")
    return "\n\n".join(parts)


def accuracy_table(lines: Sequence[Row]) -> str:
    """Returns the accuracies of a task, with paired differences from the bare backbone and from 32 real rows."""
    by_rows: dict[str, list[Row]] = {}
    for line in lines:
        if "correct" in line:
            by_rows.setdefault(line["rows"], []).append(line)
    means = {rows: correct_of(of_rows).mean(0) for rows, of_rows in by_rows.items()}
    cells = []
    for rows, of_rows in by_rows.items():
        by_seed = ", ".join(f"{score:.3f}" for score in correct_of(of_rows).mean(1))
        to_bare = difference(means[rows], means["bare"])
        to_few = difference(means[rows], means[f"real {FEW}"]) if f"real {FEW}" in means else "-"
        cells.append([rows, f"{means[rows].mean():.3f}", by_seed, to_bare, to_few])
    return table(cells, ["rows", "accuracy", "by seed", "minus bare", f"minus real {FEW}"])


def correct_of(lines: Sequence[Row]) -> Any:
    """Returns the correctness of test rows by training [seeds, rows]."""
    return np.array([list(map(int, line["correct"])) for line in lines])


def difference(rows: Any, others: Any) -> str:
    """Returns the paired difference of two conditions with its interval over test rows."""
    differences = rows - others
    if not differences.any():
        return "-"
    low, high = bootstrap(differences.tolist())
    return f"{differences.mean():+.3f} [{low:+.3f}, {high:+.3f}]"


def describe_rows(lines: Sequence[Row]) -> str:
    """Describes the synthetic rows: counts of filters, similarity, and label noise by prompts of all real rows."""
    rows = next((line for line in lines if line["rows"] == "rows"), None)
    if rows is None:
        return ""
    counts = ", ".join(f"{count['name']} {count['num_dropped']} of {count['num_rows']}" for count in rows["counts"])
    text = [f"dropped: {counts}; {len(rows['filtered'])} remain", f"self-BLEU-4: {rows['self_bleu']}"]
    text += [f"distinct-2: {rows['distinct_2']}", f"written tokens: {rows['tokens']}"]
    judged = [line["agrees"] for line in lines if "agrees" in line]
    if judged:
        wrong = 1 - np.array([list(map(int, agrees)) for agrees in judged]).mean(0)
        noise = f"written {wrong.mean():.3f}, filtered {wrong[rows['filtered']].mean():.3f}"
        text.append(f"label noise by prompts of all real rows: {noise}")
    return "\n".join(text)


def main() -> None:
    """Run the trainings and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with sst2 and trec6; without it, only the tables are printed")
    parser.add_argument("--work", type=Path, default=Path("runs/synthetic_curve"), help="folder of results and rows")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24, help="steps of a training")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--test_rows", type=int, default=160)
    parser.add_argument("--rate", type=float, default=0.01, help="learning rate, with linear decay")
    parser.add_argument("--precision", default="bf16-mixed", help="precision of all products (default: bf16-mixed)")
    args = parser.parse_args()
    if args.data is not None:
        args.work.mkdir(parents=True, exist_ok=True)
        backbone = load_backbone(SPEC)
        curves = [Curve(task, args, backbone) for task in TASKS]
        for seed in range(args.seeds):
            for curve in curves:
                curve.measure(seed)
    print(report(args.work / RESULTS))


if __name__ == "__main__":
    main()
