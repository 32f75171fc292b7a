"""Rewards of sampled answers, compared with those of a reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from torch import Tensor

from lightning_softprompt.backbones.generation.answers import (
    answer_lengths,
    answer_texts,
    are_finished,
    generate_answers,
)
from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.checkpoints.frozen_role import BARE, FrozenRole, load_role
from lightning_softprompt.core.types import IGNORE, Batch, Example
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.evaluation.metrics.text import repetition
from lightning_softprompt.evaluation.metrics.text_rows import GatheredRows, TextRows
from lightning_softprompt.evaluation.policy.answer_metrics import compare_answers, summarize_answers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = (
    "reward", "judge", "words", "tokens", "finished", "repetition", "question_words", "logprob", "kl", "kl_k3",
    "reference_reward", "reference_judge", "reference_words", "reference_finished",
)  # fmt: skip
OF_ANSWERS = ("reward", "judge", "words", "tokens", "finished", "repetition")
OF_TEST = (
    "reference_reward", "reference_judge", "reference_words", "reference_finished", "lift", "win_rate", "judge_lift",
    "judge_win_rate", "kl", "kl_k3", "kl_per_token", "entropy",
)  # fmt: skip
LOWER = ("repetition", "kl", "kl_k3", "kl_per_token")
Judge = Callable[[PromptedLM, Batch], Tensor]


@final
class RewardEvaluation(Evaluation):
    """The reward of one sampled answer to each question.

    The reward is that of the objective, such as `GRPO`. Logs `reward`, the mean over questions, and `reward_<part>` of
    each part of a sum; `judge`, the mean of a second reward; `words`, `tokens` and `repetition` of answers; and
    `finished`, the share of answers that end by themselves.

    A test compares with a reference, which answers the same questions from the same random numbers:
    `reference_reward`; `lift`, the mean difference; `win_rate`, the share of questions whose answer has the higher
    reward than that of the reference, in which equal rewards count one half; `judge_lift` and `judge_win_rate`, the
    same for the judge; and `best_of_<n>`, the mean reward of the best of n answers of the reference. Intervals, with
    `_low` and `_high`, are 95 % bootstrap intervals over questions.

    If answers are sampled from all tokens at temperature 1, a test also logs the divergence from the reference: `kl`
    and `kl_k3`, two estimates per answer without bias, of which the first can be negative; `kl_per_token`; and
    `entropy`, the mean of -log p of the sampled tokens, an estimate of the entropy per token.

    Args:
        decoding: How answers are sampled.
        reference: `bare`, the backbone without a prompt; `start`, the prompt of the run before its first step; or the
            file of a prompt.
        judge: A reward that is not trained on.
        reference_answers: Number of answers of the reference to each question, for `best_of_<n>`.
    """

    monitor = ("reward", "max")
    logged = (*OF_ANSWERS, *OF_TEST)

    def __init__(
        self, decoding: Decoding, reference: str = BARE, judge: Judge | None = None, reference_answers: int = 1
    ) -> None:
        super().__init__()
        self.decoding, self.reference = decoding, reference
        self.judge, self.reference_answers = judge, reference_answers
        self.answers = TextRows(COLUMNS)
        self._role: FrozenRole | None = None

    def predict(self, lm: PromptedLM, batch: Batch) -> list[dict[str, Any]]:
        """Returns one answer to each question."""
        return [{"prediction": text, "scores": None} for text in answer_texts(lm, self._generate(lm, batch, 1))]

    def _generate(self, lm: PromptedLM, batch: Batch, count: int) -> Batch:
        """Returns the questions with their answers, from random numbers that depend on the first row only."""
        with self.decoding.drawing(batch.row_ids[0]):
            return generate_answers(lm, batch, count, self.decoding)

    def update(self, lm: PromptedLM, batch: Batch) -> list[dict[str, Any] | None]:
        """Adds a batch to the metrics and returns its records."""
        answered = self._generate(lm, batch, 1)
        texts = answer_texts(lm, answered)
        rewards, parts = lm.explain_scores(answered)
        values = {
            "reward": rewards,
            "judge": self._judge_answers(lm, answered),
            "tokens": answer_lengths(answered),
            "finished": are_finished(lm, answered),
        }
        columns: dict[str, list[Any]] = {name: column.tolist() for name, column in values.items()}
        columns["words"] = [len(text.split()) for text in texts]
        columns["repetition"] = [repetition(text) for text in texts]
        columns["question_words"] = [_count_words(example) for example in _examples(batch)]
        details = [{"parts": of_row} for of_row in _rows_of(parts, len(batch))]
        if self.stage == "test":
            compared, samples = self._compare(lm, batch, answered)
            columns |= compared
            details = [{**row, "samples": of_row} for row, of_row in zip(details, samples, strict=True)]
        unknown = [math.nan] * len(batch)
        table = list(zip(*(columns.get(name, unknown) for name in COLUMNS), strict=True))
        self.answers.update(batch.row_ids, table, details)
        return self._records(batch, texts, columns, details)

    def _judge_answers(self, lm: PromptedLM, answered: Batch) -> Tensor:
        if self.judge is None:
            return torch.full((len(answered),), torch.nan)
        return self.judge(lm, answered).float()

    def _compare(self, lm: PromptedLM, batch: Batch, answered: Batch) -> tuple[dict[str, list[float]], list[Any]]:
        """Returns columns of the reference's answers, and rewards and judgements of all of them for each question."""
        if self._role is None:
            self._role = load_role(self.reference, lm.backbone)
        columns: dict[str, list[float]] = {}
        # before the context, in which the method of the run may have the values of its start
        logprobs = lm.logprobs(answered) if self._measures_divergence else None
        with self._role.on(lm) as (frozen, _):
            sampled = self._generate(frozen, batch, self.reference_answers)
            if logprobs is not None:
                columns = measure_divergence(logprobs, frozen.logprobs(answered), answered)
        values = torch.stack([lm.answer_scores(sampled).cpu(), self._judge_answers(lm, sampled).cpu()], -1)
        samples = values.unflatten(0, (len(batch), self.reference_answers)).tolist()
        texts = answer_texts(lm, sampled)[:: self.reference_answers]
        columns["reference_reward"] = [of_question[0][0] for of_question in samples]
        columns["reference_judge"] = [of_question[0][1] for of_question in samples]
        columns["reference_words"] = [len(text.split()) for text in texts]
        columns["reference_finished"] = are_finished(lm, sampled)[:: self.reference_answers].tolist()
        return columns, samples

    @property
    def _measures_divergence(self) -> bool:
        """Whether answers are samples of the distribution of the policy, without changes by decoding."""
        default = Decoding(do_sample=True, max_new_tokens=self.decoding.max_new_tokens, seed=self.decoding.seed)
        return self.decoding == default

    def _records(
        self, batch: Batch, texts: Sequence[str], columns: Mapping[str, Sequence[Any]], details: Sequence[Any]
    ) -> list[dict[str, Any] | None]:
        records: list[dict[str, Any] | None] = []
        shown = ["reward", *(["judge"] if self.judge is not None else [])]
        if self.stage == "test":
            shown += [f"reference_{name}" for name in shown]
        for number, (text, example) in enumerate(zip(texts, _examples(batch), strict=True)):
            target = example.references[0] if example.references else ""
            of_row = {name: columns[name][number] for name in shown}
            of_parts = {f"reward_{name}": value for name, value in details[number]["parts"].items()}
            tokens = {"tokens": columns["tokens"][number], "finished": bool(columns["finished"][number])}
            details_of_row = {**of_row, **of_parts, **tokens}
            records.append({"prediction": text, "scores": None, "target": target, "details": details_of_row})
        return records

    def compute(self) -> dict[str, Tensor]:
        """Returns the metrics."""
        answers = self.answers.compute()
        if not len(answers):
            return {}
        metrics = summarize_answers(answers, OF_ANSWERS)
        if self.stage == "test":
            metrics |= compare_answers(answers)
        return {name: torch.tensor(value, device=self.answers.device) for name, value in metrics.items()}

    def figures(self) -> dict[str, Figure]:
        """Returns plots of a test: rewards of both, win rate by length, and reward over divergence."""
        answers = self.answers.compute()  # in every process, because it gathers rows
        return draw(answers) if self.stage == "test" and len(answers) else {}

    def reset(self) -> None:
        """Resets the metrics."""
        self.answers.reset()

    def mode_of(self, name: str) -> Literal["min", "max"]:
        """Returns whether lower or higher values of a metric are better."""
        return "min" if name in LOWER else super().mode_of(name)


