"""A reward for answers that meet verifiable constraints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from torch import Tensor

from lightning_softprompt.backbones.generation.answers import answer_texts
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.constraints.base import Constraint, read_constraints
from lightning_softprompt.constraints.example import ConstrainedExample
from lightning_softprompt.core.types import Batch, Example
from lightning_softprompt.rewards.base import Reward, examples_of


@final
@dataclass(frozen=True)
class MeetsConstraints(Reward):
    """The share of constraints that an answer meets.

    Args:
        constraints: Constraints of all answers, such as `[{kind: lower_case}]`; empty for those of each row, see
            `constraints` of the data module.
        is_loose: Whether an answer may meet a constraint without its first line, its last line, or its markup.

    Raises:
        ValueError: If a constraint is not valid.
    """

    constraints: Sequence[Mapping[str, Any]] = field(default_factory=list)
    is_loose: bool = False

    def __post_init__(self) -> None:
        if self.constraints:
            read_constraints(self.constraints)

    def __call__(self, lm: PromptedLM, batch: Batch) -> Tensor:
        """Computes the rewards [B].

        Raises:
            ValueError: If there are no constraints, neither here nor in the rows.
        """
        shared = read_constraints(self.constraints) if self.constraints else ()
        shares = []
        for text, example in zip(answer_texts(lm, batch), examples_of(batch), strict=True):
            constraints = shared or constraints_of(example)
            met = [constraint.passes(text, self.is_loose) for constraint in constraints]
            shares.append(sum(met) / len(met))
        return self.tensor(shares, batch)


def constraints_of(example: Example) -> Sequence[Constraint]:
    """Returns the constraints of a row.

    Raises:
        ValueError: If it has none.
    """
    constraints = example.constraints if isinstance(example, ConstrainedExample) else ()
    if not constraints:
        raise ValueError("MeetsConstraints has no constraints; set them, or a column of constraints in the data")
    return constraints
