"""Questions that are answered with passages beside them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, final

from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import Classes, Example
from lightning_softprompt.data.answer_texts import read_answers
from lightning_softprompt.data.datamodule import Collate, SoftPromptDataModule, Split
from lightning_softprompt.data.labels import ClassNumbers, GivenLabels, words_by_name
from lightning_softprompt.data.readers.corpora import Columns
from lightning_softprompt.data.readers.sources import Origin, first_columns
from lightning_softprompt.data.sampling.bucketing import Order, ResumableLoader
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.evaluation.metrics.text import RougeWords
from lightning_softprompt.evaluation.multiple_choice import ChoiceEvaluation
from lightning_softprompt.evaluation.qa import QaEvaluation
from lightning_softprompt.rag.epoch_resampling import EpochIndexedSampler, ResampledDataset
from lightning_softprompt.rag.gold import GoldCheck, read_ids
from lightning_softprompt.rag.index_setup import ensure_index
from lightning_softprompt.rag.passage_rendering import PASSAGES, PassageRenderer, PassageTemplate
from lightning_softprompt.rag.passage_selection import Mode, Noise, PassageOrder, PassageSelector, QaExample
from lightning_softprompt.retrieval.result_cache import rankings_for
from lightning_softprompt.retrieval.retriever import Retriever
from lightning_softprompt.retrieval.search.settings import IndexSettings

log = logging.getLogger(__name__)


@final
class RagQaDataModule(SoftPromptDataModule):
    r"""Questions, each with passages that a retriever finds for it, and their answers: a text, or one of some choices.

    Passages are found once for each split and kept on disk. As many are shown as fit into max_tokens, whole, the best
    first; only one that is left alone is cut. Questions and answers never are. Text that stands before the first soft
    token, as passages do in the template below, is read by the backbone once and serves all epochs.

        softprompt fit --model Spring --data RagQaDataModule --data.path QUESTIONS --data.corpus QUESTIONS \
            --data.retriever Retriever --data.retriever.index indexes/mine

    Args:
        template: How a row is written; `{passages}` is the place of the passages.
        passage: How one passage is written: `{text}`, and as wanted `{number}`, `{title}`, `{heading}` (the title with
            a colon, or nothing) and `{document}`. `{soft}` in it is a slot at each of the passages that may be shown;
            where a row shows fewer, the slots that are left stand behind its last one. The method must have as many
            soft blocks: `--model PromptTuning --model.length "[4, 4, 4]"` for three passages.
        retriever: What finds passages, and in which index; not wanted where none are shown.
        corpus: Source of the documents. The index is built from it if it is not there, and must hold it if it is; None
            takes the index as it is.
        index_settings: What the index is built with.
        corpus_columns: The columns of the corpus; unless given, `text`, `id`, `title` and `source`.
        mode: What is shown: passages that were found, those of the gold documents, any, or none.
        passages: How many passages are shown at most.
        found: How many are found for a question; retrieval is scored by all of them.
        order: Passages with the best first, the best last, or shuffled in training and the best first elsewhere.
        gold_at: Place of the first gold passage among those shown, from 0, or from -1 backwards; None leaves it.
        noise: What makes training rows harder.
        question: The column that holds the question.
        answers: The column that holds the answer, or a list of right ones, of which none means that there is none; also
            in SQuAD's form, `{"text": [..], "answer_start": [..]}`.
        gold: The column that holds the ids of documents with the answer, where rows have it.
        choices: The answers there are, in order, each with the word that stands for it, or a list of names that stand
            for themselves: they are scored, not generated. None has answers generated.
        abstain: What is to be said where there is no answer.
        target: Whether training says the first of the right answers, or any of them, drawn anew in each epoch.
        cite: Whether answers are to name the passages that they rest on by number, as in `Paris [2]`: training says
            those of the gold documents, and answers are scored without, which is told by `cite_precision` and
            `cite_recall`.
        long_answers: Whether answers are of sentences, and so scored by ROUGE-L too.
        rouge_words: `ascii` compares a-z and digits by ROUGE, as published numbers do; `unicode` the words of every
            script.
        max_target_tokens: Tokens of max_tokens set aside for a generated answer: longer ones are cut.
        decoding: How answers are generated; None takes the likeliest tokens.
        common: Arguments of every data module.

    Raises:
        ValueError: If the arguments do not fit each other.
    """

    def __init__(
        self,
        template: str = "{passages}{soft}Question: {question}\nAnswer: {target}",
        passage: str = "[{number}] {heading}{text}\n",
        retriever: Retriever | None = None,
        corpus: str | None = None,
        index_settings: IndexSettings | None = None,
        mode: Mode = "retrieved",
        passages: int = 5,
        found: int = 20,
        order: PassageOrder = "score",
        gold_at: int | None = None,
        noise: Noise | None = None,
        question: str = "question",
        answers: str = "answers",
        gold: str = "positive_ids",
        choices: GivenLabels | None = None,
        abstain: str | None = None,
        target: Literal["first", "any"] = "first",
        cite: bool = False,
        long_answers: bool = False,
        max_target_tokens: int = 32,
        decoding: Decoding | None = None,
        rouge_words: RougeWords = "ascii",
        corpus_columns: Columns | None = None,
        **common: Any,
    ) -> None:
        self.passage, named = PassageTemplate(passage), PASSAGES in Template(template).columns
        self.holding = list(self.passage.columns(passages)) if named else []
        opened = self.passage.opened(template, passages)
        super().__init__(template=opened, truncate=self.holding, cut="end", **common)
        self.showing = PassageSelector(retriever, mode, passages, order, gold_at, noise or Noise(), self.seed)
        self.retriever, self.corpus, self.index_settings = retriever, corpus, index_settings
        self.corpus_columns = corpus_columns
        self.found, self.question, self.answers, self.gold = found, question, answers, gold
        self.abstain, self.long_answers, self.cite = abstain, long_answers, cite
        self.rouge_words: RougeWords = rouge_words
        self.words = _spoken(choices)
        self.any_answer = target == "any" and self.words is None
        self.append_eos = self.words is None
        self.max_target_tokens = max_target_tokens if self.append_eos else None
        decoding = decoding or Decoding()
        self.decoding = replace(decoding, max_new_tokens=decoding.max_new_tokens or max_target_tokens)
        self._pools: dict[str, tuple[int, ...]] = {}
        self._lost: Counter[str] = Counter()
        self._check()

    def _check(self) -> None:
        if self.question not in self.template.columns:
            raise ValueError(
                f"question must be a column of the template, {list(self.template.columns)}: {self.question!r}"
            )
        if self.showing.mode != "closed_book" and not self.holding:
            raise ValueError(f"template must name {{{PASSAGES}}}, or mode be closed_book: {self.template.text!r}")
        if self.found < self.showing.count:
            raise ValueError(f"found={self.found} is fewer than passages={self.showing.count}; raise it")
        if self.append_eos and not 0 < int(self.max_target_tokens or 0) < self.max_tokens:
            raise ValueError(f"max_target_tokens must lie between 0 and max_tokens={self.max_tokens}")
        if self.words is not None and self.abstain is not None:
            raise ValueError("abstain is for answers that are generated; make it one of the choices instead")
        if self.cite and (self.words is not None or "{number}" not in self.passage.text):
            raise ValueError("cite is for answers that are generated, and wants {number} in passage")
        if self.redraws and self.batch_tokens is not None:
            raise ValueError(
                "batch_tokens wants rows that are as long in every epoch; set batch_size, or leave out noise, "
                "order=shuffled and target=any"
            )

    @property
    def redraws(self) -> bool:
        """Whether training rows are drawn anew in each epoch."""
        return self.showing.varies or self.any_answer

    @property
    def classes(self) -> Classes | None:
        """How the choices are spoken, with the template's spaces before them."""
        if self.words is None:
            return None
        return Classes({name: [self.template.glue + word] for name, word in self.words.items()}, self.template.text)

    @property
    def evaluation(self) -> Evaluation:
        """Exact match, F1 and their like; accuracy of choices."""
        if self.words is not None:
            return ChoiceEvaluation(tuple(self.words))
        return QaEvaluation(self.decoding, self.abstain, self.long_answers, self.cite, self.rouge_words)

    @property
    def needed_columns(self) -> tuple[str, ...]:
        """The columns of the template but for those of passages, which are searched for."""
        return tuple(name for name in self.template.columns if name not in self.holding)

    @cached_property
    def writer(self) -> PassageRenderer:
        """Writes rows with their passages."""
        how = (self.max_tokens, self.append_eos, self.max_target_tokens, self.cite)
        return PassageRenderer(self.codec, self.template, self.passage, self.showing, *how)

    def prepare_data(self) -> None:
        """Builds the index where it is not there; in one process of a machine.

        Raises:
            ValueError: If it is the index of another corpus, or cannot be built.
        """
        if self.corpus is not None and self.retriever is not None and self.showing.mode != "closed_book":
            ensure_index(self.retriever.folder, self.corpus, self.index_settings, self.corpus_columns)

    def _examples(self, name: Split) -> tuple[list[Example], list[Origin]]:
        room = self.writer.max_tokens  # a backbone that cannot answer is told of before any row
        questions = [row.get(self.question) for row in self.rows(name)]
        self._search(questions)
        self._report_searches(name, questions)
        self._lost.clear()
        examples, origins = super()._examples(name)
        self._check_gold(name, examples)
        if self._lost["shown"] + self._lost["dropped"]:
            told = "; ".join(f"{count} {what}" for what, count in self._lost.items())
            log.info("passages of the %d %s rows at max_tokens=%d: %s", len(examples), name, room, told)
        return examples, origins

    def _report_searches(self, name: Split, questions: Sequence[Any]) -> None:
        """Warns if most questions find nothing."""
        pools = [
            self._pools[question] for question in questions if isinstance(question, str) and question in self._pools
        ]
        empty = sum(not pool for pool in pools)
        if self.retriever is not None and 2 * empty > len(pools):
            log.warning(
                "%d of %d %s questions find nothing in %s by %s search: their words are not in it. Check that "
                "questions and documents are in the same language, or search by an encoder",
                empty, len(pools), name, self.retriever.folder, self.retriever.way,
            )  # fmt: skip

    def _check_gold(self, name: Split, examples: Sequence[Example]) -> None:
        """Reports gold documents that the index lacks, in rows whose answers are scored or trained on."""
        if name != "predict" and self.retriever is not None and self.showing.mode != "closed_book":
            check = GoldCheck(self.retriever.index.passages, self.retriever.folder, self.gold)
            for example in examples:
                check.add(example.gold)
            check.report(name)

    def _search(self, questions: Sequence[Any]) -> None:
        """Finds passages for questions that none were found for."""
        new = dict.fromkeys(q for q in questions if isinstance(q, str) and q.strip() and q not in self._pools)
        if self.showing.mode == "retrieved" and self.retriever is not None and new:
            rankings = rankings_for(self.retriever, list(new), self.found)
            self._pools |= {q: tuple(of.rows.tolist()) for q, of in zip(new, rankings, strict=True)}

    def example(self, row: Mapping[str, Any], labelled: bool) -> Example:
        """The question with its passages, and its right answers."""
        asked = self._asked(row, labelled)
        candidates = self.showing.usual(asked)
        written = self.writer.write(asked, candidates)
        self._lost["shown"] += len(written.example.passages)
        self._lost["dropped"] += written.dropped
        self._lost["cut"] += written.cut
        return written.example

    def _asked(self, row: Mapping[str, Any], labelled: bool) -> QaExample:
        question = row.get(self.question)
        if isinstance(question, str) and not question.strip():
            raise ValueError(f"column {self.question!r} is empty")
        fields = self.text(row, dict.fromkeys(self.holding, ""))
        question = fields[self.question]
        self._search([question])
        fields = {"question": question, **fields}  # by that name evaluations ask for it
        searched = self.found if question in self._pools else 0
        pool = self._pools.get(question, ())
        asked = QaExample(fields, "", gold=self._gold(row), question=question, pool=pool, searched=searched)
        asked = replace(asked, found=self.showing.found(asked))
        return self._answered(asked, row) if labelled else self._unanswered(asked)

    def _gold(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        ids = row.get(self.gold)
        if ids is None and self.showing.mode == "gold":
            raise ValueError(
                f"mode=gold wants ids of documents in column {self.gold!r}; the row has {first_columns(row)}"
            )
        if ids is None:
            return ()
        names = read_ids(ids, self.gold)
        return names if self.showing.mode == "closed_book" else self.showing.gold.distinct(names)

    def _unanswered(self, asked: QaExample) -> QaExample:
        """A row to be predicted; where there are choices it takes any, which nothing reads."""
        return asked if self.words is None else replace(asked, target=next(iter(self.words.values())))

    def _answered(self, asked: QaExample, row: Mapping[str, Any]) -> QaExample:
        right = self._right(row)
        if self.words is not None:
            return self._chosen(asked, right)
        if not right and self.abstain is None:
            raise ValueError(
                f"column {self.answers!r} has no answer; set abstain to what is to be said then, or leave such rows "
                f"out with on_bad_row='skip'"
            )
        right = right or (str(self.abstain),)
        return replace(asked, target=right[0], references=right)

    def _right(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        if self.answers not in row:
            raise ValueError(f"no column {self.answers!r}; the row has {first_columns(row)}: set answers to another")
        return read_answers(row[self.answers], self.answers)

    def _chosen(self, asked: QaExample, right: Sequence[str]) -> QaExample:
        assert self.words is not None
        names = list(self.words)
        number = ClassNumbers(names).find_name(right[0]) if len(right) == 1 else None
        if number is None:
            raise ValueError(f"column {self.answers!r} must name one of the choices {names}, got {list(right)}")
        return replace(asked, target=self.words[names[number]], label=number, references=(names[number],))

    def _loader(self, name: Split, order: Order) -> ResumableLoader:
        if order != "shuffled" or not self.redraws:
            return super()._loader(name, order)
        rows = ResampledDataset(self.split(name), self.writer, self.abstain, self.any_answer, self.seed)
        sampler = EpochIndexedSampler(self.sampler(name, order, self.ranks))
        return ResumableLoader(rows, sampler, Collate(self.codec), num_workers=self.num_workers)


def _spoken(choices: GivenLabels | None) -> dict[str, str] | None:
    """The word of each choice.

    Raises:
        ValueError: If there are fewer than two, or one has no word.
    """
    if choices is None:
        return None
    words = words_by_name(choices, "choices")
    if len(words) < 2 or any(len(spoken) != 1 for spoken in words.values()):
        raise ValueError(f"choices must be two or more, each with a word, got {choices}")
    return {name: spoken[0] for name, spoken in words.items()}
