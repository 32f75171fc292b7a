"""Which passages a question shows, and in which order: found ones, those that hold the answer, others, or none."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, islice
from typing import Any, Literal, final

import numpy as np

from lightning_softprompt.core.types import Example
from lightning_softprompt.rag.gold import GoldPassages
from lightning_softprompt.retrieval.passages.documents import Passage
from lightning_softprompt.retrieval.passages.text_files import Passages
from lightning_softprompt.retrieval.retriever import Retriever

Mode = Literal["retrieved", "gold", "random", "closed_book"]
PassageOrder = Literal["score", "reversed", "shuffled"]
Draw = np.random.Generator
MODES = ("retrieved", "gold", "random", "closed_book")
ORDERS = ("score", "reversed", "shuffled")
SPARE = 50  # passages drawn beside those that are wanted, since some may be gold


@dataclass(frozen=True)
class QaExample(Example):
    """A row with a question.

    Args:
        question: The question.
        pool: What was found for it, as rows of the index, the best first.
        cited: What the target ends with to say which passages it rests on.
    """

    question: str = ""
    pool: tuple[int, ...] = ()
    cited: str = ""


@dataclass(frozen=True)
class Noise:
    """What makes training rows harder, drawn anew for each row in each epoch; shares from 0 to 1.

    Args:
        distractors: Share of the passages without the answer that are replaced by any others of the index.
        no_gold: Share of the rows whose passages with the answer are taken away, and others found for the question take
            their places. They are to be answered by `abstain`, where that is set.
        drop: Share of the passages that are left out.

    Raises:
        ValueError: If one is not from 0 to 1.
    """

    distractors: float = 0.0
    no_gold: float = 0.0
    drop: float = 0.0

    def __post_init__(self) -> None:
        shares = vars(self)
        if wrong := {name: share for name, share in shares.items() if not 0 <= share <= 1}:
            raise ValueError(f"noise wants shares from 0 to 1, got {wrong}")

    def __bool__(self) -> bool:
        return any(vars(self).values())


@dataclass(frozen=True)
class Candidate:
    """A passage that a row may show.

    Args:
        passage: The passage.
        rank: Its place among what was found, from 0; None where it was not looked for.
        sort_key: Position among the passages of its row: the lowest comes first.
    """

    passage: Passage
    rank: int | None
    sort_key: float = 0


@final
@dataclass(frozen=True)
class PassageSelector:
    """How passages are chosen and put in order.

    Args:
        retriever: Knows the index.
        mode: Which: those found, those of gold documents, any, or none.
        count: How many.
        order: The best first, the best last, or as it comes in training rows and the best first elsewhere.
        gold_at: Where the first passage of a gold document is put, from 0, or from -1 backwards; None leaves it.
        noise: What is drawn in training.
        seed: Of what is drawn.

    Raises:
        ValueError: If these do not fit each other.
    """

    retriever: Retriever | None
    mode: Mode = "retrieved"
    count: int = 5
    order: PassageOrder = "score"
    gold_at: int | None = None
    noise: Noise = field(default_factory=Noise)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES or self.order not in ORDERS:
            raise ValueError(
                f"mode must be one of {', '.join(MODES)} and order one of {', '.join(ORDERS)}, got {self.mode!r} and "
                f"{self.order!r}"
            )
        if self.count < 1:
            raise ValueError(f"passages must be 1 or more, got {self.count}; mode=closed_book shows none")
        if self.retriever is None and self.mode != "closed_book":
            raise ValueError(f"mode={self.mode} wants a retriever, whose index holds the passages; name one")
        if self.noise and self.mode not in ("retrieved", "gold"):
            raise ValueError(f"noise is for passages that were found or are gold, and mode={self.mode} shows neither")

    @property
    def varies(self) -> bool:
        """Whether training rows show something else in each epoch."""
        return bool(self.noise) or (self.order == "shuffled" and self.mode != "closed_book")

    def usual(self, asked: QaExample) -> list[Candidate]:
        """Without noise: the passages of a row, those first that are to be kept longest."""
        return self._placed(self.ranked(asked))

    def drawn(self, asked: QaExample, draw: Draw, hidden: bool) -> list[Candidate]:
        """With noise; `hidden` takes away the passages that hold the answer."""
        ranked = self.ranked(asked, asked.gold if hidden else ())
        ranked = [self._disturbed(found, asked, draw) for found in ranked]
        kept = [found for found in ranked if draw.random() >= self.noise.drop]
        if self.order != "shuffled":
            return self._placed(kept)
        return [replace(found, sort_key=key) for found, key in zip(kept, draw.random(len(kept)), strict=True)]

    def ranked(self, asked: QaExample, without: Sequence[str] = ()) -> list[Candidate]:
        """The passages that a mode gives, the best first, but for those of some documents."""
        if self.mode == "closed_book":
            return []
        if self.mode == "random":
            draw = np.random.default_rng((self.seed, zlib.crc32(asked.question.encode())))
            return [Candidate(passage, None) for passage in self._others(asked, draw, self.count)]
        ranked = self._gold(asked) if self.mode == "gold" else self._found(asked)
        return list(islice((found for found in ranked if found.passage.document not in without), self.count))

    def arranged(self, candidates: Iterable[Candidate], gold: Sequence[str]) -> list[Candidate]:
        """In the order in which they are shown."""
        shown = sorted(candidates, key=lambda candidate: candidate.sort_key)
        first = next((n for n, candidate in enumerate(shown) if candidate.passage.document in gold), None)
        if self.gold_at is None or first is None:
            return shown
        moved = shown.pop(first)
        place = self.gold_at if self.gold_at >= 0 else len(shown) + 1 + self.gold_at
        shown.insert(max(0, place), moved)
        return shown

    def found(self, asked: QaExample) -> tuple[str, ...]:
        """The documents that were found, each once; gold ones by the text of their passages."""
        passages = (self._passages[row] for row in asked.pool)
        documents = (self.gold.documents(passage, asked.gold) or (passage.document,) for passage in passages)
        return tuple(dict.fromkeys(chain.from_iterable(documents)))

    @cached_property
    def gold(self) -> GoldPassages:
        """The passages of gold documents."""
        return GoldPassages(self._passages)

    def _found(self, asked: QaExample) -> Iterator[Candidate]:
        return (Candidate(self._at(row, asked), rank) for rank, row in enumerate(asked.pool))

    def _at(self, row: int, asked: QaExample) -> Passage:
        """A passage of the index, named by the gold document whose text it has."""
        return self.gold.named(self._passages[row], asked.gold)

    def _gold(self, asked: QaExample) -> Iterator[Candidate]:
        """Passages of gold documents, those first that are gold first.

        Raises:
            ValueError: If the index has none of a document.
        """
        if absent := [name for name in asked.gold if not self._passages.rows_of(name)]:
            raise ValueError(
                f"the gold document {absent[0]!r} has no passage in {self._index_folder}: it is not in the corpus, or "
                f"has no words"
            )
        return (Candidate(self._at(row, asked), None) for row in self.gold.rows(asked.gold))

    def _placed(self, ranked: Iterable[Candidate]) -> list[Candidate]:
        sign = -1 if self.order == "reversed" else 1
        return [replace(candidate, sort_key=sign * rank) for rank, candidate in enumerate(ranked)]

    def _disturbed(self, candidate: Candidate, asked: QaExample, draw: Draw) -> Candidate:
        if candidate.passage.document in asked.gold or draw.random() >= self.noise.distractors:
            return candidate
        return next((Candidate(other, None) for other in self._others(asked, draw, 1)), candidate)

    def _others(self, asked: QaExample, draw: Draw, count: int) -> list[Passage]:
        """Any passages that are not gold, each once; fewer where there are fewer."""
        size = len(self._passages)
        rows = draw.choice(size, min(size, count + SPARE), replace=False).tolist()
        passages = (self._at(row, asked) for row in rows)
        return list(islice((passage for passage in passages if passage.document not in asked.gold), count))

    @property
    def _passages(self) -> Passages:
        assert self.retriever is not None, "checked above"
        return self.retriever.index.passages

    @property
    def _index_folder(self) -> str:
        return "" if self.retriever is None else self.retriever.folder

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "gold"}
