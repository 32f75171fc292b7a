"""Writes `docs/evidence.md`, its figures and the data of `softprompt methods --advise` from `results.jsonl`.

    python benchmarks/evidence/tables.py

The page has a line for each claim of `claims.yaml`. Each block has a table of its methods with the mean over seeds, and
a table of all pairs of methods, compared over test rows and seeds with p-values adjusted for the number of pairs
(Holm).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from advice import ADVICE, write_advice
from claims import LEVEL, Finding, measure
from comparisons import Comparison, compare_rows
from figures import draw_figures
from plan import Plan
from pretraining_tables import measure_pretraining, pretraining_table

from lightning_softprompt.evaluation.metrics.intervals import student_interval
from lightning_softprompt.evaluation.metrics.paired_tests import adjust_holm
from lightning_softprompt.system.atomic_files import write_file
from lightning_softprompt.system.plain_yaml import read_yaml

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "evidence.md"
HEADER = """\
# Evidence

<!-- Written by benchmarks/evidence/tables.py; edit benchmarks/evidence/claims.yaml instead. -->

Claims of papers and textbooks about soft prompts, and what is measured here. The experiments are a queue, which runs
for hours on one thread of a CPU. It can be stopped at any time and continues where it was:

```console
python benchmarks/evidence/run_queue.py --data DATA            # runs the experiments that have no result yet
python benchmarks/evidence/run_queue.py --data DATA --blocks length    # runs one block
python benchmarks/evidence/tables.py                           # writes this page
```

`benchmarks/evidence/experiments.yaml` defines the experiments, and `benchmarks/evidence/results.jsonl` has a line for
each of the {results} runs so far, with its settings, scores of rows, code version, machine and cost. {machines}

Each method trains {steps} steps of 16 rows, unless the table of a block states otherwise. Its learning rate is the
candidate with the best validation score in runs with another seed. All methods have the same number of candidates and
of steps in these runs. The step with the best validation score is tested.

## Claims

