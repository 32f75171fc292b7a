"""Runs the experiments of `experiments.yaml` one by one in the background, and appends each result to `results.jsonl`.

    python benchmarks/evidence/run_queue.py --data PATH/TO/data

The queue runs at the lowest priority on one thread. It may be stopped or killed at any moment: started again, it skips
what has a result and resumes the interrupted training from its last checkpoint. A job that fails is reported and
skipped until the queue is started again. `tables.py` draws tables and figures.

On a machine with a GPU the same queue runs with `--device cuda`; `pack.py` writes a file with what that machine needs.
Results of another machine are added to those of this one:

    python benchmarks/evidence/run_queue.py --merge OTHER/results.jsonl
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import IO, Any

from plan import Job, Plan

from lightning_softprompt.system.file_locks import lock_file
from lightning_softprompt.system.processor import cpu_name

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
CODE = ("lightning_softprompt", "benchmarks/evidence/*.py")  # changes of these files count as changes of the code
SET_PARENT_DEATH_SIGNAL = 1  # of Linux' prctl
LOWEST_PRIORITY = 19
MODELS = "{models}"  # in options: the folder of models
Result = dict[str, Any]


def main() -> None:
    """Runs the queue until it is empty or its time is over.

    Raises:
        SystemExit: If jobs have failed, naming them.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of all data sets (default: data)")
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of models that are not packages")
    parser.add_argument("--experiments", type=Path, default=HERE / "experiments.yaml", metavar="YAML")
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl", metavar="JSONL")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/evidence"), help="folder of the runs, which are removed"
    )
    parser.add_argument("--blocks", nargs="+", default=[], metavar="NAME", help="run these blocks only (default: all)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no job after this time")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda trains in bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="print the open jobs and exit")
    parser.add_argument("--merge", type=Path, metavar="JSONL", help="add the results of another machine and exit")
    args = parser.parse_args()
    if args.list:
        for job in open_jobs(args.experiments, args.results, args.blocks):
            print(job.key)
        return
    with lock(args.results, patience=10) as lock_descriptor:  # a job of a queue that was killed ends within seconds
        repair(args.results)
        if args.merge:
            print(f"{merge(args.results, args.merge)} results added")
            return
        failed = run_jobs(args, lock_descriptor)
    if failed:
        sys.exit(f"{len(failed)} jobs failed: {', '.join(failed)}; see their log.txt below {args.work}")


def run_jobs(args: argparse.Namespace, lock_descriptor: int) -> list[str]:
    """Runs all open jobs, and returns the keys of those that fail.

    Args:
        args: The options of the queue.
        lock_descriptor: The lock file, which jobs inherit: a job that survives the queue keeps the lock.
    """
    failed: list[str] = []
    missing: list[str] = []  # models of skipped jobs
    skipped: set[str] = set()
    end = time.monotonic() + 60 * args.minutes
    while jobs := [job for job in open_jobs(args.experiments, args.results, args.blocks) if job.key not in skipped]:
        job = jobs[0]
        if (model := missing_model(job, args.models)) is not None:
            if model not in missing:
                print(f"skipped: there is no {model}; see benchmarks/README.md", flush=True)
                missing.append(model)
            skipped.add(job.key)
            continue
        if time.monotonic() > end:
            print("the time is over; start the queue again to continue")
            return failed
        remove_finished(args.results, args.work)
        print(f"{datetime.now():%F %T} {job.key}", flush=True)
        result = run_job(job, args, lock_descriptor)
        if result is None:
            print(f"failed; see {args.work / job.key / 'log.txt'}", flush=True)
            failed.append(job.key)
            skipped.add(job.key)
        else:
            append(args.results, result)
    remove_finished(args.results, args.work)
    if not skipped:
        print("all experiments have results")
    return failed


