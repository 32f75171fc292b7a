"""Pairs of a question and a passage, for training a re-ranker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, final

from lightning_softprompt.core.types import Classes, Example
from lightning_softprompt.data.classification import ClassificationDataModule
from lightning_softprompt.data.datamodule import SoftPromptDataModule
from lightning_softprompt.data.labels import GivenLabels, GivenWord, words_by_name
from lightning_softprompt.data.prepared import Split
from lightning_softprompt.data.readers.corpora import Columns
from lightning_softprompt.data.readers.sources import DataError, Origin, Row, Rows
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.rag.gold import read_ids
from lightning_softprompt.rag.index_setup import ensure_index
from lightning_softprompt.rag.passage_selection import Candidate, PassageSelector, PassageSettings, QaExample
from lightning_softprompt.retrieval.result_cache import rank_cached
from lightning_softprompt.retrieval.retriever import Retriever
from lightning_softprompt.retrieval.search.settings import IndexSettings

IRRELEVANT, RELEVANT = "irrelevant", "relevant"
COLUMNS = ("question", "title", "passage")
LABEL = "label"


@final
class RelevanceDataModule(SoftPromptDataModule):
    r"""Builds pairs of a question and a relevant or irrelevant passage, to train a re-ranker (`PromptReranker`).

    Passages of the gold documents of a question are relevant. Irrelevant passages are hard negatives: the highest
    ranked retrieved passages of other documents.

    Args:
        retriever: The retriever, with the index to search.
        template: Text of a pair, with `{question}`, `{passage}` and optionally `{title}`.
        words: Label words of `irrelevant` and `relevant` (default: `no` and `yes`).
        corpus: Source of the documents. A missing index is built from it; an existing index must contain the same
            documents (default: use the existing index without this check).
        index_settings: Settings for building the index.
        corpus_columns: Columns of the corpus (default: `text`, `id`, `title` and `source`).
        positives: Maximum relevant passages per question.
        negatives: Maximum irrelevant passages per question.
        num_retrieved: Number of passages to retrieve per question. `predict` scores all of them.
        balanced: Sample training rows so that both classes are equally frequent.
        question: Column of the question.
        gold: Column of the ids of the documents that contain the answer.
        common: Arguments of every data module.

    Raises:
        ValueError: If arguments contradict each other.
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
        num_retrieved: int = 20,
        balanced: bool = False,
        question: str = "question",
        gold: str = "positive_ids",
        **common: Any,
    ) -> None:
        super().__init__(template=template, truncate=["passage"], **common)
        words_by_class = words_by_name({IRRELEVANT: "no", RELEVANT: "yes"} if words is None else words, "words")
        if set(words_by_class) != {IRRELEVANT, RELEVANT}:
            raise ValueError(f"words must name {IRRELEVANT} and {RELEVANT}, got {list(words_by_class)}")
        unknown = set(self.template.columns) - set(COLUMNS)
        if unknown:
            raise ValueError(f"template may contain only the columns {', '.join(COLUMNS)}, got {sorted(unknown)}")
        if min(positives, negatives) < 1 or num_retrieved < negatives:
            raise ValueError(
                "positives and negatives must be at least 1 and num_retrieved at least negatives, got "
                f"positives={positives}, negatives={negatives} and num_retrieved={num_retrieved}"
            )
        labels: GivenLabels = {name: words_by_class[name][0] for name in (IRRELEVANT, RELEVANT)}
        self.classification = ClassificationDataModule(template, labels, LABEL, balanced=balanced, backbone=self.spec)
        self.retriever, self.corpus, self.index_settings = retriever, corpus, index_settings
        self.corpus_columns = corpus_columns
        self.relevant = PassageSelector(retriever, PassageSettings(mode="gold", count=positives))
        self.irrelevant = PassageSelector(retriever, PassageSettings(count=negatives))
        self.retrieved = PassageSelector(retriever, PassageSettings(count=num_retrieved))
        self.question, self.gold = question, gold
        self._pairs_by_split: dict[str, Rows] = {}

    @property
    def classes(self) -> Classes:
        """The two classes with their label words."""
        return self.classification.classes

    @property
    def evaluation(self) -> Evaluation:
        """Accuracy, and precision, recall and F1 of each class."""
        return self.classification.evaluation

    def example(self, row: Mapping[str, Any], labelled: bool) -> Example:
        """Converts a pair to text."""
        return self.classification.example(row, labelled)

    def weights(self, examples: Sequence[Example]) -> list[float] | None:
        """Returns the inverse frequency of each row's class if `balanced` is set."""
        return self.classification.weights(examples)

    @property
    def needed_columns(self) -> tuple[str, ...]:
        """The column of the question; passages are retrieved."""
        return (self.question,)

    def prepare_data(self) -> None:
        """Builds a missing index, in one process per machine.

        Raises:
            ValueError: If the index contains another corpus or cannot be built.
        """
        if self.corpus is not None:
            ensure_index(self.retriever.folder, self.corpus, self.index_settings, self.corpus_columns)

    def rows(self, name: Split) -> Rows:
        """Returns the pairs of a split, each with the origin of its question.

        Raises:
            ValueError: If the split has no source, or a question cannot be used.
        """
        if name not in self._pairs_by_split:
            self._pairs_by_split[name] = self._build_pairs(super().rows(name), labelled=name != "predict")
        return self._pairs_by_split[name]

    def set_rows(self, name: Split, rows: Rows) -> None:
        """Replaces the source of a split by questions that are in memory."""
        super().set_rows(name, rows)
        self._pairs_by_split.pop(name, None)

    def hold_out_rows(self, name: Split) -> tuple[list[Example], list[Origin]]:
        """Raises an error, since held-out pairs would share questions with the training rows.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "RelevanceDataModule requires separate validation questions, because held-out pairs would share questions "
            "with the training rows; set data.validation"
        )

    def _build_pairs(self, rows: Rows, labelled: bool) -> Rows:
        texts = [row.get(self.question) for row in rows]
        questions = list(dict.fromkeys(text for text in texts if isinstance(text, str) and text.strip()))
        rankings = rank_cached(self.retriever, questions, self.retrieved.settings.count)
        retrieved = {
            question: tuple(ranking.rows.tolist()) for question, ranking in zip(questions, rankings, strict=True)
        }
        pairs: list[Row] = []
        positions: list[int] = []
        bad = list(rows.skipped)
        gold = self._gold_by_question(rows) if labelled else {}
        for i, row in enumerate(rows):
            try:
                new_pairs = list(self._pairs_of(row, retrieved, gold, labelled))
            except ValueError as error:
                bad.append(f"{rows.where(i)}: {error}")
                if self.on_bad_row == "raise":
                    raise DataError(bad[-1]) from None
                continue
            pairs += new_pairs
            positions += [i] * len(new_pairs)
        return replace(rows.derive(pairs, positions), skipped=tuple(bad))

    def _gold_by_question(self, rows: Rows) -> dict[str, tuple[str, ...]]:
        """Returns all gold documents of each question, which may occur in several rows."""
        gold: dict[str, tuple[str, ...]] = {}
        for row in rows:
            question = row.get(self.question)
            with suppress(ValueError):  # `_pairs_of` reports it
                gold[str(question)] = (*gold.get(str(question), ()), *self._gold(row))
        return gold

    def _pairs_of(
        self,
        row: Row,
        retrieved: Mapping[str, tuple[int, ...]],
        gold: Mapping[str, tuple[str, ...]],
        labelled: bool,
    ) -> Iterator[Row]:
        question = row.get(self.question)
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"column {self.question!r} must be non-empty text, got {question!r}")
        row_gold = self._gold(row) if labelled else ()
        example = QaExample({}, "", gold=row_gold, question=question, pool=retrieved[question])
        if not labelled:
            for candidate in self.retrieved.rank(example):
                yield self._pair(question, candidate)
            return
        for candidate in self.relevant.rank(example):
            yield self._pair(question, candidate, RELEVANT)
        all_gold = replace(example, gold=gold[question])  # a passage that is relevant in another row is not a negative
        for candidate in self.irrelevant.rank(all_gold, exclude=all_gold.gold):
            yield self._pair(question, candidate, IRRELEVANT)

    def _gold(self, row: Row) -> tuple[str, ...]:
        ids = row.get(self.gold)
        names = read_ids(ids, self.gold)
        if not names:
            raise ValueError(f"column {self.gold!r} must be a non-empty list of document ids, got {ids!r}")
        return self.relevant.gold.distinct(names)

    @staticmethod
    def _pair(question: str, candidate: Candidate, label: str | None = None) -> Row:
        passage = candidate.passage
        return {"question": question, "title": passage.title, "passage": passage.text, LABEL: label}