Two tests compare the runs: one over test rows (random signs) and one over seeds (Welch). `p` is the larger of their
p-values, adjusted for the number of claims (Holm). An effect counts as a difference if `p` is below 0.05. The interval
of 95 % is a bootstrap over rows and seeds. If an effect has one value for each run and not for each row, such as
seconds, the interval is Student's t over seeds. If a claim says that a value rises or falls with the length or the
number of rows, the effect is the change of the value when the length or the number of rows doubles. Three seeds reveal
only large effects, so *no difference shown* does not mean that there is none. Disagreement with a claim is in bold.
*Earlier* results are smaller measurements in `benchmarks/LOG.md`, which has their commands.
"""
NOTE = """\
± is the half-width of the 95 % interval of the mean over seeds (Student's t). Minutes and memory are those of the
training on the machines above, which also ran other work, so minutes are upper bounds.
"""
Result = Mapping[str, Any]
Spec = Mapping[str, Any]
PRETRAINING = read_yaml(HERE / "pretraining.yaml")


@dataclass(frozen=True)
class Cell:
    """The tested runs of a method on a task and a backbone.

    Args:
        method: Name of the method.
        results: One result per seed.
    """

    method: str
    results: Sequence[Result]

    @property
    def tests(self) -> list[float]:
        """The test metric of each seed."""
        return [result["test"] for result in self.results]

    @property
    def row_scores(self) -> np.ndarray:
        """Score of each seed and test row [S, R]; without rows if the metric is not a mean over rows."""
        return np.array([result["row_scores"] for result in self.results])


def main() -> None:
    """Writes the page and its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl", metavar="JSONL")
    parser.add_argument("--experiments", type=Path, default=HERE / "experiments.yaml", metavar="YAML")
    parser.add_argument("--claims", type=Path, default=HERE / "claims.yaml", metavar="YAML")
    parser.add_argument("--pretraining", type=Path, default=HERE / "pretraining.jsonl", metavar="JSONL")
    parser.add_argument(
        "--out", type=Path, default=PAGE, metavar="MD", help="the page; figures are in a folder next to it"
    )
    parser.add_argument(
        "--advice",
        type=Path,
        metavar="JSON",
        help="data of softprompt methods --advise (default: the file of the package, if --out is the page of the docs)",
    )
    args = parser.parse_args()
    results = [json.loads(line) for line in args.results.read_text(encoding="utf-8").splitlines()]
    plan = Plan(args.experiments)
    figures = draw_figures(results, args.out.with_suffix(""))
    pretraining = [json.loads(line) for line in args.pretraining.read_text(encoding="utf-8").splitlines()]
    lines = page(results, plan, read_yaml(args.claims), figures, pretraining)
    write_file(args.out, ("\n".join(lines) + "\n").encode())
    advice = args.advice or (ADVICE if args.out == PAGE else None)
    if advice is not None:
        write_advice(results, advice)
    print(f"Wrote {args.out} and {len(figures)} figures")


def page(
    results: Sequence[Result],
    plan: Plan,
    topics: Sequence[Spec],
    figures: Mapping[str, str] | None = None,
    pretraining: Sequence[Result] = (),
) -> Iterator[str]:
    """Yields the lines of the page."""
    yield HEADER.format(results=len(results), steps=plan.steps, machines=describe_machines(results))
    yield from claim_tables(topics, plan, results, pretraining)
    yield "## Experiments\n"
    for path, caption in (figures or {}).items():
        yield f"![{caption}]({path})\n"
    groups: dict[tuple[str, str, str], dict[str, list[Result]]] = {}
    for result in results:
        if "test" in result:
            group = groups.setdefault((result["block"], result["task"], result["backbone"]), {})
            group.setdefault(result["method"], []).append(result)
    if groups:
        yield NOTE
    for (block, task, backbone), results_by_method in groups.items():
        cells = [Cell(method, members) for method, members in results_by_method.items()]
        yield f"### {block}: {task}, {backbone}\n"
        yield from methods_table(cells)
        yield from pairs_table(cells)
    yield from pretraining_table(pretraining, PRETRAINING)
    yield from open_blocks(plan, groups)


def describe_machines(results: Sequence[Result]) -> str:
    """Names the machines of the results."""
    machines = set()
    for result in results:
        cpu = f"{result['cpu']}, {result['threads']} thread(s)"
        machines.add(result.get("gpu") or cpu)
    return f"Machines: {'; '.join(sorted(machines))}." if machines else ""


def open_blocks(plan: Plan, groups: Mapping[tuple[str, str, str], Any]) -> Iterator[str]:
    """Yields a list of the blocks without a tested run."""
    measured = {block for block, _, _ in groups}
    missing = [(name, block) for name, block in plan.blocks.items() if name not in measured]
    if not missing:
        return
    yield "### Not measured yet\n"
    yield "| block | runs | methods | tasks | hours on one thread |"
    yield "|---|---|---|---|---|"
    for name, block in missing:
        runs = len(plan.cells(name))
        methods, tasks = ", ".join(block["methods"]), ", ".join(block["tasks"])
        yield f"| {name} | {runs} | {methods} | {tasks} | {block['hours']} |"


def claim_tables(
    topics: Sequence[Spec], plan: Plan, results: Sequence[Result], pretraining: Sequence[Result]
) -> Iterator[str]:
    """Yields a table for each topic, with a line for each claim."""
    claims = [claim for topic in topics for claim in topic["claims"]]
    findings = {}
    for claim in filter(is_measured_by_queue, claims):
        of_pretraining = "corpus" in claim
        findings[id(claim)] = (
            measure_pretraining(claim, pretraining, PRETRAINING) if of_pretraining else measure(claim, plan, results)
        )
    comparisons = {key: finding.comparison for key, finding in findings.items() if finding.comparison is not None}
    adjusted = dict(zip(comparisons, adjust_holm([each.p for each in comparisons.values()]), strict=True))
    for topic in topics:
        yield f"### {topic['topic']}\n"
        yield "| claim | claimed | measured | effect | p | runs | command |"
        yield "|---|---|---|---|---|---|---|"
        for claim in topic["claims"]:
            finding = findings.get(id(claim))
            columns = fixed_columns(claim) if finding is None else columns_of(claim, finding, adjusted.get(id(claim)))
            yield f"| {' | '.join([claim['claim'], *columns])} |"
        yield ""
        if "config" in topic:
            yield f"A single run: `softprompt fit --config {topic['config']}`, with the data in `--data.path`.\n"


def is_measured_by_queue(claim: Spec) -> bool:
    """Whether runs of the queue measure a claim."""
    return "one" in claim or "series" in claim


def fixed_columns(claim: Spec) -> list[str]:
    """Returns the columns of a claim that another command has measured, or that is not measured."""
    if "reason" in claim:
        return ["", "not measured here", claim["reason"], "", "", ""]
    commands = [f"`{command}`" for command in claim["command"].split("; ")]
    return [claim["claimed"], claim["result"], "", "", str(claim["runs"]), "; ".join(commands)]


def columns_of(claim: Spec, finding: Finding, p: float | None) -> list[str]:
    """Returns the columns of a claim that the queue measures."""
    sides = [claim[name] for name in ("series", "one", "other") if name in claim]
    blocks = dict.fromkeys(side["block"] for side in sides if "block" in side)
    command = f"`run_queue.py --blocks {' '.join(quote(block) for block in blocks)}`" if blocks else "`pretraining.py`"
    if finding.comparison is None or p is None:
        waiting = f"not measured yet ({finding.runs} of {finding.planned} runs)"
        earlier = f"earlier: {claim['earlier']}" if "earlier" in claim else ""
        return [claim["claimed"], waiting, earlier, "", str(finding.planned), command]
    direction = name_direction(finding.comparison, p, "series" in claim)
    agrees = direction == claim["claimed"] or (claim["claimed"], direction) == ("no difference", NOT_SHOWN)
    is_contrary = direction != NOT_SHOWN and not agrees
    shown = f"**{direction}**" if is_contrary else direction
    return [claim["claimed"], shown, describe_effect(finding), f"{p:.4f}", str(finding.runs), command]


NOT_SHOWN = "no difference shown"


def name_direction(comparison: Comparison, p: float, is_series: bool) -> str:
    """Returns the direction of an effect, if it is significant.

    >>> name_direction(Comparison(0.1, 0.05, 0.15, 0.01), 0.01, False)
    'higher'
    """
    if not p < LEVEL:
        return NOT_SHOWN
    up, down = ("rise", "fall") if is_series else ("higher", "lower")
    return up if comparison.difference > 0 else down


def describe_effect(finding: Finding) -> str:
    """Returns the effect with its interval, or the ratio."""
    comparison = finding.comparison
    assert comparison is not None
    values = (comparison.difference, comparison.low, comparison.high)
    if finding.is_ratio:
        ratio, low, high = (f"{math.exp(value):.3g}" for value in values)
        return f"x {ratio} [{low}, {high}]"
    effect, low, high = (f"{value:+.3f}" for value in values)
    return f"{effect} [{low}, {high}]"


def quote(block: str) -> str:
    """Quotes a name with spaces for the shell."""
    return f'"{block}"' if " " in block else block


def methods_table(cells: Sequence[Cell]) -> Iterator[str]:
    """Yields a line per method, the best one first."""
    first = cells[0].results[0]
    metric = first.get("test_metric") or first["metric"]
    higher_is_better = first["mode"] == "max" or bool(first.get("test_metric"))
    order = sorted(cells, key=lambda cell: float(np.mean(cell.tests)), reverse=higher_is_better)
    yield f"| method | seeds | test {metric} | learning rate | parameters | steps | minutes | peak MB |"
    yield "|---|---|---|---|---|---|---|---|"
    for cell in order:
        first = cell.results[0]
        mean, half_width = student_interval(cell.tests)
        spread = f" ± {half_width:.3f}" if len(cell.tests) > 1 else ""
        minutes = np.mean([result.get("train_seconds", 0.0) for result in cell.results]) / 60
        peak = max(result.get("train_peak_mb", result["peak_mb"]) for result in cell.results)
        steps = str(first["steps"]) if first["rate"] else "-"
        columns = [cell.method, str(len(cell.tests)), f"{mean:.3f}{spread}"]
        columns += [str(first["rate"] or "-"), f"{first.get('trainable_parameters', 0):,}"]
        columns += [steps, f"{minutes:.1f}", f"{peak:,}"]
        yield f"| {' | '.join(columns)} |"
    yield ""


def pairs_table(cells: Sequence[Cell]) -> Iterator[str]:
    """Yields a line per pair of methods that differ after the correction, and a list of the other pairs."""
    pairs = []
    for one, other in combinations(cells, 2):
        rows = {scores.shape[-1] for scores in (one.row_scores, other.row_scores)}
        if len(rows) == 1 and rows != {0}:
            pairs.append((one, other))
    if not pairs:
        return
    comparisons = [compare_rows(one.row_scores, other.row_scores) for one, other in pairs]
    adjusted = adjust_holm([comparison.p for comparison in comparisons])
    yield f"Pairs that differ over test rows and seeds (adjusted p < {LEVEL}, {len(pairs)} pairs):\n"
    yield "| pair | difference | 95 % interval | adjusted p |"
    yield "|---|---|---|---|"
    equal = []
    for (one, other), comparison, p in zip(pairs, comparisons, adjusted, strict=True):
        is_first_better = comparison.difference >= 0
        better, worse = (one, other) if is_first_better else (other, one)
        if p >= LEVEL:
            equal.append(f"{better.method} and {worse.method}")
            continue
        low, high = comparison.low, comparison.high
        bounds = (low, high) if is_first_better else (-high, -low)
        names = f"{better.method} over {worse.method}"
        interval = f"[{bounds[0]:.3f}, {bounds[1]:.3f}]"
        yield f"| {names} | {abs(comparison.difference):.3f} | {interval} | {p:.4f} |"
    if equal:
        yield f"\nNo difference is shown between {'; '.join(equal)}."
    yield ""


if __name__ == "__main__":
    main()
