"""Rewards of sampled answers, compared with those before the training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from lightning_softprompt.backbones.generation.answers import answer_texts, are_finished, generate_answers
from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.types import Batch, Example
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.evaluation.metrics.intervals import bootstrap
from lightning_softprompt.evaluation.metrics.text_rows import Numbers, TextRows

COLUMNS = ("reward", "bare_reward", "words", "finished")
OF_BARE = ("bare_reward", "lift", "win_rate")


@final
class RewardEvaluation(Evaluation):
    """The reward of one sampled answer to each question.

    The reward is that of the objective, such as `GRPO`. Logs `reward`, the mean over questions; `words`, the mean
    number of words; and `finished`, the share of answers that end by themselves. A test also samples an answer of the
    backbone without the prompt, from the same random numbers, and logs `bare_reward`; `lift`, the mean difference; and
    `win_rate`, the share of questions whose answer has the higher reward with the prompt, in which equal rewards count
    one half. The 95 % bootstrap intervals over questions of reward, lift and win rate are logged with `_low` and
    `_high`.

    Args:
        decoding: How answers are sampled.
    """

    monitor = ("reward", "max")
    logged = ("reward", "words", "finished", *OF_BARE)

    def __init__(self, decoding: Decoding) -> None:
        super().__init__()
        self.decoding = decoding
        self.answers = TextRows(COLUMNS)

    def predict(self, lm: PromptedLM, batch: Batch) -> list[dict[str, Any]]:
        """Returns one answer to each question."""
        answered = self._generate(lm, batch, prompted=True)
        return [{"prediction": text, "scores": None} for text in answer_texts(lm, answered)]

    def _generate(self, lm: PromptedLM, batch: Batch, prompted: bool) -> Batch:
        """Returns the questions with one answer each, from random numbers that depend on the first row only."""
        with self.decoding.drawing(batch.row_ids[0]):
            return generate_answers(lm, batch, 1, self.decoding, prompted)

    def update(self, lm: PromptedLM, batch: Batch) -> list[dict[str, Any] | None]:
        """Adds a batch to the metrics and returns its records."""
        answered = self._generate(lm, batch, prompted=True)
        texts = answer_texts(lm, answered)
        rewards = lm.answer_scores(answered).tolist()
        finished = are_finished(lm, answered).tolist()
        bare_rewards = [math.nan] * len(batch)
        if self.stage == "test":
            bare_rewards = lm.answer_scores(self._generate(lm, batch, prompted=False)).tolist()
        lines = zip(rewards, bare_rewards, texts, finished, strict=True)
        table = [[reward, bare, len(text.split()), is_finished] for reward, bare, text, is_finished in lines]
        self.answers.update(batch.row_ids, table, [{}] * len(batch))
        records: list[dict[str, Any] | None] = []
        examples = batch.examples or [Example({}, "")] * len(batch)
        for text, reward, example in zip(texts, rewards, examples, strict=True):
            target = example.references[0] if example.references else ""
            records.append({"prediction": text, "scores": None, "target": target, "details": {"reward": reward}})
        return records

    def compute(self) -> dict[str, Tensor]:
        """Returns the metrics."""
        answers = self.answers.compute()
        metrics = summarize_rewards(answers.columns, with_bare=self.stage == "test") if len(answers) else {}
        return {name: torch.tensor(value, device=self.answers.device) for name, value in metrics.items()}

    def reset(self) -> None:
        """Resets the metrics."""
        self.answers.reset()


def summarize_rewards(columns: Mapping[str, Numbers], with_bare: bool) -> dict[str, float]:
    """Returns the metrics of answers.

    Args:
        columns: The columns of all answers by name, each [N].
        with_bare: Whether to compare with the bare backbone, with intervals.
    """
    metrics = {name: float(columns[name].mean()) for name in ("reward", "words", "finished")}
    if not with_bare:
        return metrics
    differences = columns["reward"] - columns["bare_reward"]
    wins = (differences > 0) + 0.5 * (differences == 0)
    metrics["bare_reward"] = float(columns["bare_reward"].mean())
    for name, values in (("reward", columns["reward"]), ("lift", differences), ("win_rate", wins)):
        metrics[name] = float(values.mean())
        metrics[f"{name}_low"], metrics[f"{name}_high"] = bootstrap(values.tolist())
    return metrics
