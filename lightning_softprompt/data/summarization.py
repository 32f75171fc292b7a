"""Summarization and other text generation from a document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

from torchmetrics import Metric

from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.constraints.example import ConstrainedExample
from lightning_softprompt.core.types import Example
from lightning_softprompt.data.answer_texts import check_is_no_list, read_row_constraints
from lightning_softprompt.data.datamodule import SoftPromptDataModule
from lightning_softprompt.data.readers.sources import first_columns
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.evaluation.extended import UserMetrics
from lightning_softprompt.evaluation.generation import DEFAULT, GenerationEvaluation
from lightning_softprompt.evaluation.metrics.text import RougeWords


@final
class SummarizationDataModule(SoftPromptDataModule):
    """Generates a text from a document: a summary, an answer to a query, or a description of a table.

    Predictions are compared with the target and all further references of a row.

    Args:
        template: Text of a row: `{column}` inserts a column, `{soft}` marks soft tokens, `{target}` marks the answer.
        document: Column of the document. It is the source for compression and novelty metrics and the lead baseline.
        target: Column of the reference answer.
        references: Optional column with lists of further reference answers.
        defaults: Values of template columns, such as a query, for rows that lack them.
        max_target_tokens: Tokens of max_tokens reserved for the answer; longer answers are truncated.
        decoding: How answers are generated (default: greedy decoding).
        metrics: Metrics to compute: rouge1 to rouge9, rougeL, bertscore, bleu, chrf, nist.
        lead: Number of first sentences of the document that form the baseline; 0 disables it.
        encoder: Encoder of bertscore.
        rouge_words: Words that ROUGE compares: `ascii` (a-z and digits, as in published results) or `unicode` (words of
            all scripts).
        generate_every: Validation generates answers every N epochs. The loss is computed in every epoch.
        generate_rows: Maximum rows for which validation generates answers; null for all rows.
        generate_minutes: Maximum minutes that a validation spends on generation (default: no limit).
        long_documents: How `predict` treats documents that are too long: truncate them (`cut`), or summarize their
            parts and then the summaries (`map_reduce`).
        extra_metrics: Further metrics: one or several metrics of torchmetrics, which are updated with predicted texts
            and references, such as `[torchmetrics.text.TranslationEditRate]`, or evaluations.
        constraints: Optional column with the verifiable constraints of a row, such as `[{"kind": "no_commas"}]`. Their
            metrics are the shares of constraints and of rows that answers meet. See `softprompt constraints`.
        common: Arguments of every data module.
    """

    append_eos = True

    def __init__(
        self,
        template: str = "{soft}{document}\nSummary: {target}",
        document: str = "document",
        target: str = "summary",
        references: str | None = "references",
        defaults: dict[str, str] | None = None,
        max_target_tokens: int = 64,
        decoding: Decoding | None = None,
        metrics: Sequence[str] = DEFAULT,
        lead: int = 1,
        encoder: str = "all-minilm-l6-v2",
        generate_every: int = 1,
        generate_rows: int | None = 64,
        generate_minutes: float | None = None,
        long_documents: Literal["cut", "map_reduce"] = "cut",
        rouge_words: RougeWords = "ascii",
        extra_metrics: Metric | Evaluation | list[Metric | Evaluation] | None = None,
        constraints: str | None = None,
        **common: Any,
    ) -> None:
        super().__init__(template=template, **common)
        if document not in self.template.columns:
            raise ValueError(
                f"document must be a column of the template {list(self.template.columns)}, got {document!r}"
            )
        self.reserve_target_tokens(max_target_tokens, decoding or Decoding())
        limits = (generate_every, generate_rows, generate_minutes)
        if any(limit is not None and limit <= 0 for limit in limits):
            raise ValueError(
                f"generate_every, generate_rows and generate_minutes must be above 0, got {generate_every}, "
                f"{generate_rows} and {generate_minutes}"
            )
        self.document, self.target, self.references = document, target, references
        self.defaults = dict(defaults or {})
        self._metric_settings = {"metrics": metrics, "lead": lead, "encoder": encoder, "rouge_words": rouge_words}
        self._generation_limits = {"every": generate_every, "sample": generate_rows, "minutes": generate_minutes}
        self.long_documents = long_documents
        self.user_metrics = UserMetrics.from_option(extra_metrics)
        self.constraints = constraints

    @property
    def evaluation(self) -> Evaluation:
        """ROUGE and other metrics of generated text."""
        settings: dict[str, Any] = {**self._metric_settings, **self._generation_limits}
        default = GenerationEvaluation(
            self.decoding,
            self.document,
            template=self.template,
            max_tokens=self.max_tokens - (self.max_target_tokens or 0),
            long_documents=self.long_documents,
            extra_metrics=self.user_metrics.metrics,
            constraints=self.constraints is not None,
            **settings,
        )
        return self.user_metrics.extend(default)

    @property
    def needed_columns(self) -> tuple[str, ...]:
        """The columns of the template that have no default."""
        return tuple(name for name in self.template.columns if name not in self.defaults)

    def example(self, row: Mapping[str, Any], labelled: bool) -> Example:
        """Converts a row to text, with its reference answers."""
        present = {name: value for name, value in row.items() if value is not None}
        fields = self.text({**self.defaults, **present})
        if not fields[self.document].strip():
            raise ValueError(f"column {self.document!r} is empty")
        if not labelled:
            return Example(fields, "")
        target = self._answer(row)
        references = tuple(dict.fromkeys((target, *self._references(row))))
        if self.constraints is None:
            return Example(fields, target, references=references)
        constraints = read_row_constraints(row, self.constraints)
        return ConstrainedExample(fields, target, references=references, constraints=constraints)

    def _answer(self, row: Mapping[str, Any]) -> str:
        if self.target not in row:
            raise ValueError(f"no column {self.target!r}; the row has {first_columns(row)}: set data.target")
        answer = row[self.target]
        if not isinstance(answer, str) or not answer.strip():
            raise ValueError(f"column {self.target!r} must be non-empty text, got {answer!r}")
        check_is_no_list(answer, self.target)
        return answer.strip()

    def _references(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        references = row.get(self.references) if self.references else None
        if references is None:
            return ()
        if not isinstance(references, list | tuple) or not all(isinstance(text, str) for text in references):
            raise ValueError(f"column {self.references!r} must be a list of texts, got {references!r}")
        return tuple(text for text in references if text.strip())