@contextmanager
def lock(results: Path, patience: float = 0.0) -> Iterator[int]:
    """Refuses a second queue with the same results after `patience` seconds, and provides the lock's descriptor."""
    results.parent.mkdir(parents=True, exist_ok=True)
    path = results.with_suffix(".lock")
    with path.open("w") as file:
        refuse_locked(file, path, results, patience)
        yield file.fileno()


def refuse_locked(file: IO[Any], path: Path, results: Path, patience: float) -> None:
    """Locks a file.

    Raises:
        SystemExit: If another queue, or one of its jobs, has locked it.
    """
    try:
        lock_file(file, path, patience)
    except BlockingIOError:
        sys.exit(f"another queue writes {results}; wait, or stop it")


def merge(results: Path, other: Path) -> int:
    """Adds the results of another file that are not in the first one, and returns their number."""
    known = {result["key"] for result in read_results(results)}
    added = 0
    for result in read_results(other):
        if result["key"] not in known:
            known.add(result["key"])
            append(results, result)
            added += 1
    return added


def remove_finished(results: Path, work: Path) -> None:
    """Removes the folders of jobs that have a result."""
    for result in read_results(results):
        shutil.rmtree(work / result["key"], ignore_errors=True)


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


def open_jobs(experiments: Path, results: Path, blocks: Sequence[str] = ()) -> list[Job]:
    """Returns the jobs without a result whose settings are known, of all blocks or of some."""
    known = read_results(results)
    done = {result["key"] for result in known}
    jobs = {job.key: job for job in Plan(experiments).jobs(known, blocks)}
    return [job for key, job in jobs.items() if key not in done]


def run_job(job: Job, args: argparse.Namespace, lock_descriptor: int) -> Result | None:
    """Runs a job in a separate process and returns its result; None if it fails.

    The result of a job that was complete when the queue was killed is in its folder, and is not measured again.
    """
    folder = args.work / job.key
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / "result.json"
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads)}
    environment |= {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    places = [str(path.resolve()) for path in (folder, args.data, args.models)]
    words = [*places, args.device, json.dumps(asdict(job)), json.dumps(describe_machine(args))]
    if not report.is_file():
        with (folder / "log.txt").open("a") as output:
            code = subprocess.run(
                [sys.executable, str(HERE / "run_job.py"), *words],
                cwd=REPOSITORY,
                env=environment,
                stdout=output,
                stderr=output,
                pass_fds=[lock_descriptor],
                preexec_fn=partial(prepare_process, os.getpid()),
                check=False,
            ).returncode
        if code:
            return None
    return {"key": job.key, **asdict(job), **json.loads(report.read_text())}


def missing_model(job: Job, models: Path) -> str | None:
    """Returns the folder of the job's backbone if it is below the folder of models, but does not exist."""
    name = str(job.options["backbone.name"])
    folder = Path(name.replace(MODELS, str(models)))
    return str(folder) if MODELS in name and not folder.is_dir() else None


def prepare_process(parent: int) -> None:
    """Lowers the priority of a job, and lets it end with the queue, even if the queue is killed (on Linux)."""
    os.nice(LOWEST_PRIORITY)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:  # the queue was killed in between
            os.kill(os.getpid(), signal.SIGKILL)


def describe_machine(args: argparse.Namespace) -> Result:
    """Describes the machine and the code of a job that starts now."""
    return {
        "cpu": cpu_name(),
        "gpu": read_gpu_name() if args.device == "cuda" else None,
        "threads": args.threads,
        "device": args.device,
        "commit": read_commit(),
    }


def read_gpu_name() -> str:
    """Returns the name of the first GPU."""
    import torch

    return str(torch.cuda.get_device_name(0))


def read_commit() -> str:
    """Returns the commit of the code, with the suffix `-dirty` if files of the code differ; empty without git."""
    git = ["git", "-C", str(REPOSITORY)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    status = [*git, "status", "--porcelain", "--", *CODE]
    changed = subprocess.run(status, capture_output=True, text=True, check=False).stdout
    return commit.stdout.strip() + ("-dirty" if changed else "")


if __name__ == "__main__":
    main()
