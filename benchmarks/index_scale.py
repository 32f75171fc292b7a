"""Measures time, memory and disk use of building and searching an index of many passages, for each search mode.

    python benchmarks/index_scale.py --data PATH/TO/data --folder /tmp/scale --passages 200000 --encoded 2000

The passages are all texts of the data's JSON lines, split into chunks, and then pairs of their halves until there are
enough. The encoder encodes `--encoded` of them, which measures its rate. The other vectors are mixtures of two of
these, so that all steps after the encoder run at full size. Each step runs in a separate process, whose peak memory is
reported. Steps whose results are in `--folder` are skipped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any, final

import numpy as np

from lightning_softprompt.retrieval.index import Index
from lightning_softprompt.retrieval.index_builder import build_index
from lightning_softprompt.retrieval.passages.chunking import Chunking
from lightning_softprompt.retrieval.passages.documents import Document, content_digest
from lightning_softprompt.retrieval.retriever import MODES, Retriever
from lightning_softprompt.retrieval.search import encoder
from lightning_softprompt.retrieval.search.encoder import Encoder, SentenceEncoder
from lightning_softprompt.retrieval.search.fusion import Floats
from lightning_softprompt.retrieval.search.settings import IndexSettings
from lightning_softprompt.retrieval.search.vectors import FileVectors

SEED, WORDS, NOISE = 13, 100, 0.02
NAME = "all-minilm-l6-v2"
SETTINGS = IndexSettings(size=2 * WORDS, overlap=0)
Outcome = dict[str, Any]


@final
class Mixtures(Encoder):
    """Replaces an encoder that would take hours: the vector of a text is a mixture of two encoded ones.

    Args:
        vectors: [m, H] vectors of the encoder.
    """

    def __init__(self, vectors: Floats) -> None:
        self.vectors = vectors

    def passages(self, texts: Sequence[str]) -> Floats:
        """Returns mixtures [n, H]. The digest of a text selects its two vectors."""
        return np.stack([self._mix(content_digest(text)) for text in texts])

    def questions(self, texts: Sequence[str]) -> Floats:
        """Returns the vectors [n, H] of the encoder."""
        return load_encoder_once().questions(texts)

    def _mix(self, digest: bytes) -> Floats:
        generator = np.random.default_rng(int.from_bytes(digest, "big"))
        one, other = self.vectors[generator.integers(len(self.vectors), size=2)]
        share = generator.uniform(0.5, 1.0)
        noise = NOISE * generator.standard_normal(len(one))
        mixed = share * one + (1 - share) * other + noise
        return np.asarray(mixed / np.linalg.norm(mixed), np.float32)


@cache
def load_encoder_once() -> Encoder:
    """Returns the default encoder, which is loaded once."""
    return SentenceEncoder(NAME)


def replace_encoder(folder: Path) -> None:
    """Makes indexes store mixtures instead of vectors of the encoder."""
    mixtures = Mixtures(np.load(folder / "encoded.npy"))
    encoder.load_encoder = lambda name: mixtures  # type: ignore[assignment]


def read_texts(data: Path) -> Iterator[str]:
    """Yields chunks of the long texts in all JSON lines."""
    chunking = Chunking(WORDS, 0)
    for path in sorted(data.rglob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            for text in json.loads(line).values():
                if isinstance(text, str) and len(text) > WORDS:
                    for start, end in chunking.spans(text):
                        yield text[start:end].strip()


def write_passages(data: Path, folder: Path, count: int) -> Outcome:
    """Writes one passage per line: the texts of the data, then halves of two texts until there are enough."""
    texts = list({content_digest(text): text for text in read_texts(data)}.values())
    generator = Random(SEED)
    generator.shuffle(texts)
    originals, digests = list(texts), set(map(content_digest, texts))
    while len(texts) < count:
        one, other = (generator.choice(originals).split() for _ in range(2))
        first_half, second_half = one[: len(one) // 2], other[len(other) // 2 :]
        text = " ".join(first_half + second_half)
        digest = content_digest(text)
        if digest not in digests:
            digests.add(digest)
            texts.append(text)
    del texts[count:]
    with (folder / "corpus.jsonl").open("w") as file:
        for number, text in enumerate(texts):
            file.write(json.dumps({"id": str(number), "text": text}) + "\n")
    words = sum(len(text.split()) for text in texts) / count
    return {"passages": count, "originals": min(len(originals), count), "words per passage": round(words, 1)}


def read_passages(folder: Path) -> Iterator[Document]:
    """Yields the passages as documents."""
    with (folder / "corpus.jsonl").open() as lines:
        for line in lines:
            row = json.loads(line)
            yield Document(row["id"], "", row["text"])


def measure_encoder(folder: Path, count: int) -> Outcome:
    """Measures the rate of the encoder, and saves its vectors."""
    texts = [document.text for document in islice(read_passages(folder), count)]
    encoder = load_encoder_once()
    encoder.passages(texts[:32])
    start = time.perf_counter()
    np.save(folder / "encoded.npy", encoder.passages(texts))
    return {"encoded per second": count / (time.perf_counter() - start)}


def measure_build(folder: Path, store: str | None) -> Outcome:
    """Builds an index, and measures the seconds of its steps."""
    step_seconds: dict[str, float] = {}

    def track(items: Iterable[Any], step: str, total: int | None) -> Iterator[Any]:
        start = time.perf_counter()
        yield from items
        name = step.split(" ")[0]
        step_seconds[f"s {name}"] = round(time.perf_counter() - start, 1)

    replace_encoder(folder)
    changes: dict[str, Any] = {"store": store} if store else {"encoder": None}
    settings = IndexSettings(**{**SETTINGS.plain(), **changes})
    target = folder / f"index-{store}"
    start = time.perf_counter()
    manifest = build_index(target, read_passages(folder), settings, track)
    seconds = time.perf_counter() - start
    rate = manifest.passages / seconds
    return {"s": round(seconds, 1), "passages/s": rate, **step_seconds, **measure_disk(target)}


def measure_vector_index(folder: Path, store: str) -> Outcome:
    """Builds the index of vectors alone."""
    files = Index(folder / "index-flat").files / "dense"
    target = folder / f"vectors-{store}"
    target.mkdir(exist_ok=True)
    vectors = np.load(files / "vectors.npy", mmap_mode="r")
    digests = np.zeros((len(vectors), 16), np.uint8)
    start = time.perf_counter()
    FileVectors(target, store).write(digests, lambda rows: iter([(rows, vectors[rows])]), None)
    seconds = time.perf_counter() - start
    return {"s": round(seconds, 1), "passages/s": len(vectors) / seconds, **measure_disk(target)}


def measure_disk(folder: Path) -> Outcome:
    """Measures the disk use of a folder."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return {"MB disk": round(sum(sizes) / 1e6)}


