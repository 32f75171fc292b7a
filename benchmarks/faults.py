"""Kills runs at seeded points, resumes them and compares their files with those of uninterrupted runs.

python benchmarks/faults.py --points 60 --seed 0 --out faults.jsonl
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
import shutil
import signal
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure  # noqa: F401 (forked processes then have it)
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the tiny backbones

from killing import PLACES, Kill, find_orphans, start, two_process_environments, wait_for_exit
from scenarios import SCENARIOS, Scenario, write_data

from lightning_softprompt.checkpoints.prompt_file import read_prompt

MEASURED = ("speed/", "seconds")  # values of time and memory
UNUSED = "/current_score"  # Lightning does not restore or use it
SECOND_KILL = 0.4  # fraction of points at which the resumed run is killed, too


class Faults:
    """Kills runs and compares them.

    Args:
        folder: Folder of data and runs.
    """

    def __init__(self, folder: Path) -> None:
        self.data, self.runs = folder / "data", folder / "runs"
        self.logs, self.cache = folder / "logs", folder / "cache"
        for subfolder in (self.data, self.runs, self.logs, self.cache):
            subfolder.mkdir()
        write_data(self.data)
        self.processes: list[int] = []

    def run(self, scenario: Scenario, name: str, kill: Kill | None = None) -> list[int]:
        """Runs a command once and returns the exit codes of its processes."""
        argv = scenario.argv(self.data, self.runs / name, name)
        environments = two_process_environments() if scenario.processes > 1 else [{}]
        # a new cache, because runs are also killed while it is written
        cache = {"XDG_CACHE_HOME": str(self.cache / name)}
        processes = []
        for rank, environment in enumerate(environments):
            kill_of_rank = kill if kill and kill.rank == rank else None
            processes.append(start(argv, self._log(name, rank), kill_of_rank, environment | cache))
        self.processes += processes
        return wait_for_exit(processes)

    def _log(self, name: str, rank: int) -> Path:
        return self.logs / f"{name}.{rank}.txt"

    def take_processes(self) -> list[int]:
        """Returns the processes that were started since the last call."""
        processes, self.processes = self.processes, []
        return processes

    def run_uninterrupted(self, scenario: Scenario, name: str) -> tuple[dict[str, Any], list[Counter[str]]]:
        """Returns the results of an uninterrupted run, and for each process the number of calls of each place.

        Raises:
            RuntimeError: If the run fails.
        """
        codes = self.run(scenario, name)
        if any(codes):
            raise RuntimeError(f"{name} ended with {codes}: {self._log(name, 0).read_text()}")
        counts = [self._log(name, rank).with_suffix(".json") for rank in range(scenario.processes)]
        return read_results(self.runs / name), [Counter(json.loads(path.read_text())) for path in counts]

    def run_with_kills(self, scenario: Scenario, name: str, kills: list[Kill]) -> tuple[dict[str, Any], int]:
        """Returns the results of a run that is killed and resumed at each point in turn, and the number of kills."""
        codes, num_killed = [0], 0
        for kill in [*kills, None]:
            codes = self.run(scenario, name, kill)
            if not any(codes):
                return read_results(self.runs / name), num_killed
            num_killed += -signal.SIGKILL in codes
        output = self._log(name, 0).read_text()
        return {"end": f"{codes}: {output[-2000:]}"}, num_killed


def read_results(runs: Path) -> dict[str, Any]:
    """Returns the values in the files of the last run of an experiment, by file and name, without measured ones."""
    folders = [path.parent for path in runs.glob("*/*/config.yaml")]
    folder = max(folders, key=lambda path: (path / "config.yaml").stat().st_mtime_ns)
    results = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            for name, value in content(file).items():
                if not any(part in name for part in (*MEASURED, UNUSED)):
                    results[f"{file.relative_to(folder)}: {name}"] = value
    return results


def content(path: Path) -> dict[str, Any]:
    """Returns the values in a file by name."""
    if path.suffix == ".ckpt":
        checkpoint = torch.load(path, weights_only=True)
        return dict(flatten(checkpoint, str(path.parents[1])))
    if path.suffix == ".safetensors":
        return dict(read_prompt(path).tensors)
    if path.name == "metrics.csv":
        return {"rows": table(path)}
    if path.name == "metrics.json":
        return dict(flatten(json.loads(path.read_text()), ""))
    return {"bytes": path.read_bytes()} if path.suffix == ".jsonl" else {"exists": True}


def table(path: Path) -> list[dict[str, str]]:
    """Returns the rows of a table without empty and measured values."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if value and not name.startswith(MEASURED)} for row in rows]


