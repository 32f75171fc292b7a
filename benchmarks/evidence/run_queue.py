"""Runs the experiments of `experiments.yaml` one by one in the background, and appends each result to `results.jsonl`.

    python benchmarks/evidence/run_queue.py --data PATH/TO/data

The queue runs at the lowest priority on one thread. It may be stopped or killed at any moment: started again, it skips
what has a result and resumes the interrupted training from its last checkpoint. `tables.py` draws tables and figures.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from plan import Job, Plan

from lightning_softprompt.system.file_locks import lock_file
from lightning_softprompt.system.processor import cpu_name

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
Result = dict[str, Any]


def main() -> None:
    """Runs the queue until it is empty or its time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of all data sets")
    parser.add_argument("--experiments", type=Path, default=HERE / "experiments.yaml", metavar="YAML")
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl", metavar="JSONL")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/evidence"), help="folder of the runs, which are removed"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no job after this time")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="print the open jobs and exit")
    args = parser.parse_args()
    if args.list:
        for job in open_jobs(args.experiments, args.results):
            print(job.key)
        return
    with lock(args.results):
        repair(args.results)
        end = time.monotonic() + 60 * args.minutes
        while jobs := open_jobs(args.experiments, args.results):
            job = jobs[0]
            if time.monotonic() > end:
                print("the time is over; start the queue again to continue")
                return
            print(f"{datetime.now():%F %T} {job.key}", flush=True)
            append(args.results, run_job(job, args))
            shutil.rmtree(args.work / job.key, ignore_errors=True)
        print("all experiments have results")


@contextmanager
def lock(results: Path) -> Iterator[None]:
    """Refuses a second queue with the same results."""
    results.parent.mkdir(parents=True, exist_ok=True)
    path = results.with_suffix(".lock")
    with path.open("w") as file:
        try:
            lock_file(file, path)
        except BlockingIOError:
            sys.exit(f"another queue writes {results}; wait, or stop it")
        yield


def repair(results: Path) -> None:
    """Removes a last line that was not written completely."""
    if results.is_file():
        os.truncate(results, len(read_complete_lines(results)))


def read_complete_lines(results: Path) -> bytes:
    """Reads the results up to the last line break."""
    content = results.read_bytes()
    return content[: content.rfind(b"\n") + 1]


def read_results(path: Path) -> list[Result]:
    """Reads all results. A last line that is not yet written completely is ignored."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in read_complete_lines(path).splitlines()]


def append(path: Path, result: Result) -> None:
    """Appends a result in one write, and waits until it is on disk."""
    with path.open("ab") as file:
        file.write(f"{json.dumps(result)}\n".encode())
        file.flush()
        os.fsync(file.fileno())


def open_jobs(experiments: Path, results: Path) -> list[Job]:
    """Returns the jobs without a result whose settings are known."""
    known = read_results(results)
    done = {result["key"] for result in known}
    return [job for job in Plan(experiments).jobs(known) if job.key not in done]


def run_job(job: Job, args: argparse.Namespace) -> Result:
    """Runs a job in a separate process and returns its result.

    Raises:
        SystemExit: If a command of the job fails, naming its log.
    """
    folder = args.work / job.key
    folder.mkdir(parents=True, exist_ok=True)
    log, report = folder / "log.txt", folder / "result.json"
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads)}
    environment |= {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    words = [str(folder), str(args.data.resolve()), args.device, json.dumps(asdict(job))]
    started = time.monotonic()
    with log.open("a") as output:
        command = [sys.executable, str(HERE / "run_job.py"), *words]
        code = subprocess.run(
            command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output, preexec_fn=lambda: os.nice(19)
        ).returncode
    if code:
        sys.exit(f"{job.key} failed with code {code}; see {log}")
    return {
        "key": job.key,
        **asdict(job),
        **json.loads(report.read_text()),
        "wall_seconds": round(time.monotonic() - started, 1),
        **machine(args),
    }


def machine(args: argparse.Namespace) -> Result:
    """Describes the machine and the code that gave a result."""
    return {
        "cpu": cpu_name(),
        "threads": args.threads,
        "device": args.device,
        "commit": commit(),
        "finished": f"{datetime.now(UTC):%F %T}",
    }


def commit() -> str:
    """Returns the commit of the code; empty outside a repository."""
    command: Sequence[str] = ["git", "-C", str(REPOSITORY), "rev-parse", "--short", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip()


if __name__ == "__main__":
    main()
