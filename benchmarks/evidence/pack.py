"""Packs what another machine needs to run the queue: the code, the data sets, models, results, and packages.

    python benchmarks/evidence/pack.py --data DATA --out evidence.tar.gz --packages 3.12
    # on the other machine, which needs Python with PyTorch, and no network:
    tar xzf evidence.tar.gz && sh evidence/run.sh --device cuda
    # afterwards, on this machine:
    python benchmarks/evidence/run_queue.py --merge evidence/code/benchmarks/evidence/results.jsonl

`--packages` downloads the packages of this environment, without PyTorch and the packages of CUDA, as wheels for a
version of Python on Linux (x86-64). Without it, the other machine needs the dependencies of this project.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

from measures import GENERAL_TEXT
from plan import Plan

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
ROOT = "evidence"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
LEFT_OUT = ("torch", "nvidia", "triton", "cuda", "pip", "setuptools", "wheel", "lightning-softprompt")
RUN = """\
#!/bin/sh
# Runs the queue, or continues it. Options are those of run_queue.py, such as --device cuda --minutes 60.
set -e
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python3}
if [ -d wheels ] && [ ! -d packages ]; then
    $PYTHON -m pip install --quiet --no-index --no-deps --target packages.part wheels/*.whl
    mv packages.part packages
fi
export PYTHONPATH="$PWD/code:$PWD/packages"
exec $PYTHON code/benchmarks/evidence/run_queue.py --data data --models models --work runs "$@"
"""


def main() -> None:
    """Writes the archive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of all data sets")
    parser.add_argument("--models", type=Path, help="folder of models that are not Python packages")
    parser.add_argument("--experiments", type=Path, default=HERE / "experiments.yaml", metavar="YAML")
    parser.add_argument("--out", type=Path, default=Path("evidence.tar.gz"), metavar="FILE")
    parser.add_argument("--packages", metavar="VERSION", help="add packages for this version of Python, such as 3.12")
    args = parser.parse_args()
    with tarfile.open(args.out, "w:gz") as archive:
        add_code(archive)
        for folder in sorted({*Plan(args.experiments).data_paths, GENERAL_TEXT}):
            if (args.data / folder).is_dir():
                archive.add(args.data / folder, f"{ROOT}/data/{folder}")
            else:
                print(f"left out: no {args.data / folder}", file=sys.stderr)
        if args.models:
            archive.add(args.models, f"{ROOT}/models")
        if args.packages:
            add_packages(archive, args.packages)
        add_text(archive, f"{ROOT}/run.sh", RUN)
    size = args.out.stat().st_size / 2**20
    print(f"Wrote {args.out} ({size:.0f} MiB)")


def add_code(archive: tarfile.TarFile) -> None:
    """Adds the files of the repository that git tracks, as they are in the working tree, with the results so far."""
    listing = subprocess.run(
        ["git", "-C", str(REPOSITORY), "ls-files", "-z"], capture_output=True, text=True, check=True
    )
    for name in listing.stdout.split("\0"):
        if name and (REPOSITORY / name).is_file():
            archive.add(REPOSITORY / name, f"{ROOT}/code/{name}")


def add_packages(archive: tarfile.TarFile, version: str) -> None:
    """Downloads and adds wheels of the packages of this environment.

    Raises:
        SystemExit: If pip does not find all of them.
    """
    with tempfile.TemporaryDirectory() as folder:
        platforms = [option for platform in PLATFORMS for option in ("--platform", platform)]
        target = ["--only-binary=:all:", "--python-version", version, *platforms, "--dest", folder]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *target, *packages()]
        if subprocess.run(command, check=False).returncode:
            sys.exit("pip has not found all packages for this version of Python")
        archive.add(folder, f"{ROOT}/wheels")


def packages() -> Iterator[str]:
    """Yields the packages of this environment with their versions."""
    for distribution in distributions():
        name = distribution.metadata["Name"].lower().replace("_", "-")
        if not name.startswith(LEFT_OUT):
            yield f"{name}=={distribution.version}"


def add_text(archive: tarfile.TarFile, name: str, text: str) -> None:
    """Adds a file with a text."""
    content = text.encode()
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), 0o755
    archive.addfile(info, io.BytesIO(content))


if __name__ == "__main__":
    main()
