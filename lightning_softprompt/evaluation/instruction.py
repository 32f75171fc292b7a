"""Metrics of instruction tuning: the likelihood of reference answers, and the quality of generated answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.backbones.requirements import Requirement
from lightning_softprompt.core.types import IGNORE, Batch
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.evaluation.generation import GenerationEvaluation
from lightning_softprompt.evaluation.likelihood import PER_TOKEN, exponential
from lightning_softprompt.evaluation.metrics.intervals import bootstrap_ratio
from lightning_softprompt.evaluation.metrics.text import RougeWords
from lightning_softprompt.evaluation.metrics.text_rows import TextRows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = ("nats", "tokens")


@final
class InstructionEvaluation(Evaluation):
    """Likelihood of the reference answers, and metrics of generated answers.

    Logs `cross_entropy`, in nats per token of all answers that have a loss, and `perplexity`; with the metrics of
    `GenerationEvaluation`, and `finished`, the fraction of generated answers that end within the maximum of tokens. In
    a dialogue, the last answer is generated. A test also logs 95% confidence intervals over rows as `<metric>_low` and
    `<metric>_high`, and the number of `tokens`.

    Args:
        decoding: How answers are generated.
        metrics: Metrics of generated answers.
        rouge_words: Words that ROUGE compares.
        every: Validation generates answers every N epochs.
        sample: Maximum rows for which validation generates answers; None for all.
        minutes: Maximum minutes that a validation spends on generation; None for no limit.
        extra_metrics: Further metrics of torchmetrics of generated answers.
        constraints: Whether rows have verifiable constraints, see `GenerationEvaluation`.
    """

    def __init__(
        self,
        decoding: Decoding | None = None,
        metrics: Sequence[str] = ("rougeL",),
        rouge_words: RougeWords = "ascii",
        every: int = 1,
        sample: int | None = None,
        minutes: float | None = None,
        extra_metrics: Sequence[Metric] = (),
        constraints: bool = False,
    ) -> None:
        super().__init__()
        self.generation = GenerationEvaluation(
            decoding,
            metrics=metrics,
            rouge_words=rouge_words,
            every=every,
            sample=sample,
            minutes=minutes,
            extra_metrics=extra_metrics,
            counts_finished=True,
            constraints=constraints,
        )
        self.answers = TextRows(COLUMNS)
        self.ranking_score = self.generation.ranking_score
        self.logged = (*PER_TOKEN, *(self.generation.logged or ()))

    @property
    def requires(self) -> tuple[Requirement, ...]:
        """A backbone that can generate text."""
        return self.generation.requires

    def begin(self, stage: str, epoch: int) -> None:
        """Starts an evaluation."""
        self.stage = stage
        self.answers.reset()
        self.generation.begin(stage, epoch)

    def limit_rows(self, rows: Sequence[Sequence[int]] | None) -> None:
        """Announces which rows will be scored."""
        self.generation.limit_rows(rows)

    def reset(self) -> None:
        """Resets the metrics."""
        self.answers.reset()
        self.generation.reset()

    def predict(self, lm: PromptedLM, batch: Batch) -> list[dict[str, Any]]:
        """Generates answers."""
        return self.generation.predict(lm, batch)

    @torch.no_grad()
    def update(self, lm: PromptedLM, batch: Batch) -> list[dict[str, Any] | None]:
        """Adds a batch to the metrics and returns its records, whose scores include the loss of the answers."""
        nats = lm.cross_entropy(batch).double().sum(1).tolist()
        tokens = (batch.targets != IGNORE).sum(1).tolist()
        self.answers.update(batch.row_ids, list(zip(nats, tokens, strict=True)), [{}] * len(batch))
        records = self.generation.update(lm, batch)
        for record, row_nats, count in zip(records, nats, tokens, strict=True):
            if record is not None:
                record["scores"] = {**record["scores"], PER_TOKEN[0]: row_nats / count}
                record["details"] = {"nats": row_nats, "tokens": count}
        return records

    def compute(self) -> dict[str, Tensor]:
        """Returns the metrics."""
        columns = self.answers.compute().columns
        nats, tokens = columns["nats"], columns["tokens"]
        metrics: dict[str, float] = {}
        if len(nats):
            mean = float(nats.sum() / tokens.sum())
            metrics = {"cross_entropy": mean, "perplexity": exponential(mean)}
        if len(nats) and self.stage == "test":
            low, high = bootstrap_ratio(nats.tolist(), tokens.tolist())
            metrics |= {"cross_entropy_low": low, "cross_entropy_high": high, "tokens": float(tokens.sum())}
        results = {name: torch.tensor(value, device=self.answers.device) for name, value in metrics.items()}
        return results | self.generation.compute()

    def mode_of(self, name: str) -> Literal["min", "max"]:
        """Returns whether lower or higher values of a metric are better."""
        return "min" if name in PER_TOKEN else self.generation.mode_of(name)

    def figures(self) -> dict[str, Figure]:
        """Returns the plots of the generated answers."""
        return self.generation.figures()