def draw(answers: GatheredRows) -> dict[str, Figure]:
    """Returns the figures of a test. Matplotlib is imported when it is needed."""
    from lightning_softprompt.evaluation.policy.figures import answer_figures

    return answer_figures(answers)


def measure_divergence(logprobs: Tensor, reference: Tensor, answered: Batch) -> dict[str, list[float]]:
    """Returns log-probability and two estimates of the divergence of each answer.

    With d = log reference - log policy of a token, the estimates are the sums of -d and of e^d - 1 - d.

    Args:
        logprobs: Log-probabilities [B, U] of the answers under the policy.
        reference: The same under the reference.
        answered: The answers.
    """
    mask = answered.targets != IGNORE
    difference = (reference - logprobs).double().where(mask, 0)
    return {
        "logprob": logprobs.where(mask, 0).sum(1).tolist(),
        "kl": (-difference).sum(1).tolist(),
        "kl_k3": (torch.expm1(difference) - difference).sum(1).tolist(),
    }


def _examples(batch: Batch) -> Sequence[Example]:
    return batch.examples or [Example({}, "")] * len(batch)


def _count_words(example: Example) -> int:
    return sum(len(text.split()) for text in example.fields.values())


def _rows_of(parts: Mapping[str, Tensor], count: int) -> list[dict[str, float]]:
    """Returns the parts of each row.

    >>> _rows_of({"length": torch.tensor([0.5, 1.0])}, 2)
    [{'length': 0.5}, {'length': 1.0}]
    """
    lists = {name: values.tolist() for name, values in parts.items()}
    return [{name: values[number] for name, values in lists.items()} for number in range(count)]
