"""Runs that are killed at seeded places and given again, against the same runs left alone: what differs.

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

import matplotlib.figure  # noqa: F401 (processes that are forked have it then)
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # where the tiny backbones are

from killing import PLACES, Kill, ended, left_running, start, together
from scenarios import SCENARIOS, Scenario, write_data

from lightning_softprompt.checkpoints.prompt_file import read_prompt

CLOCKS = ("speed/", "seconds")  # what is said of time and memory
UNREAD = "/current_score"  # Lightning's: not restored, and decides nothing
AGAIN = 0.4  # share of points at which the run that goes on is killed, too


class Faults:
    """Kills runs and compares them.

    Args:
        folder: Where data and runs are.
    """

    def __init__(self, folder: Path) -> None:
        self.data, self.runs, self.told, self.cache = (folder / name for name in ("data", "runs", "told", "cache"))
        for made in (self.data, self.runs, self.told, self.cache):
            made.mkdir()
        write_data(self.data)
        self.processes: list[int] = []

    def run(self, scenario: Scenario, name: str, kill: Kill | None = None) -> list[int]:
        """Gives a command once; gives the codes of its processes."""
        argv = scenario.argv(self.data, self.runs / name, name)
        places = together() if scenario.processes > 1 else [{}]
        own = {"XDG_CACHE_HOME": str(self.cache / name)}  # tokens are cached anew, and a run is killed at that, too
        ranks = [
            start(argv, self.told / f"{name}.{rank}.txt", kill if kill and kill.rank == rank else None, place | own)
            for rank, place in enumerate(places)
        ]
        self.processes += ranks
        return ended(ranks)

    def own(self) -> list[int]:
        """The processes that were started since this was asked last."""
        processes, self.processes = self.processes, []
        return processes

    def whole(self, scenario: Scenario, name: str) -> tuple[dict[str, Any], list[Counter[str]]]:
        """What a run leaves that nothing happens to, and how often each of its processes comes to each place.

        Raises:
            RuntimeError: If it fails.
        """
        codes = self.run(scenario, name)
        if any(codes):
            raise RuntimeError(f"{name} ended with {codes}: {(self.told / f'{name}.0.txt').read_text()}")
        told = (self.told / f"{name}.{rank}.json" for rank in range(scenario.processes))
        return left(self.runs / name), [Counter(json.loads(path.read_text())) for path in told]

    def killed(self, scenario: Scenario, name: str, kills: list[Kill]) -> tuple[dict[str, Any], int]:
        """What a run leaves that is killed at each place in turn, and how often it was."""
        codes, count = [0], 0
        for kill in [*kills, None]:
            codes = self.run(scenario, name, kill)
            if not any(codes):
                break
            count += -signal.SIGKILL in codes
        told = (self.told / f"{name}.0.txt").read_text()
        return (left(self.runs / name) if not any(codes) else {"end": f"{codes}: {told[-2000:]}"}), count


def left(runs: Path) -> dict[str, Any]:
    """What the last run of an experiment leaves, but for what is said of time: values by file and name."""
    folders = [path.parent for path in runs.glob("*/*/config.yaml")]
    folder = max(folders, key=lambda path: (path / "config.yaml").stat().st_mtime_ns)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    values = {f"{file.relative_to(folder)}: {name}": value for file in files for name, value in content(file).items()}
    return {name: value for name, value in values.items() if not any(part in name for part in (*CLOCKS, UNREAD))}


def content(path: Path) -> dict[str, Any]:
    """What is in a file, by name."""
    if path.suffix == ".ckpt":
        checkpoint = torch.load(path, weights_only=True)
        return dict(flat(checkpoint, str(path.parents[1])))
    if path.suffix == ".safetensors":
        return dict(read_prompt(path).tensors)
    if path.name == "metrics.csv":
        return {"rows": table(path)}
    if path.name == "metrics.json":
        return dict(flat(json.loads(path.read_text()), ""))
    return {"bytes": path.read_bytes()} if path.suffix == ".jsonl" else {"is there": True}


def table(path: Path) -> list[dict[str, str]]:
    """Rows of a table, without columns of time, and rows that had nothing else."""
    with path.open(newline="") as file:
        rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
    return [{name: value for name, value in row.items() if not name.startswith(CLOCKS)} for row in rows]


def flat(value: Any, folder: str, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a checkpoint by their place in it; the run's folder, which is another, is left out of texts."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flat(inner, folder, f"{name}/{key}".replace(folder, ""))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from flat(inner, folder, f"{name}/{number}")
    else:
        yield name, value.replace(folder, "") if isinstance(value, str) else value


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names of the values that are not the same to the last bit, or that only one has."""
    return [name for name in sorted({*one, *other}) if not _same(one.get(name), other.get(name))]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def draw(counts: Sequence[Mapping[str, int]], points: int, seed: int) -> list[list[Kill]]:
    """Where to kill: every place that a run comes to as often as any other, process and call of it by chance.

    Args:
        counts: How often each process comes to each place.
        points: How many.
        seed: Of the chance.
    """
    chance, drawn = random.Random(seed), []
    known = [name for name in PLACES if any(own.get(name) for own in counts)]
    chance.shuffle(known)
    for number in range(points):
        then = [chance.choice(known)] if chance.random() < AGAIN else []
        kills = []
        for name in (known[number % len(known)], *then):
            rank = chance.choice([rank for rank, own in enumerate(counts) if own.get(name)])
            kills.append(Kill(name, chance.randint(1, counts[rank][name]), rank))
        drawn.append(kills)
    return drawn


