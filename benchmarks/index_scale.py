"""What an index of many passages costs: seconds, memory and disk to build and to search it, by each mode of search.

    python benchmarks/index_scale.py --data PATH/TO/data --folder /tmp/scale --passages 200000 --encoded 2000

Passages are all texts of the data's JSON lines, cut, and then pairs of their halves until there are enough. The encoder
reads `--encoded` of them, which gives its rate; vectors of the others are mixtures of two of those it made, so that
everything behind the encoder runs at full size. Each step runs in a process of its own, whose peak memory is told;
what is in `--folder` already is not made again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
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
    """Stands for an encoder that would take hours: a text's vector is a mixture of two real ones, by its digest.

    Args:
        made: [m, H] real vectors.
    """

    def __init__(self, made: Floats) -> None:
        self.made = made

    def passages(self, texts: Sequence[str]) -> Floats:
        """[n, H]."""
        return np.stack([self._mixed(content_digest(text)) for text in texts])

    def questions(self, texts: Sequence[str]) -> Floats:
        """[n, H] by the encoder itself."""
        return real().questions(texts)

    def _mixed(self, digest: bytes) -> Floats:
        draw = np.random.default_rng(int.from_bytes(digest, "big"))
        one, other = self.made[draw.integers(len(self.made), size=2)]
        share = draw.uniform(0.5, 1.0)
        mixed = share * one + (1 - share) * other + NOISE * draw.standard_normal(len(one))
        return np.asarray(mixed / np.linalg.norm(mixed), np.float32)


@cache
def real() -> Encoder:
    """The packaged encoder, loaded once."""
    return SentenceEncoder(NAME)


def stand_in(folder: Path) -> None:
    """Has indexes take mixtures in the place of the encoder's vectors."""
    mixtures = Mixtures(np.load(folder / "made.npy"))
    encoder.load_encoder = lambda name: mixtures  # type: ignore[assignment]


