"""Metrics of generated text: summaries, text from tables."""

from __future__ import annotations

import time
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from torch import Tensor

from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.backbones.requirements import Requirement, generates
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import Batch, Example
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.evaluation.map_reduce import MapReduce
from lightning_softprompt.evaluation.metrics.sentences import lead
from lightning_softprompt.evaluation.metrics.text import RougeWords
from lightning_softprompt.evaluation.metrics.text_rows import Numbers, TextRows
from lightning_softprompt.evaluation.metrics.text_scorer import Measures, TextScoring, references_of, source_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEFAULT = ("rouge1", "rouge2", "rougeL", "bleu", "chrf")
LEAD = "lead/"
Records = list[dict[str, Any]]


@final
class GenerationEvaluation(Evaluation):
    """Metrics of generated text.

    Logs the metrics that are asked for; `generated`, how many rows were; `length_ratio`, words of the answers by words
    of the references; `empty`, the share of empty answers; `repetition`; with a source column also `novel_bigrams`,
    `compression` (words of the sources by words of the answers), and `lead/<metric>`, all of it for the first sentences
    of the sources. In a test, `<metric>_low` and `<metric>_high` are the ends of 95 % intervals over rows. A validation
    in which nothing is generated logs `generated` alone.

    Args:
        decoding: How answers are generated; None takes the default, greedy.
        source: The column that answers are made from: what novelty, compression and the lead are measured by.
        metrics: By name: rouge1 to rouge9, rougeL, bertscore, bleu, chrf, nist.
        lead: Sentences of the source that make the lead, the baseline of summaries of news; 0 for none.
        every: Validations generate in the first epoch, and in each so many epochs after it.
        sample: Validations generate for so many rows, the first of those that are scored; None for all, as in tests and
            predictions.
        minutes: What generating may take in a validation, in each process; rows that are then left, of which the
            longest came first, are left out. None for as long as it takes.
        stem: Whether ROUGE compares Porter's stems, as published numbers mostly do.
        encoder: The encoder of BERTScore.
        rouge_words: `ascii` compares a-z and digits by ROUGE, as published numbers do; `unicode` the words of every
            script.
        long_documents: Whether predictions read a source that does not fit as far as it does, or `map_reduce` it:
            summarise its parts, then the summaries.
        template: How a row is written; map_reduce wants it.
        max_tokens: Most tokens of a row without the soft ones; map_reduce keeps to it.

    Raises:
        ValueError: If a metric is unknown, a number is too small, or map_reduce lacks what it wants.
    """

    def __init__(
        self,
        decoding: Decoding | None = None,
        source: str | None = None,
        metrics: Sequence[str] = DEFAULT,
        lead: int = 1,
        every: int = 1,
        sample: int | None = None,
        minutes: float | None = None,
        stem: bool = True,
        encoder: str = "all-minilm-l6-v2",
        rouge_words: RougeWords = "ascii",
        long_documents: Literal["cut", "map_reduce"] = "cut",
        template: Template | None = None,
        max_tokens: int = 512,
    ) -> None:
        super().__init__()
        if lead < 0 or every < 1 or (sample is not None and sample < 1) or (minutes is not None and minutes <= 0):
            raise ValueError(
                f"wanted lead >= 0, every >= 1, sample >= 1 and minutes > 0, got {lead}, {every}, {sample}, {minutes}"
            )
        if long_documents == "map_reduce" and (template is None or source is None):
            raise ValueError("long_documents=map_reduce wants to know source and template; give both, or set it to cut")
        self.decoding, self.source, self.lead = decoding or Decoding(), source, 0 if source is None else lead
        self.every, self.sample, self.minutes = every, sample, minutes
        self.long_documents, self.template, self.max_tokens = long_documents, template, max_tokens
        self.scoring = TextScoring(metrics, source, stem, encoder, rouge_words)
        self.ranks = next(iter([*self.scoring.rouges, *self.scoring.near]), None)
        means = ("length_ratio", "empty", *([] if source is None else ["compression"]))
        answers = (*self.scoring.scores, *self.scoring.of_splits, *means)
        self.logged = ("generated", *answers, *(f"{LEAD}{name}" for name in answers if self.lead))
        self.rows, self.leads = TextRows(self.scoring.columns), TextRows(self.scoring.columns)
        self._measured: dict[tuple[str, ...], Measures] = {}  # of leads, which are the same in each epoch
        self.stage, self.generates, self.spent = "test", True, 0.0
        self.sampled: Container[int] | None = None if sample is None else range(sample)  # rows that validations answer

    @property
    def requires(self) -> tuple[Requirement, ...]:
        """A backbone that generates."""
        return (generates(self.decoding.num_beams),)

    def begin(self, stage: str, epoch: int) -> None:
        """A pass begins; only validations leave rows out."""
        self.reset()
        self.stage, self.spent = stage, 0.0
        self.generates = stage != "val" or epoch % self.every == 0

    def narrow(self, drawn: Sequence[Sequence[int]] | None) -> None:
        """A pass scores some rows alone; the sample is of these."""
        if self.sample is not None:
            self.sampled = range(self.sample) if drawn is None else frozenset(drawn[0][: self.sample])

    def reset(self) -> None:
        """Forgets the pass."""
        self.rows.reset()
        self.leads.reset()

    @torch.no_grad()
    def predict(self, lm: PromptedLM, batch: Batch) -> Records:
        """The answers."""
        with self.decoding.drawing(batch.row_ids[0]):
            said = self._said(lm, batch) if self.long_documents == "cut" else self._whole(lm, batch)
        return [{"prediction": text, "scores": None} for text in said]

    def _said(self, lm: PromptedLM, batch: Batch) -> list[str]:
        ids = lm.generate(batch, **self.decoding.options)
        return self.decoding.texts(lm.backbone.codec, ids)

    def _whole(self, lm: PromptedLM, batch: Batch) -> list[str]:
        """Answers for which all of the source was read."""
        assert self.template is not None
        assert self.source is not None
        reduce = MapReduce(lm.backbone.codec, self.template, self.source, self.max_tokens, self.decoding)
        fits = [b for b, example in enumerate(examples_of(batch)) if reduce.fits(example.fields)]
        said = dict(zip(fits, self._said(lm, chosen(batch, fits)) if fits else [], strict=True))
        return [said[b] if b in said else reduce(lm, batch, b) for b in range(len(batch))]

    @torch.no_grad()
    def update(self, lm: PromptedLM, batch: Batch) -> list[dict[str, Any] | None]:
        """Generates and scores answers. Rows that a validation leaves out have no records."""
        records: list[dict[str, Any] | None] = [None] * len(batch)
        if places := self._wanted(batch):
            for b, record in zip(places, self._scored(lm, chosen(batch, places)), strict=True):
                records[b] = record
        return records

    def _wanted(self, batch: Batch) -> list[int]:
        """The places of the rows that are not left out."""
        if self.stage != "val":
            return list(range(len(batch)))
        if not self.generates or (self.minutes is not None and self.spent >= 60 * self.minutes):
            return []
        return [b for b, row in enumerate(batch.row_ids) if self.sampled is None or row in self.sampled]

    def _scored(self, lm: PromptedLM, batch: Batch) -> Records:
        examples, device = examples_of(batch), lm.backbone.word_embeddings.device
        start = time.monotonic()
        with self.decoding.drawing(batch.row_ids[0]):
            said = self._said(lm, batch)
        self.spent += time.monotonic() - start
        measures = self.scoring.measures(said, examples, device)
        self._add(self.rows, batch, said, measures)
        if self.lead:
            leads = [lead(source_of(example, str(self.source)), self.lead) for example in examples]
            self._add(self.leads, batch, leads, self._of_leads(leads, examples, device))
        scores = [{name: of[name] for name in self.scoring.scores} for of in measures]
        targets = [references_of(example)[0] for example in examples]
        told = zip(said, targets, scores, strict=True)
        return [{"prediction": text, "target": target, "scores": of} for text, target, of in told]

    @staticmethod
    def _add(rows: TextRows, batch: Batch, texts: Sequence[str], measures: Sequence[Measures]) -> None:
        right = [references_of(example) for example in examples_of(batch)]
        kept = [{"said": text, "right": of} for text, of in zip(texts, right, strict=True)]
        rows.update(batch.row_ids, [list(of.values()) for of in measures], kept)

    def _of_leads(self, leads: Sequence[str], examples: Sequence[Example], device: torch.device) -> list[Measures]:
        keys = [
            (text, source_of(example, str(self.source)), *references_of(example))
            for text, example in zip(leads, examples, strict=True)
        ]
        if new := [b for b, key in enumerate(keys) if key not in self._measured]:
            found = self.scoring.measures([leads[b] for b in new], [examples[b] for b in new], device)
            self._measured |= {keys[b]: of for b, of in zip(new, found, strict=True)}
        return [self._measured[key] for key in keys]

    def compute(self) -> dict[str, Tensor]:
        """The metrics of the pass."""
        rows, leads = self.rows.compute(), self.leads.compute()
        metrics: Measures = {"generated": len(rows)}
        metrics |= self.scoring.summary(rows) if len(rows) else {}
        metrics |= self.scoring.intervals(rows) if len(rows) and self.stage == "test" else {}
        of_leads = self.scoring.summary(leads) if len(leads) else {}
        metrics |= {f"{LEAD}{name}": value for name, value in of_leads.items()}
        return {name: torch.tensor(float(value), device=self.rows.device) for name, value in metrics.items()}

    def figures(self) -> dict[str, Figure]:
        """How ROUGE spreads over the rows, and how it goes with the length of the source."""
        from lightning_softprompt.evaluation.figures import histogram_figure, length_figure

        rows, leads = self.rows.compute(), self.leads.compute()
        shown: dict[str, Numbers] = {name: rows.columns[name] for name in ("rouge1", "rougeL") if name in rows.columns}
        if not len(rows) or not shown:
            return {}
        means: Measures = {name: float(leads.columns[name].mean()) for name in shown} if len(leads) else {}
        drawn = {"rouge": histogram_figure(shown, means, f"lead-{self.lead}")}
        if self.source is not None:
            name, values = list(shown.items())[-1]
            drawn[f"{name}_by_length"] = length_figure(rows.columns["source_words"], values, name)
        return drawn


def examples_of(batch: Batch) -> tuple[Example, ...]:
    """The rows as text.

    Raises:
        ValueError: If the batch was made without them.
    """
    if batch.examples is None:
        raise ValueError("answers are compared with the rows' texts, but the batch has none; collate it with examples")
    return batch.examples


def chosen(batch: Batch, places: Sequence[int]) -> Batch:
    """Rows of a batch: itself where it is all of them, since its prompt is known."""
    return batch if len(places) == len(batch) else batch.only(places)