def points(faults: Faults, chosen: Mapping[str, Scenario], count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Kills and goes on, and tells of each point."""
    shares = [count // len(chosen) + (number < count % len(chosen)) for number in range(len(chosen))]
    for number, ((title, scenario), share) in enumerate(zip(chosen.items(), shares, strict=True)):
        if not share:
            continue
        whole, counts = faults.whole(scenario, f"whole-{number}")
        for point, kills in enumerate(draw(counts, share, seed + number)):
            name = f"killed-{number}-{point}"
            found, killed = faults.killed(scenario, name, kills)
            told = [f"{kill.place} ({kill.number}, process {kill.rank})" for kill in kills]
            yield {
                "scenario": title, "processes": scenario.processes, "kills": told, "killed": killed,
                "compared": len(whole), "differing": differing(whole, found),
                "running": len(left_running(faults.own())),
            }  # fmt: skip


def as_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row for each command, then one for each place."""
    commands: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    places: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        commands[record["scenario"]].append(record)
        for kill in record["kills"]:
            places[kill.partition(" (")[0]].append(record)
    lines = ["| command | points | kills | values compared | differing |", "|---|---|---|---|---|"]
    for title, own in commands.items():
        cells = (len(own), *(sum(record[name] for record in own) for name in ("killed", "compared")), _differing(own))
        lines.append(f"| {title} | {' | '.join(map(str, cells))} |")
    lines += ["", "| place | points | differing |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {place} | {len(own)} | {_differing(own)} |" for place, own in places.items())])


def _differing(records: Sequence[Mapping[str, Any]]) -> int:
    return sum(len(record["differing"]) for record in records)


def main() -> None:
    """Prints what differs as it comes, then a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="regular expression of the commands to interrupt")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--keep", type=Path, help="folder in which the runs stay")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = args.keep or Path(tempfile.mkdtemp(prefix="faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    chosen = {title: scenario for title, scenario in SCENARIOS.items() if re.search(args.only, title)}
    records = []
    for record in points(Faults(folder), chosen, args.points, args.seed):
        records.append(record)
        print(json.dumps(record), flush=True)
    if args.out:
        args.out.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    print(as_table(records))
    if args.keep is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
