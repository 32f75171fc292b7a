"""Writes a file of synthetic rows, and continues it if it was interrupted."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, TextIO

from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.synthetic.generator import Generator, derive_seed
from lightning_softprompt.synthetic.writers.base import Generated, Request, Row, Source, Writer
from lightning_softprompt.system.partial_file import PartialFile

NUMBER = "row"  # the column of the number of a row
ORIGIN = "origin"  # the column of the origin of a row


@dataclass(frozen=True)
class WritingPlan:
    """What a file of synthetic rows contains.

    Args:
        writer: Writes the rows.
        count: Number of rows.
        seed: Seed of the choices of the writer and of sampling.
        batch_size: Rows that are generated at once. Sampled texts depend on it.
        source: Source rows.

    Raises:
        ValueError: If a number is too small, or source rows are missing or not used.
    """

    writer: Writer
    count: int
    seed: int = 0
    batch_size: int = 32
    source: Source = field(default_factory=Source)

    def __post_init__(self) -> None:
        if self.count < 1 or self.batch_size < 1:
            raise ValueError(f"count and batch_size must be at least 1, got {self.count} and {self.batch_size}")
        name = type(self.writer).__name__
        if self.writer.requires_source and not len(self.source):
            raise ValueError(f"{name} requires source rows; set --source")
        if not self.writer.requires_source and len(self.source):
            raise ValueError(f"{name} uses no source rows; omit --source")

    def identity(self, generator: Generator) -> dict[str, Any]:
        """Returns what must be equal to continue an interrupted file."""
        steps = self.writer.steps
        source_text = json.dumps([dict(row) for row in self.source.rows], default=str)
        return {
            "writer": type(self.writer).__name__,
            "arguments": asdict(self.writer),  # type: ignore[call-overload]
            "count": self.count,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "source": sha256(source_text.encode()).hexdigest()[:16],
            "backbone": generator.name,
            "prompts": {step.column: generator.describe(step) for step in steps},
            "decoding": _plain(generator.decoding),
            "max_tokens": generator.max_tokens,
        }


def write_rows(plan: WritingPlan, generator: Generator, path: Path, report: Callable[[int], None] | None = None) -> int:
    """Writes the rows of a plan to a file of JSON lines, or the remaining rows of an interrupted file.

    Rows are complete in the file as soon as their batch is generated. The seed of a batch depends on its first row, so
    that the continued file is the same as one without interruption.

    Args:
        plan: The rows.
        generator: Generates their texts.
        path: The file. While it is incomplete, its name ends with `.part`.
        report: Is called with the number of rows that are complete.

    Returns:
        The number of rows that were complete at the start.

    Raises:
        ValueError: If the writer and the generator do not match, or another process writes the file.
    """
    generator.check(plan.writer.steps)
    partial = PartialFile(path)
    file, num_complete = partial.open(plan.identity(generator))
    with file:
        lines = partial.part.read_text(encoding="utf-8").splitlines()
        earlier: list[dict[str, Any]] = [json.loads(line) for line in lines]
        if report is not None:
            report(num_complete)
        for start in range(0, plan.count, plan.batch_size):
            stop = min(start + plan.batch_size, plan.count)
            if stop <= num_complete:
                continue
            rows = _generate_rows(plan, generator, range(start, stop), earlier[:start])
            _append(file, rows[len(earlier) - start :])
            earlier = [*earlier[:start], *rows]
            if report is not None:
                report(stop)
    partial.finish()
    return num_complete


def _append(file: TextIO, rows: Sequence[Row]) -> None:
    file.write("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
    file.flush()


def _generate_rows(
    plan: WritingPlan, generator: Generator, numbers: Sequence[int], earlier: Sequence[Row]
) -> list[dict[str, Any]]:
    """Generates the rows of a batch, one step after the other."""
    writer = plan.writer
    requests = []
    for number in numbers:
        choices = random.Random(derive_seed(plan.seed, number))
        requests.append(writer.request(number, choices, plan.source, earlier))
    columns = [dict(request.columns) for request in requests]
    main: list[Generated] = []
    for step in writer.steps:
        texts = generator(step, columns, derive_seed(plan.seed, step.column, numbers[0]))
        for row_columns, text in zip(columns, texts, strict=True):
            row_columns[step.column] = text.text
        if step.column == writer.main_column:
            main = texts
    rows = []
    for number, request, row_columns, text in zip(numbers, requests, columns, main, strict=True):
        values = writer.finish(row_columns, request, earlier)
        origin = _describe_origin(plan, generator, request)
        measures = {"logprob": text.logprob, "num_tokens": text.num_tokens, "is_finished": text.is_finished}
        rows.append({NUMBER: number, **values, **measures, ORIGIN: origin})
    return rows


def _describe_origin(plan: WritingPlan, generator: Generator, request: Request) -> dict[str, Any]:
    """Returns where a row comes from."""
    steps = plan.writer.steps
    return {
        "generator": generator.name,
        "writer": type(plan.writer).__name__,
        "prompt": generator.describe(steps[0]),
        "columns": {name: value for name, value in request.columns.items() if len(value) <= 200},
        "source": request.source,
        "seed": plan.seed,
        "decoding": _plain(generator.decoding),
    }


def _plain(decoding: Decoding) -> dict[str, Any]:
    return {**decoding.options, "seed": decoding.seed}
