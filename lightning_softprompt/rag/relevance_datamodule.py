"""Questions and passages, and whether one answers the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, final

from lightning_softprompt.core.types import Classes, Example
from lightning_softprompt.data.classification import ClassificationDataModule
from lightning_softprompt.data.datamodule import SoftPromptDataModule, Split
from lightning_softprompt.data.labels import GivenLabels, GivenWord, words_by_name
from lightning_softprompt.data.readers.corpora import Columns
from lightning_softprompt.data.readers.sources import DataError, Origin, Row, Rows
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.rag.gold import read_ids
from lightning_softprompt.rag.index_setup import ensure_index
from lightning_softprompt.rag.passage_selection import Candidate, PassageSelector, QaExample
from lightning_softprompt.retrieval.result_cache import rankings_for
from lightning_softprompt.retrieval.retriever import Retriever
from lightning_softprompt.retrieval.search.settings import IndexSettings

IRRELEVANT, RELEVANT = "irrelevant", "relevant"
COLUMNS = ("question", "title", "passage")
LABEL = "label"


@final
class RelevanceDataModule(SoftPromptDataModule):
    r"""Pairs of a question and a passage that are relevant or not, made from questions whose documents are known.

    A passage of a gold document is relevant. Those that are not are the best of the others that a retriever finds,
    which are hard to tell from it. A prompt that was trained on them re-ranks what is found (`PromptReranker`).

    Args:
        retriever: What finds passages, and in which index.
        template: How a pair is written, with `{question}`, `{passage}` and perhaps `{title}`.
        words: The word that stands for each of `irrelevant` and `relevant`.
        corpus: Source of the documents. The index is built from it if it is not there, and must hold it if it is; None
            takes the index as it is.
        index_settings: What the index is built with.
        corpus_columns: The columns of the corpus; unless given, `text`, `id`, `title` and `source`.
        positives: Relevant passages of a question, at most.
        negatives: Irrelevant ones.
        found: Passages that are found for a question, from which they are taken; all of them are to be predicted.
        balanced: Draws training rows so that both classes come up equally often.
        question: The column that holds the question.
        gold: The column that holds the ids of documents with the answer.
        common: Arguments of every data module.

    Raises:
        ValueError: If the arguments do not fit each other.
    """

    def __init__(
        self,
        retriever: Retriever,
        template: str = "{soft}Question: {question}\nPassage: {passage}\nDoes the passage answer it? {target}",
        words: dict[str, GivenWord] | None = None,
        corpus: str | None = None,
        index_settings: IndexSettings | None = None,
        corpus_columns: Columns | None = None,
        positives: int = 1,
        negatives: int = 1,
        found: int = 20,
        balanced: bool = False,
        question: str = "question",
        gold: str = "positive_ids",
        **common: Any,
    ) -> None:
        super().__init__(template=template, truncate=["passage"], **common)
        given = {IRRELEVANT: "no", RELEVANT: "yes"} if words is None else words
        spoken = {name: listed[0] for name, listed in words_by_name(given, "words").items()}
        if set(spoken) != {IRRELEVANT, RELEVANT}:
            raise ValueError(f"words must say {IRRELEVANT} and {RELEVANT}, got {spoken}")
        if strange := set(self.template.columns) - set(COLUMNS):
            raise ValueError(f"template may name {', '.join(COLUMNS)}, got {sorted(strange)}")
        if min(positives, negatives) < 1 or found < negatives:
            raise ValueError(f"wanted positives and negatives above 0, and found={found} no fewer than the latter")
        labels: GivenLabels = {name: spoken[name] for name in (IRRELEVANT, RELEVANT)}
        self.judged = ClassificationDataModule(template, labels, LABEL, balanced=balanced, backbone=self.spec)
        self.retriever, self.corpus, self.index_settings = retriever, corpus, index_settings
        self.corpus_columns = corpus_columns
        self.right = PassageSelector(retriever, "gold", positives)
        self.wrong = PassageSelector(retriever, "retrieved", negatives)
        self.all = PassageSelector(retriever, "retrieved", found)
        self.question, self.gold = question, gold
        self._paired: dict[str, Rows] = {}

    @property
    def classes(self) -> Classes:
        """How both are spoken."""
        return self.judged.classes

    @property
    def evaluation(self) -> Evaluation:
        """Precision, recall and F1 of each class, and accuracy."""
        return self.judged.evaluation

    def example(self, row: Mapping[str, Any], labelled: bool) -> Example:
        """A pair."""
        return self.judged.example(row, labelled)

    def weights(self, examples: Sequence[Example]) -> list[float] | None:
        """The inverse of each class's frequency, where classes are to be balanced."""
        return self.judged.weights(examples)

    @property
    def needed_columns(self) -> tuple[str, ...]:
        """The question; passages are searched for."""
        return (self.question,)

    def prepare_data(self) -> None:
        """Builds the index where it is not there; in one process of a machine.

        Raises:
            ValueError: If it is the index of another corpus, or cannot be built.
        """
        if self.corpus is not None:
            ensure_index(self.retriever.folder, self.corpus, self.index_settings, self.corpus_columns)

    def rows(self, name: Split) -> Rows:
        """The pairs, each with the place of its question.

        Raises:
            ValueError: If there is no such source, or a question cannot be used.
        """
        if name not in self._paired:
            self._paired[name] = self._pairs(super().rows(name), labelled=name != "predict")
        return self._paired[name]

    def take(self, name: Split, rows: Rows) -> None:
        """Gives a split questions that were read elsewhere, in place of its source."""
        super().take(name, rows)
        self._paired.pop(name, None)

    def _held_out(self, name: Split) -> tuple[list[Example], list[Origin]]:
        raise ValueError(
            "relevance wants validation questions of its own, since pairs of one question would stand in training and "
            "validation; set data.validation"
        )

    def _pairs(self, rows: Rows, labelled: bool) -> Rows:
        texts = [row.get(self.question) for row in rows]
        questions = list(dict.fromkeys(text for text in texts if isinstance(text, str) and text.strip()))
        rankings = rankings_for(self.retriever, questions, self.all.count)
        found = {text: tuple(of.rows.tolist()) for text, of in zip(questions, rankings, strict=True)}
        pairs: list[Row] = []
        positions: list[int] = []
        bad = list(rows.skipped)
        gold = self._gold_by_question(rows) if labelled else {}
        for i, row in enumerate(rows):
            try:
                made = list(self._of(row, found, gold, labelled))
            except ValueError as error:
                bad.append(f"{rows.where(i)}: {error}")
                if self.on_bad_row == "raise":
                    raise DataError(bad[-1]) from None
                continue
            pairs += made
            positions += [i] * len(made)
        return replace(rows.derived(pairs, positions), skipped=tuple(bad))

    def _gold_by_question(self, rows: Rows) -> dict[str, tuple[str, ...]]:
        """All gold documents of a question, which may be asked in several rows."""
        gold: dict[str, tuple[str, ...]] = {}
        for row in rows:
            question = row.get(self.question)
            with suppress(ValueError):  # `_of` reports it
                gold[str(question)] = (*gold.get(str(question), ()), *self._gold(row))
        return gold

    def _of(
        self,
        row: Row,
        found: Mapping[str, tuple[int, ...]],
        gold: Mapping[str, tuple[str, ...]],
        labelled: bool,
    ) -> Iterator[Row]:
        question = row.get(self.question)
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"column {self.question!r} must be text that is not empty, got {question!r}")
        asked = QaExample({}, "", gold=self._gold(row) if labelled else (), question=question, pool=found[question])
        if not labelled:
            yield from (self._pair(asked, candidate) for candidate in self.all.ranked(asked))
            return
        yield from (self._pair(asked, candidate, RELEVANT) for candidate in self.right.ranked(asked))
        known = replace(asked, gold=gold[question])  # nothing is irrelevant here and relevant in another row
        yield from (self._pair(asked, candidate, IRRELEVANT) for candidate in self.wrong.ranked(known, known.gold))

    def _gold(self, row: Row) -> tuple[str, ...]:
        ids = row.get(self.gold)
        names = read_ids(ids, self.gold)
        if not names:
            raise ValueError(f"column {self.gold!r} must be a list of ids of documents, one at least, got {ids!r}")
        return self.right.gold.distinct(names)

    @staticmethod
    def _pair(asked: QaExample, candidate: Candidate, label: str | None = None) -> Row:
        passage = candidate.passage
        return {"question": asked.question, "title": passage.title, "passage": passage.text, LABEL: label}