def flatten(value: Any, folder: str, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the leaves of a checkpoint by path. The folder of the run, which differs, is removed from texts."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flatten(inner, folder, f"{name}/{key}".replace(folder, ""))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from flatten(inner, folder, f"{name}/{number}")
    else:
        yield name, value.replace(folder, "") if isinstance(value, str) else value


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Returns the names of values that are not equal bit by bit, or are in only one of the results."""
    return [name for name in sorted({*one, *other}) if not _is_equal(one.get(name), other.get(name))]


def _is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def sample_kills(counts: Sequence[Mapping[str, int]], points: int, seed: int) -> list[list[Kill]]:
    """Samples points at which a run is killed. Each place that the run reaches is sampled equally often.

    Args:
        counts: Number of calls of each place, for each process.
        points: Number of points.
        seed: Seed of the order of places, the process and the call.

    Returns:
        The kills of each point: one, or a second one of the resumed run.
    """
    generator, sampled = random.Random(seed), []
    reached = [name for name in PLACES if any(process_counts.get(name) for process_counts in counts)]
    generator.shuffle(reached)
    for number in range(points):
        second = [generator.choice(reached)] if generator.random() < SECOND_KILL else []
        kills = []
        for name in (reached[number % len(reached)], *second):
            ranks = [rank for rank, process_counts in enumerate(counts) if process_counts.get(name)]
            rank = generator.choice(ranks)
            kills.append(Kill(name, generator.randint(1, counts[rank][name]), rank))
        sampled.append(kills)
    return sampled


def run_points(faults: Faults, scenarios: Mapping[str, Scenario], count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yields a record for each point at which a run was killed and resumed."""
    for number, (title, scenario) in enumerate(scenarios.items()):
        has_one_more = number < count % len(scenarios)
        num_points = count // len(scenarios) + has_one_more
        if not num_points:
            continue
        expected, counts = faults.run_uninterrupted(scenario, f"uninterrupted-{number}")
        for point, kills in enumerate(sample_kills(counts, num_points, seed + number)):
            results, num_killed = faults.run_with_kills(scenario, f"killed-{number}-{point}", kills)
            yield {
                "scenario": title,
                "processes": scenario.processes,
                "kills": [f"{kill.place} ({kill.number}, process {kill.rank})" for kill in kills],
                "killed": num_killed,
                "compared": len(expected),
                "differing": differing(expected, results),
                "running": len(find_orphans(faults.take_processes())),
            }


def as_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Returns a Markdown table with a row for each command, and one with a row for each place."""
    by_command: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    by_place: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        by_command[record["scenario"]].append(record)
        for kill in record["kills"]:
            by_place[kill.partition(" (")[0]].append(record)
    lines = ["| command | points | kills | values compared | differing |", "|---|---|---|---|---|"]
    for title, group in by_command.items():
        killed = sum(record["killed"] for record in group)
        compared = sum(record["compared"] for record in group)
        cells = [title, len(group), killed, compared, _differing(group)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "| place | points | differing |", "|---|---|---|"]
    for place, group in by_place.items():
        lines.append(f"| {place} | {len(group)} | {_differing(group)} |")
    return "\n".join(lines)


def _differing(records: Sequence[Mapping[str, Any]]) -> int:
    return sum(len(record["differing"]) for record in records)


def main() -> None:
    """Prints a record of each point, then tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="regular expression of the commands to interrupt")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--keep", type=Path, help="folder of the runs, which are then not removed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = args.keep or Path(tempfile.mkdtemp(prefix="faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    scenarios = {title: scenario for title, scenario in SCENARIOS.items() if re.search(args.only, title)}
    records = []
    for record in run_points(Faults(folder), scenarios, args.points, args.seed):
        records.append(record)
        print(json.dumps(record), flush=True)
    if args.out:
        args.out.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    print(as_table(records))
    if args.keep is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
