"""Rows of text that are answered by text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, final

from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.core.types import Example
from lightning_softprompt.data.answer_texts import check_is_no_list
from lightning_softprompt.data.datamodule import SoftPromptDataModule
from lightning_softprompt.data.readers.sources import first_columns
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.evaluation.generation import DEFAULT, GenerationEvaluation
from lightning_softprompt.evaluation.metrics.text import RougeWords


@final
class SummarizationDataModule(SoftPromptDataModule):
    """A document, perhaps with a query, and the text that is to be said of it: a summary, or a table in words.

    The answer is generated. What it is compared with are the target and all further references of its row.

    Args:
        template: How a row is written.
        document: The column that answers are measured against: what of them is new, and how far its first sentences
            would get.
        target: The column that holds the answer.
        references: A column with lists of further right answers, where rows have it.
        defaults: What columns of the template say in rows that lack them, as a query.
        max_target_tokens: Tokens of max_tokens set aside for the answer, whatever its length: longer ones are cut.
        decoding: How answers are generated; None takes the likeliest tokens.
        metrics: What answers are scored by: rouge1 to rouge9, rougeL, bertscore, bleu, chrf, nist.
        lead: Sentences of the document that make the baseline; 0 takes none.
        encoder: The encoder of bertscore.
        rouge_words: `ascii` compares a-z and digits by ROUGE, as published numbers do; `unicode` the words of every
            script.
        generate_every: Validation generates in one of so many epochs; the loss is there in all of them.
        generate_rows: Validation generates for so many rows; None for all.
        generate_minutes: Validation generates no longer than that; None as long as it takes.
        long_documents: Whether `predict` cuts documents that are too long, or sums up their parts, then those together.
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
        **common: Any,
    ) -> None:
        super().__init__(template=template, **common)
        if document not in self.template.columns:
            raise ValueError(f"document must be a column of the template, {list(self.template.columns)}: {document!r}")
        if not 0 < max_target_tokens < self.max_tokens:
            raise ValueError(f"max_target_tokens must lie between 0 and max_tokens={self.max_tokens}")
        if any(count is not None and count <= 0 for count in (generate_every, generate_rows, generate_minutes)):
            raise ValueError(
                f"generate_every, generate_rows and generate_minutes must be above 0, got {generate_every}, "
                f"{generate_rows} and {generate_minutes}"
            )
        self.document, self.target, self.references = document, target, references
        self.defaults = dict(defaults or {})
        self.max_target_tokens = max_target_tokens
        decoding = decoding or Decoding()
        self.decoding = replace(decoding, max_new_tokens=decoding.max_new_tokens or max_target_tokens)
        self._scored = {"metrics": metrics, "lead": lead, "encoder": encoder, "rouge_words": rouge_words}
        self._generated = {"every": generate_every, "sample": generate_rows, "minutes": generate_minutes}
        self.long_documents = long_documents

    @property
    def evaluation(self) -> Evaluation:
        """ROUGE and its like."""
        how: dict[str, Any] = {**self._scored, **self._generated, "long_documents": self.long_documents}
        room = self.max_tokens - (self.max_target_tokens or 0)
        return GenerationEvaluation(self.decoding, self.document, template=self.template, max_tokens=room, **how)

    @property
    def needed_columns(self) -> tuple[str, ...]:
        """The columns of the template but for those that have defaults."""
        return tuple(name for name in self.template.columns if name not in self.defaults)

    def example(self, row: Mapping[str, Any], labelled: bool) -> Example:
        """The row's text and its right answers."""
        fields = self.text({**self.defaults, **{name: value for name, value in row.items() if value is not None}})
        if not fields[self.document].strip():
            raise ValueError(f"column {self.document!r} is empty")
        if not labelled:
            return Example(fields, "")
        target = self._answer(row)
        return Example(fields, target, references=tuple(dict.fromkeys((target, *self._references(row)))))

    def _answer(self, row: Mapping[str, Any]) -> str:
        if self.target not in row:
            raise ValueError(f"no column {self.target!r}; the row has {first_columns(row)}: set target to another")
        answer = row[self.target]
        if not isinstance(answer, str) or not answer.strip():
            raise ValueError(f"column {self.target!r} must be text that is not empty, got {answer!r}")
        check_is_no_list(answer, self.target)
        return answer.strip()

    def _references(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        said = row.get(self.references) if self.references else None
        if said is None:
            return ()
        if not isinstance(said, list | tuple) or not all(isinstance(text, str) for text in said):
            raise ValueError(f"column {self.references!r} must be a list of texts, got {said!r}")
        return tuple(text for text in said if text.strip())
