"""Reads the file that an offline W&B run writes, so that tests can check what W&B would show.

The file is 7 bytes of header, then records in LevelDB's log format (blocks of 32 KiB; a record has a checksum, a length
and a type, and continues in the next block if it does not fit), each a `wandb_internal_pb2.Record`. As of wandb 0.31.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import wandb
from wandb.proto.wandb_internal_pb2 import ArtifactRecord, MetricRecord, Record

HEADER, BLOCK = 7, 32 * 1024
FULL, LAST = 1, 4


@dataclass
class WandbFile:
    """The content of one run: its description, configuration, metrics, rows of history, last summary, artifacts,
    exit code and number of records of system metrics.
    """

    folder: Path
    id: str = ""
    name: str = ""
    project: str = ""
    group: str = ""
    job_type: str = ""
    tags: tuple[str, ...] = ()
    notes: str = ""
    commit: str = ""
    is_complete: bool = False
    exit_code: int | None = None
    num_stats: int = 0
    artifacts: list[ArtifactRecord] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, MetricRecord] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)

    def rows(self, key: str) -> list[dict[str, Any]]:
        """Return the rows of the history that have a key."""
        return [row for row in self.history if key in row]

    def tables(self, key: str) -> list[dict[str, Any]]:
        """Return the tables logged under a key, each with `columns` and `data`."""
        return [json.loads((self.folder / "files" / row[key]["path"]).read_text()) for row in self.rows(key)]


def read_run(folder: Path) -> WandbFile:
    """Read the only offline run in a folder; ends it, because `run.finish()` returns before the file is complete."""
    (run,) = read_runs(folder)
    return run


def read_runs(folder: Path) -> list[WandbFile]:
    """Read the offline runs in a folder, and parts of runs, in the order of their starts."""
    wandb.teardown()
    runs = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        run = WandbFile(path.parent)
        for data in log_records(path.read_bytes()):
            record = Record.FromString(data)
            add_record(run, record)
            run.num_stats += record.HasField("stats")
        runs.append(run)
    return runs


def log_records(content: bytes) -> Iterator[bytes]:
    """Yield the records of the log, joined over blocks."""
    assert content.startswith(b":W&B"), f"not a W&B file: it begins with {content[:7]!r}"
    position, data = HEADER, b""
    while position < len(content):
        if BLOCK - position % BLOCK < 7:  # too short for the header of a record, so padded with zeros
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        data += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (FULL, LAST):
            yield data
            data = b""


def add_record(run: WandbFile, record: Record) -> None:
    """Add the content of a record to a run."""
    if record.HasField("run"):
        run.id, run.name, run.project = record.run.run_id, record.run.display_name, record.run.project
        run.group, run.job_type, run.notes = record.run.run_group, record.run.job_type, record.run.notes
        run.tags, run.commit = tuple(record.run.tags), record.run.git.commit
        run.config |= values(record.run.config.update)
    elif record.HasField("config"):
        run.config |= values(record.config.update)
    elif record.HasField("metric"):
        run.metrics[record.metric.name or record.metric.glob_name] = record.metric
    elif record.HasField("history"):
        run.history.append(values(record.history.item))
    elif record.HasField("summary"):
        run.summary |= values(record.summary.update)
    elif record.HasField("artifact"):
        run.artifacts.append(record.artifact)
    elif record.HasField("exit"):
        run.is_complete, run.exit_code = True, record.exit.exit_code


def values(items: Any) -> dict[str, Any]:
    """Return keys and values as a mapping, which can be nested."""
    mapping: dict[str, Any] = {}
    for item in items:
        *outer, last = list(item.nested_key) or [item.key]
        inner = mapping
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = json.loads(item.value_json)
    return mapping
