"""Selects the passages of a question and their order: retrieved, gold, or random passages, or none."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, Literal, final

import numpy as np

from lightning_softprompt.core.types import Example
from lightning_softprompt.rag.gold import GoldPassages
from lightning_softprompt.retrieval.passages.documents import Passage
from lightning_softprompt.retrieval.passages.text_files import Passages
from lightning_softprompt.retrieval.retriever import Retriever

Mode = Literal["retrieved", "gold", "random", "closed_book"]
PassageOrder = Literal["score", "reversed", "shuffled"]
Rng = np.random.Generator
MODES = ("retrieved", "gold", "random", "closed_book")
ORDERS = ("score", "reversed", "shuffled")
SPARE = 50  # additional random passages, since some may be gold and are then left out


@dataclass(frozen=True)
class QaExample(Example):
    """A row with a question.

    Args:
        question: The question.
        pool: Retrieved passages, as rows of the index, the best first.
        cited: Citations at the end of the target, such as ` [2]`.
    """

    question: str = ""
    pool: tuple[int, ...] = ()
    cited: str = ""


@dataclass(frozen=True)
class PassageNoise:
    """Noise in the passages of training rows, sampled for each row in each epoch. All values are probabilities.

    Args:
        distractors: Probability of replacing a passage without the answer by a random passage of the index.
        no_gold: Probability of replacing all gold passages of a row by other retrieved passages. The target of such a
            row is `abstain`, if that is set.
        drop: Probability of leaving out a passage.

    Raises:
        ValueError: If a value is not in [0, 1].
    """

    distractors: float = 0.0
    no_gold: float = 0.0
    drop: float = 0.0

    def __post_init__(self) -> None:
        wrong = {name: value for name, value in vars(self).items() if not 0 <= value <= 1}
        if wrong:
            raise ValueError(f"values of noise must be between 0 and 1, got {wrong}")

    def __bool__(self) -> bool:
        return any(vars(self).values())


@dataclass(frozen=True)
class PassageSettings:
    r"""Which passages a row includes, and how they are written.

    Args:
        template: Text of a passage: `{text}`, and optionally `{number}`, `{title}`, `{heading}` (the title followed by
            a colon) and `{document}`. `{soft}` adds soft tokens to each passage, for a method with one soft block per
            passage, such as `--model PromptTuning --model.length "[4, 4, 4]"` for three passages. Unused blocks of rows
            with fewer passages follow the last passage.
        mode: Which passages to include: retrieved ones, those of the gold documents, random ones, or none.
        count: Maximum passages per row.
        order: Order of passages: the best first, the best last, or shuffled in training and the best first elsewhere.
        gold_position: Position of the first gold passage in a row, from 0, or negative to count from the end (default:
            its position by `order`).
        noise: PassageNoise in the passages of training rows.

    Raises:
        ValueError: If values contradict each other.
    """

    template: str = "[{number}] {heading}{text}\n"
    mode: Mode = "retrieved"
    count: int = 5
    order: PassageOrder = "score"
    gold_position: int | None = None
    noise: PassageNoise | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES or self.order not in ORDERS:
            raise ValueError(
                f"mode must be one of {', '.join(MODES)} and order one of {', '.join(ORDERS)}, got {self.mode!r} and "
                f"{self.order!r}"
            )
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}; use mode=closed_book for no passages")
        if self.noise and self.mode not in ("retrieved", "gold"):
            raise ValueError(f"noise requires mode=retrieved or mode=gold, got mode={self.mode}")

    @property
    def resamples(self) -> bool:
        """Whether the passages of training rows change from epoch to epoch."""
        return bool(self.noise) or (self.order == "shuffled" and self.mode != "closed_book")


DEFAULT_PASSAGES = PassageSettings()


@dataclass(frozen=True)
class Candidate:
    """A passage that may be included in a row.

    Args:
        passage: The passage.
        rank: Its rank among the retrieved passages, from 0; None if it was not retrieved.
        sort_key: Position among the passages of its row: the lowest comes first.
    """

    passage: Passage
    rank: int | None
    sort_key: float = 0


@final
@dataclass(frozen=True)
class PassageSelector:
    """Selects and orders passages.

    Args:
        retriever: The retriever, with the index of the passages.
        settings: Which passages to select, and their order.
        seed: Seed of random passages.

    Raises:
        ValueError: If there is no retriever and the settings require one.
    """

    retriever: Retriever | None
    settings: PassageSettings
    seed: int = 0

    def __post_init__(self) -> None:
        if self.retriever is None and self.mode != "closed_book":
            raise ValueError(f"mode={self.mode} requires a retriever; set data.retriever")

    @property
    def mode(self) -> Mode:
        """Which passages are selected."""
        return self.settings.mode

    @property
    def noise(self) -> PassageNoise:
        """The noise in training rows; all values are 0 if there is none."""
        return self.settings.noise or PassageNoise()

    def select(self, example: QaExample) -> list[Candidate]:
        """Returns the passages of a row without noise, the most important ones first."""
        return self._with_sort_keys(self.rank(example))

    def sample(self, example: QaExample, rng: Rng, hide_gold: bool) -> list[Candidate]:
        """Returns the passages of a training row with noise, the most important ones first.

        Args:
            example: The row.
            rng: Source of the noise.
            hide_gold: Whether to leave out the passages of gold documents.
        """
        ranked = self.rank(example, exclude=example.gold if hide_gold else ())
        noisy = [self._maybe_replace(candidate, example, rng) for candidate in ranked]
        kept = [candidate for candidate in noisy if rng.random() >= self.noise.drop]
        if self.settings.order != "shuffled":
            return self._with_sort_keys(kept)
        keys = rng.random(len(kept))
        return [replace(candidate, sort_key=key) for candidate, key in zip(kept, keys, strict=True)]

    def rank(self, example: QaExample, exclude: Sequence[str] = ()) -> list[Candidate]:
        """Returns the passages of a row by rank.

        Args:
            example: The row.
            exclude: Documents whose passages are left out.
        """
        if self.mode == "closed_book":
            return []
        if self.mode == "random":
            rng = np.random.default_rng((self.seed, zlib.crc32(example.question.encode())))
            return [Candidate(passage, None) for passage in self._random_passages(example, rng, self.settings.count)]
        ranked = self._gold_candidates(example) if self.mode == "gold" else self._retrieved_candidates(example)
        allowed = (candidate for candidate in ranked if candidate.passage.document not in exclude)
        return list(islice(allowed, self.settings.count))

    def arrange(self, candidates: Iterable[Candidate], gold: Sequence[str]) -> list[Candidate]:
        """Returns passages in the order in which a row includes them."""
        arranged = sorted(candidates, key=lambda candidate: candidate.sort_key)
        gold_positions = [n for n, candidate in enumerate(arranged) if candidate.passage.document in gold]
        position = self.settings.gold_position
        if position is None or not gold_positions:
            return arranged
        first_gold = arranged.pop(gold_positions[0])
        if position < 0:
            position += len(arranged) + 1
        arranged.insert(max(0, position), first_gold)
        return arranged

    def retrieved_documents(self, example: QaExample) -> tuple[str, ...]:
        """Returns the retrieved documents without duplicates. Gold documents are recognized by their text."""
        documents: dict[str, None] = {}
        for row in example.pool:
            passage = self._passages[row]
            names = self.gold.documents(passage, example.gold) or (passage.document,)
            documents.update(dict.fromkeys(names))
        return tuple(documents)

    @cached_property
    def gold(self) -> GoldPassages:
        """The passages of gold documents."""
        return GoldPassages(self._passages)

    def _retrieved_candidates(self, example: QaExample) -> Iterator[Candidate]:
        return (Candidate(self._passage(row, example), rank) for rank, row in enumerate(example.pool))

    def _passage(self, row: int, example: QaExample) -> Passage:
        """Returns a passage of the index. Its document is the gold document that has the same text, if any."""
        return self.gold.attribute(self._passages[row], example.gold)

    def _gold_candidates(self, example: QaExample) -> Iterator[Candidate]:
        """Returns the passages of gold documents, in the order of the documents.

        Raises:
            ValueError: If the index has no passage of a gold document.
        """
        missing = [name for name in example.gold if not self._passages.rows_of(name)]
        if missing:
            raise ValueError(
                f"the gold document {missing[0]!r} has no passage in {self._index_folder}: it is not in the corpus or "
                "has no words"
            )
        return (Candidate(self._passage(row, example), None) for row in self.gold.rows(example.gold))

    def _with_sort_keys(self, ranked: Iterable[Candidate]) -> list[Candidate]:
        sign = -1 if self.settings.order == "reversed" else 1
        return [replace(candidate, sort_key=sign * rank) for rank, candidate in enumerate(ranked)]

    def _maybe_replace(self, candidate: Candidate, example: QaExample, rng: Rng) -> Candidate:
        """Replaces a passage without the answer by a random one, with the probability `noise.distractors`."""
        if candidate.passage.document in example.gold or rng.random() >= self.noise.distractors:
            return candidate
        others = self._random_passages(example, rng, 1)
        return Candidate(others[0], None) if others else candidate

    def _random_passages(self, example: QaExample, rng: Rng, count: int) -> list[Passage]:
        """Returns at most `count` different random passages that are not gold."""
        size = len(self._passages)
        rows = rng.choice(size, min(size, count + SPARE), replace=False).tolist()
        passages = (self._passage(row, example) for row in rows)
        return list(islice((passage for passage in passages if passage.document not in example.gold), count))

    @property
    def _passages(self) -> Passages:
        assert self.retriever is not None, "checked by __post_init__"
        return self.retriever.index.passages

    @property
    def _index_folder(self) -> str:
        return "" if self.retriever is None else self.retriever.folder

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "gold"}