def read_questions(data: Path) -> list[str]:
    """Returns the first 300 questions of a data set."""
    with (data / "qa/squad_dev/test.jsonl").open() as lines:
        return [json.loads(line)["question"] for line in islice(lines, 300)]


def measure_search(data: Path, folder: Path, mode: str) -> Outcome:
    """Measures the first search, which opens the index, and questions per second, including the encoder."""
    replace_encoder(folder)
    name = "index-None" if mode == "lexical" else "index-flat"
    retriever = Retriever(str(folder / name), mode)  # type: ignore[arg-type]
    questions = read_questions(data)
    start = time.perf_counter()
    retriever.search(questions[:1], 10)
    opened = time.perf_counter()
    retriever.search(questions, 10)
    return {"s to open": round(opened - start, 1), "questions/s": len(questions) / (time.perf_counter() - opened)}


def measure_vector_search(data: Path, folder: Path, store: str) -> Outcome:
    """Measures searches of vectors per second, and the fraction of the true 10 nearest passages in the results."""
    files = Index(folder / "index-flat").files / "dense" if store == "flat" else folder / f"vectors-{store}"
    questions = load_encoder_once().questions(read_questions(data))
    vectors = FileVectors(files, store)
    vectors.search(questions[:1], 10)
    start = time.perf_counter()
    results = [vectors.search(question[None], 10)[0].rows for question in questions]
    seconds = time.perf_counter() - start
    if store == "flat":
        np.save(folder / "nearest.npy", np.stack(results))
    recalls = []
    for rows, nearest in zip(results, np.load(folder / "nearest.npy"), strict=True):
        recalls.append(len(set(rows.tolist()) & set(nearest.tolist())) / 10)
    return {"questions/s": len(questions) / seconds, "recall@10": round(float(np.mean(recalls)), 3)}


def run_and_send(step: Callable[[], Outcome], connection: Connection) -> None:
    """Runs a step, and sends its outcome with the CPU time and peak memory of this process and its children."""
    outcome = step()
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu_seconds, peak_gib = time.process_time(), sum(peaks) / 2**20
    connection.send({**outcome, "CPU s": round(cpu_seconds, 1), "peak GiB": round(peak_gib, 2)})


def run_in_process(step: Callable[[], Outcome]) -> Outcome:
    """Runs a step in a separate process.

    Raises:
        RuntimeError: If it fails.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run_and_send, args=(step, sender))
    process.start()
    sender.close()
    try:
        outcome: Outcome = receiver.recv()
    except EOFError:
        raise RuntimeError(f"{step} failed") from None
    process.join()
    return outcome


def main() -> None:
    """Runs each step without a result, and prints a line for each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="folder of passages, indexes and results")
    parser.add_argument("--passages", type=int, default=200_000)
    parser.add_argument("--encoded", type=int, default=2000, help="number of passages to encode")
    args = parser.parse_args()
    data, folder = args.data.resolve(), args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    steps: dict[str, Callable[[], Outcome]] = {
        "passages": partial(write_passages, data, folder, args.passages),
        "encoder": partial(measure_encoder, folder, args.encoded),
        "build lexical": partial(measure_build, folder, None),
        "build lexical and flat": partial(measure_build, folder, "flat"),
    }
    for store in ("ivf", "hnsw"):
        steps[f"{store} of the vectors"] = partial(measure_vector_index, folder, store)
    for mode in MODES:
        steps[f"search {mode}"] = partial(measure_search, data, folder, mode)
    for store in ("flat", "ivf", "hnsw"):
        steps[f"search {store} by vector"] = partial(measure_vector_search, data, folder, store)
    log = folder / "steps.jsonl"
    outcomes = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    done = {outcome["step"]: outcome for outcome in outcomes}
    for name, step in steps.items():
        outcome = done.get(name) or {"step": name, **run_in_process(step)}
        if name not in done:
            with log.open("a") as file:
                file.write(json.dumps(outcome) + "\n")
        print(format_outcome(outcome), flush=True)


def format_outcome(outcome: Outcome) -> str:
    """Returns a line of names and values."""
    cells = []
    for name, value in outcome.items():
        number = f"{value:,.6g}" if isinstance(value, float) else value
        cells.append(f"{name} {number}")
    return " | ".join(cells).removeprefix("step ")


if __name__ == "__main__":
    main()
