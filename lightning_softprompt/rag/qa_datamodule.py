"""Question answering with retrieved passages (RAG)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, final

from torchmetrics import Metric

from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import Classes, Example
from lightning_softprompt.data.answer_texts import read_answers
from lightning_softprompt.data.datamodule import SoftPromptDataModule
from lightning_softprompt.data.labels import ClassNumbers
from lightning_softprompt.data.prepared import Collate, Split
from lightning_softprompt.data.readers.corpora import Columns
from lightning_softprompt.data.readers.sources import Origin, first_columns
from lightning_softprompt.data.sampling.bucketing import Order, ResumableLoader
from lightning_softprompt.data.sampling.epoch_indexed import EpochIndexedSampler
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.evaluation.extended import UserMetrics
from lightning_softprompt.evaluation.metrics.text import RougeWords
from lightning_softprompt.evaluation.multiple_choice import ChoiceEvaluation
from lightning_softprompt.evaluation.qa import QaEvaluation
from lightning_softprompt.rag.answer_form import DEFAULT_FORM, AnswerForm
from lightning_softprompt.rag.epoch_resampling import ResampledDataset
from lightning_softprompt.rag.gold import GoldCheck, read_ids
from lightning_softprompt.rag.index_setup import ensure_index
from lightning_softprompt.rag.passage_rendering import PASSAGES, PassageRenderer, PassageTemplate
from lightning_softprompt.rag.passage_selection import DEFAULT_PASSAGES, PassageSelector, PassageSettings, QaExample
from lightning_softprompt.retrieval.result_cache import rank_cached
from lightning_softprompt.retrieval.retriever import Retriever
from lightning_softprompt.retrieval.search.settings import IndexSettings

log = logging.getLogger(__name__)


@final
class RagQaDataModule(SoftPromptDataModule):
    r"""Answers questions with retrieved passages. Answers are generated, or selected from a list of choices.

    Retrieval runs once per split, and its results are cached on disk. It includes the rows that a limit of the Trainer
    leaves out, because the sample of a limited evaluation depends on the lengths of the rows with their passages.

    A row includes as many complete passages as fit into max_tokens, the best first; only a single passage is
    truncated, and questions and answers never are. Text before the first soft token, such as the passages in the
    default template, is encoded by the backbone only once and reused in all epochs.

        softprompt fit --model Spring --data RagQaDataModule --data.path QUESTIONS --data.corpus QUESTIONS \
            --data.retriever Retriever --data.retriever.index indexes/mine

    Args:
        template: Text of a row: `{passages}` inserts the passages, `{column}` a column, `{soft}` marks soft tokens,
            `{target}` marks the answer.
        retriever: The retriever, with the index to search. Not required for passages.mode=closed_book.
        corpus: Source of the documents. A missing index is built from it; an existing index must contain the same
            documents (default: use the existing index without this check).
        index_settings: Settings for building the index.
        corpus_columns: Columns of the corpus (default: `text`, `id`, `title` and `source`).
        num_retrieved: Number of passages to retrieve per question. Retrieval metrics use all of them.
        passages: Which passages a row includes, and how they are written.
        question: Column of the question.
        answers: Column of the answer or of a list of correct answers (empty for unanswerable questions). The SQuAD
            format `{"text": [..], "answer_start": [..]}` is also accepted.
        gold: Optional column of the ids of the documents that contain the answer.
        answer_form: The form of answers: generated, or selected from choices; with or without citations.
        max_target_tokens: Tokens of max_tokens reserved for a generated answer; longer answers are truncated.
        decoding: How answers are generated (default: greedy decoding).
        rouge_words: Words that ROUGE compares: `ascii` (a-z and digits, as in published results) or `unicode` (words of
            all scripts).
        extra_metrics: Further metrics: one or several metrics of torchmetrics, which are updated with answers and
            correct answers (for choices, with the probabilities of the choices and the index of the correct one), or
            evaluations.
        common: Arguments of every data module.

    Raises:
        ValueError: If arguments contradict each other.
    """

    def __init__(
        self,
        template: str = "{passages}{soft}Question: {question}\nAnswer: {target}",
        retriever: Retriever | None = None,
        corpus: str | None = None,
        index_settings: IndexSettings | None = None,
        corpus_columns: Columns | None = None,
        num_retrieved: int = 20,
        passages: PassageSettings = DEFAULT_PASSAGES,
        question: str = "question",
        answers: str = "answers",
        gold: str = "positive_ids",
        answer_form: AnswerForm = DEFAULT_FORM,
        max_target_tokens: int = 32,
        decoding: Decoding | None = None,
        rouge_words: RougeWords = "ascii",
        extra_metrics: Metric | Evaluation | list[Metric | Evaluation] | None = None,
        **common: Any,
    ) -> None:
        self.passage = PassageTemplate(passages.template)
        has_passages = PASSAGES in Template(template).columns
        self.passage_columns = list(self.passage.columns(passages.count)) if has_passages else []
        expanded = self.passage.expand(template, passages.count)
        super().__init__(template=expanded, truncate=self.passage_columns, truncation_side="end", **common)
        self.selector = PassageSelector(retriever, passages, self.seed)
        self.retriever, self.corpus, self.index_settings = retriever, corpus, index_settings
        self.corpus_columns = corpus_columns
        self.num_retrieved, self.question, self.answers, self.gold = num_retrieved, question, answers, gold
        self.answer_form = answer_form
        self.rouge_words: RougeWords = rouge_words
        self.user_metrics = UserMetrics.from_option(extra_metrics)
        self.words = answer_form.choice_words
        self.append_eos = self.words is None
        self.max_target_tokens = max_target_tokens if self.append_eos else None
        decoding = decoding or Decoding()
        self.decoding = replace(decoding, max_new_tokens=decoding.max_new_tokens or max_target_tokens)
        self._pools: dict[str, tuple[int, ...]] = {}
        self._passage_counts: Counter[str] = Counter()
        self._check()

    def _check(self) -> None:
        if self.question not in self.template.columns:
            raise ValueError(
                f"question must be a column of the template, {list(self.template.columns)}, got {self.question!r}"
            )
        if self.selector.mode != "closed_book" and not self.passage_columns:
            raise ValueError(
                f"template must contain {{{PASSAGES}}} or passages.mode be closed_book, got {self.template.text!r}"
            )
        count = self.selector.settings.count
        if self.num_retrieved < count:
            raise ValueError(f"num_retrieved={self.num_retrieved} is less than passages.count={count}; increase it")
        if self.append_eos and not 0 < int(self.max_target_tokens or 0) < self.max_tokens:
            raise ValueError(f"max_target_tokens must be between 0 and max_tokens={self.max_tokens}")
        if self.answer_form.cite and "{number}" not in self.passage.text:
            raise ValueError("answer_form.cite requires {number} in passages.template")
        if self._draws_passages and self.batch_tokens is not None:
            raise ValueError(
                "batch_tokens requires rows of the same length in every epoch; set batch_size instead, or remove "
                "passages.noise, passages.order=shuffled and answer_form.training_target=any"
            )

    @property
    def resamples(self) -> bool:
        """Whether training rows change from epoch to epoch."""
        return self._draws_passages or super().resamples

    @property
    def _draws_passages(self) -> bool:
        """Whether passages or answers of training rows are drawn in each epoch."""
        return self.selector.settings.resamples or self.answer_form.uses_any_answer

    @property
    def classes(self) -> Classes | None:
        """The choices with their label words. Each word includes the space that the template has before `{target}`."""
        if self.words is None:
            return None
        return Classes({name: [self.template.glue + word] for name, word in self.words.items()}, self.template.text)

    @property
    def evaluation(self) -> Evaluation:
        """Exact match, F1 and other metrics of answers; accuracy for choices."""
        metrics, form = self.user_metrics.metrics, self.answer_form
        if self.words is not None:
            return self.user_metrics.extend(ChoiceEvaluation(tuple(self.words), metrics))
        default = QaEvaluation(self.decoding, form.abstain, form.long, form.cite, self.rouge_words, metrics)
        return self.user_metrics.extend(default)

    @property
    def needed_columns(self) -> tuple[str, ...]:
        """The columns of the template without those of passages, which are retrieved."""
        return tuple(name for name in self.template.columns if name not in self.passage_columns)

    @cached_property
    def renderer(self) -> PassageRenderer:
        """Renders rows with their passages."""
        settings = (self.max_tokens, self.append_eos, self.max_target_tokens, self.answer_form.cite)
        return PassageRenderer(self.codec, self.template, self.passage, self.selector, *settings)

    def prepare_data(self) -> None:
        """Builds a missing index, in one process per machine.

        Raises:
            ValueError: If the index contains another corpus or cannot be built.
        """
        if self.corpus is not None and self.retriever is not None and self.selector.mode != "closed_book":
            ensure_index(self.retriever.folder, self.corpus, self.index_settings, self.corpus_columns)

    def convert_rows(self, name: Split) -> tuple[list[Example], list[Origin]]:
        """Retrieves passages for all questions of a split, then converts its rows."""
        max_tokens = self.renderer.max_tokens  # checks that the backbone can generate before rows are processed
        questions = [row.get(self.question) for row in self.rows(name)]
        self._retrieve(questions)
        self._report_empty_results(name, questions)
        self._passage_counts.clear()
        examples, origins = super().convert_rows(name)
        self._check_gold(name, examples)
        if self._passage_counts["shown"] + self._passage_counts["dropped"]:
            counts = "; ".join(f"{count} {what}" for what, count in self._passage_counts.items())
            log.info("Passages of the %d %s rows at max_tokens=%d: %s", len(examples), name, max_tokens, counts)
        return examples, origins

    def _report_empty_results(self, name: Split, questions: Sequence[Any]) -> None:
        """Warns if retrieval returns nothing for most questions."""
        texts = (question for question in questions if isinstance(question, str))
        pools = [self._pools[question] for question in texts if question in self._pools]
        empty = sum(not pool for pool in pools)
        if self.retriever is not None and 2 * empty > len(pools):
            log.warning(
                "%d of %d %s questions retrieve nothing from %s with %s search: it does not contain their words. Check "
                "that questions and documents are in the same language, or use an encoder",
                empty, len(pools), name, self.retriever.folder, self.retriever.mode,
            )  # fmt: skip

    def _check_gold(self, name: Split, examples: Sequence[Example]) -> None:
        """Reports gold documents that the index lacks, in all rows with answers."""
        if name != "predict" and self.retriever is not None and self.selector.mode != "closed_book":
            check = GoldCheck(self.retriever.index.passages, self.retriever.folder, self.gold)
            for example in examples:
                check.add(example.gold)
            check.report(name)

    def _retrieve(self, questions: Sequence[Any]) -> None:
        """Retrieves passages for questions that have none yet."""
        texts = dict.fromkeys(question for question in questions if isinstance(question, str))
        new = [text for text in texts if text.strip() and text not in self._pools]
        if self.selector.mode == "retrieved" and self.retriever is not None and new:
            rankings = rank_cached(self.retriever, new, self.num_retrieved)
            for question, ranking in zip(new, rankings, strict=True):
                self._pools[question] = tuple(ranking.rows.tolist())

    def example(self, row: Mapping[str, Any], labelled: bool) -> Example:
        """Converts a row to a question with its passages and correct answers."""
        example = self._qa_example(row, labelled)
        candidates = self.selector.select(example)
        rendered = self.renderer.render(example, candidates)
        self._passage_counts["shown"] += len(rendered.example.passages)
        self._passage_counts["dropped"] += rendered.dropped
        self._passage_counts["cut"] += rendered.cut
        return rendered.example

    def _qa_example(self, row: Mapping[str, Any], labelled: bool) -> QaExample:
        question = row.get(self.question)
        if isinstance(question, str) and not question.strip():
            raise ValueError(f"column {self.question!r} is empty")
        fields = self.text(row, dict.fromkeys(self.passage_columns, ""))
        question = fields[self.question]
        self._retrieve([question])
        fields = {"question": question, **fields}  # evaluations use this name
        searched = self.num_retrieved if question in self._pools else 0
        pool = self._pools.get(question, ())
        example = QaExample(fields, "", gold=self._gold(row), question=question, pool=pool, searched=searched)
        example = replace(example, found=self.selector.retrieved_documents(example))
        return self._add_answers(example, row) if labelled else self._add_filler(example)

    def _gold(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        ids = row.get(self.gold)
        if ids is None and self.selector.mode == "gold":
            raise ValueError(
                f"passages.mode=gold requires document ids in column {self.gold!r}; the row has {first_columns(row)}"
            )
        if ids is None:
            return ()
        names = read_ids(ids, self.gold)
        return names if self.selector.mode == "closed_book" else self.selector.gold.distinct(names)

    def _add_filler(self, example: QaExample) -> QaExample:
        """Gives an unlabelled row the word of the first choice as filler, if there are choices."""
        return example if self.words is None else replace(example, target=next(iter(self.words.values())))

    def _add_answers(self, example: QaExample, row: Mapping[str, Any]) -> QaExample:
        answers = self._correct_answers(row)
        if self.words is not None:
            return self._add_choice(example, answers)
        abstain = self.answer_form.abstain
        if not answers and abstain is None:
            raise ValueError(
                f"column {self.answers!r} has no answer; set answer_form.abstain to the answer to unanswerable "
                "questions, or skip such rows with on_bad_row='skip'"
            )
        answers = answers or (str(abstain),)
        return replace(example, target=answers[0], references=answers)

    def _correct_answers(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        if self.answers not in row:
            raise ValueError(f"no column {self.answers!r}; the row has {first_columns(row)}: set data.answers")
        return read_answers(row[self.answers], self.answers)

    def _add_choice(self, example: QaExample, answers: Sequence[str]) -> QaExample:
        assert self.words is not None
        names = list(self.words)
        number = ClassNumbers(names).find_name(answers[0]) if len(answers) == 1 else None
        if number is None:
            raise ValueError(f"column {self.answers!r} must name one of the choices {names}, got {list(answers)}")
        name = names[number]
        return replace(example, target=self.words[name], label=number, references=(name,))

    def build_loader(self, name: Split, order: Order) -> ResumableLoader:
        """Returns the loader of a split. Training passages are selected again in each epoch if noise is set.

        Raises:
            ValueError: If `augment` is set, too.
        """
        if order != "shuffled" or not self._draws_passages:
            return super().build_loader(name, order)
        if self.augmentations:
            raise ValueError("augment excludes passages and answers that are drawn again in each epoch; remove one")
        form = self.answer_form
        rows = ResampledDataset(self.split(name), self.seed, self.renderer, form.abstain, form.uses_any_answer)
        inner = self.sampler(name, order, self.ranks)
        sampler = EpochIndexedSampler(inner, len(inner.lengths))
        return ResumableLoader(rows, sampler, Collate(self.codec), num_workers=self.num_workers)