def texts_of(data: Path) -> Iterator[str]:
    """The long texts in all JSON lines, cut."""
    cutting = Chunking(WORDS, 0)
    for path in sorted(data.rglob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            for text in json.loads(line).values():
                if isinstance(text, str) and len(text) > WORDS:
                    yield from (text[start:end].strip() for start, end in cutting.spans(text))


def gather(data: Path, folder: Path, count: int) -> Outcome:
    """Writes the passages, one a line."""
    found = list({content_digest(text): text for text in texts_of(data)}.values())
    draw = Random(SEED)
    draw.shuffle(found)
    whole, seen = list(found), set(map(content_digest, found))
    while len(found) < count:
        one, other = (draw.choice(whole).split() for _ in range(2))
        text = " ".join(one[: len(one) // 2] + other[len(other) // 2 :])
        if (digest := content_digest(text)) not in seen:
            seen.add(digest)
            found.append(text)
    with (folder / "corpus.jsonl").open("w") as file:
        file.writelines(json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(found[:count]))
    words = sum(len(text.split()) for text in found[:count]) / count
    return {"passages": count, "as they are": min(len(whole), count), "words each": round(words, 1)}


def corpus(folder: Path) -> Iterator[Document]:
    """The passages as documents."""
    with (folder / "corpus.jsonl").open() as lines:
        yield from (Document(row["id"], "", row["text"]) for row in map(json.loads, lines))


def encode(folder: Path, count: int) -> Outcome:
    """The rate of the encoder."""
    texts = [document.text for document, _ in zip(corpus(folder), range(count), strict=False)]
    encoder = real()
    encoder.passages(texts[:32])
    start = time.perf_counter()
    np.save(folder / "made.npy", encoder.passages(texts))
    return {"encoded a second": count / (time.perf_counter() - start)}


def build(folder: Path, store: str | None) -> Outcome:
    """A whole index, with the seconds of its steps."""
    seconds: dict[str, float] = {}

    def track(items: Iterable[Any], doing: str, total: int | None) -> Iterator[Any]:
        start = time.perf_counter()
        yield from items
        seconds[doing.split(" ")[0]] = time.perf_counter() - start

    stand_in(folder)
    settings = IndexSettings(**{**SETTINGS.plain(), **({"store": store} if store else {"encoder": None})})
    start = time.perf_counter()
    manifest = build_index(folder / f"index-{store}", corpus(folder), settings, track)
    whole = time.perf_counter() - start
    told = {f"s {name}": round(took, 1) for name, took in seconds.items()}
    return {"s": round(whole, 1), "passages/s": manifest.passages / whole, **told, **disk(folder / f"index-{store}")}


def graph(folder: Path, store: str) -> Outcome:
    """The vectors alone, put in order for `store`."""
    there = Index(folder / "index-flat").files / "dense"
    place = folder / f"vectors-{store}"
    place.mkdir(exist_ok=True)
    vectors = np.load(there / "vectors.npy", mmap_mode="r")
    digests = np.zeros((len(vectors), 16), np.uint8)
    start = time.perf_counter()
    FileVectors(place, store).write(digests, lambda rows: iter([(rows, vectors[rows])]), None)
    took = time.perf_counter() - start
    return {"s": round(took, 1), "passages/s": len(vectors) / took, **disk(place)}


def disk(folder: Path) -> Outcome:
    """MB on disk."""
    return {"MB disk": round(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6)}


def questions_of(data: Path) -> list[str]:
    """Real ones."""
    return [json.loads(line)["question"] for line in (data / "qa/squad_dev/test.jsonl").open()][:300]


def search(data: Path, folder: Path, mode: str) -> Outcome:
    """Questions a second, the encoder's part included; the first search, which opens the index, is apart."""
    stand_in(folder)
    retriever = Retriever(str(folder / ("index-None" if mode == "lexical" else "index-flat")), mode)  # type: ignore[arg-type]
    questions = questions_of(data)
    start = time.perf_counter()
    retriever.search(questions[:1], 10)
    opened = time.perf_counter()
    retriever.search(questions, 10)
    return {"s to open": round(opened - start, 1), "questions/s": len(questions) / (time.perf_counter() - opened)}


def nearest(data: Path, folder: Path, store: str) -> Outcome:
    """Searches of vectors a second, and how many of the true 10 nearest passages are found."""
    there = Index(folder / "index-flat").files / "dense" if store == "flat" else folder / f"vectors-{store}"
    asked = real().questions(questions_of(data))
    vectors = FileVectors(there, store)
    vectors.search(asked[:1], 10)
    start = time.perf_counter()
    found = [vectors.search(asked[n : n + 1], 10)[0].rows for n in range(len(asked))]
    took = time.perf_counter() - start
    if store == "flat":
        np.save(folder / "nearest.npy", np.stack(found))
    true = np.load(folder / "nearest.npy")
    share = np.mean([len(set(a.tolist()) & set(b.tolist())) / 10 for a, b in zip(found, true, strict=True)])
    return {"questions/s": len(asked) / took, "recall@10": round(float(share), 3)}


def measured(work: Callable[[], Outcome], send: Any) -> None:
    """Sends what a piece of work gives, and its process's peak memory, those of its children included."""
    outcome = work()
    peak = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    send.send({**outcome, "CPU s": round(time.process_time(), 1), "peak GiB": round(peak / 2**20, 2)})


def alone(work: Callable[[], Outcome]) -> Outcome:
    """Does a piece of work in a process of its own.

    Raises:
        RuntimeError: If it fails.
    """
    receive, send = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=measured, args=(work, send))
    process.start()
    send.close()
    try:
        outcome: Outcome = receive.recv()
    except EOFError:
        raise RuntimeError(f"{work} failed") from None
    process.join()
    return outcome


def main() -> None:
    """Does each step that is not done, and prints a line of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="where all is kept")
    parser.add_argument("--passages", type=int, default=200_000)
    parser.add_argument("--encoded", type=int, default=2000, help="passages that the encoder reads")
    args = parser.parse_args()
    data, folder = args.data.resolve(), args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    steps: dict[str, Callable[[], Outcome]] = {
        "passages": partial(gather, data, folder, args.passages),
        "encoder": partial(encode, folder, args.encoded),
        "build lexical": partial(build, folder, None),
        "build lexical and flat": partial(build, folder, "flat"),
        **{f"{store} of the vectors": partial(graph, folder, store) for store in ("ivf", "hnsw")},
        **{f"search {mode}": partial(search, data, folder, mode) for mode in MODES},
        **{f"search {store} by vector": partial(nearest, data, folder, store) for store in ("flat", "ivf", "hnsw")},
    }
    log = folder / "steps.jsonl"
    done = {line["step"]: line for line in map(json.loads, log.read_text().splitlines())} if log.is_file() else {}
    for name, work in steps.items():
        outcome = done.get(name) or {"step": name, **alone(work)}
        if name not in done:
            with log.open("a") as file:
                file.write(json.dumps(outcome) + "\n")
        cells = (
            f"{key} {value:,.6g}" if isinstance(value, float) else f"{key} {value}" for key, value in outcome.items()
        )
        print(" | ".join(cells).removeprefix("step "), flush=True)


if __name__ == "__main__":
    main()
