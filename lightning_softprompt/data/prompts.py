"""Questions without answers, for training with a reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.checkpoints.frozen_role import BARE
from lightning_softprompt.constraints.example import ConstrainedExample
from lightning_softprompt.core.types import Example
from lightning_softprompt.data.answer_texts import read_row_constraints
from lightning_softprompt.data.datamodule import SoftPromptDataModule
from lightning_softprompt.data.readers.sources import first_columns
from lightning_softprompt.evaluation.base import Evaluation
from lightning_softprompt.evaluation.policy.reward_evaluation import RewardEvaluation
from lightning_softprompt.rewards.base import Reward


@final
class PromptDataModule(SoftPromptDataModule):
    r"""Questions that the prompt answers in training, for objectives such as `GRPO` and `RLOO`.

    Validation and test report the reward of sampled answers.

        softprompt fit --model PromptTuning --model.objective GRPO --model.objective.reward Length \
            --data PromptDataModule --data.path FOLDER

    Args:
        template: Text of a row: `{column}` inserts a column, `{soft}` marks soft tokens, `{target}` marks the answer.
        references: Column with a reference answer, or a list of them, for rewards that compare answers; null for none.
        constraints: Column with the verifiable constraints of a row, for the reward `MeetsConstraints`; null for none.
        max_target_tokens: Tokens of max_tokens reserved for an answer.
        decoding: How validation and test sample answers (default: as in training, from all words at temperature 1).
        reference: What a test compares with: `bare`, the backbone without a prompt; `start`, the prompt of the run
            before its first step, for checkpoints; or the file of a prompt.
        judge: A reward that is not trained on, which validation and test report in addition to that of the objective.
        reference_answers: Number of answers of the reference to each test question. From 2 on, a test also reports the
            reward of the best of 2, 4, ... answers.
        common: Arguments of every data module.

    Raises:
        ValueError: If max_target_tokens is not between 0 and max_tokens, or reference_answers is below 1.
    """

    append_eos = True
    can_augment = False

    def __init__(
        self,
        template: str = "{soft}{prompt}\n\n{target}",
        references: str | None = None,
        constraints: str | None = None,
        max_target_tokens: int = 64,
        decoding: Decoding | None = None,
        reference: str = BARE,
        judge: Reward | None = None,
        reference_answers: int = 1,
        **common: Any,
    ) -> None:
        super().__init__(template=template, **common)
        if reference_answers < 1:
            raise ValueError(f"reference_answers must be at least 1, got {reference_answers}")
        self.reserve_target_tokens(max_target_tokens, decoding or Decoding(do_sample=True))
        self.references, self.constraints = references, constraints
        self.reference, self.judge, self.reference_answers = reference, judge, reference_answers

    @property
    def evaluation(self) -> Evaluation:
        """The reward of sampled answers."""
        assert self.decoding is not None
        return RewardEvaluation(self.decoding, self.reference, self.judge, self.reference_answers)

    @property
    def needed_columns(self) -> tuple[str, ...]:
        """The columns of the template."""
        return self.template.columns

    def example(self, row: Mapping[str, Any], labelled: bool) -> Example:
        """Converts a row to text, with its references and constraints."""
        fields = self.text(row)
        references = self._references(row) if labelled else ()
        if self.constraints is None or not labelled:
            return Example(fields, "", references=references)
        constraints = read_row_constraints(row, self.constraints)
        return ConstrainedExample(fields, "", references=references, constraints=constraints)

    def _references(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        if self.references is None:
            return ()
        if self.references not in row:
            raise ValueError(f"no column {self.references!r}; the row has {first_columns(row)}: set data.references")
        value = row[self.references]
        texts: Sequence[Any] = [value] if isinstance(value, str) else value
        if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"column {self.references!r} must be a text or a list of texts, got {value!r}")
        return tuple(text.strip() for text in texts)
