"""Mean and standard deviation of all values so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_softprompt.objectives.policy.estimators import Total


@final
@dataclass(frozen=True)
class RunningMoments:
    """Mean and standard deviation of all values that were added (Chan et al. 1979, parallel variance).

    Args:
        count: Number of values.
        mean: Their mean.
        squares: Sum of their squared distances from the mean.
    """

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def std(self) -> float:
        """The standard deviation; 1 if there are fewer than two values, or all are equal."""
        variance = self.squares / self.count if self.count > 1 else 0.0
        return variance**0.5 if variance > 0 else 1.0

    def add(self, values: Tensor, total: Total = torch.clone) -> RunningMoments:
        """Returns the moments with further values.

        Args:
            values: The values [N] of this process.
            total: Sums a tensor over all processes (default: there is only one).
        """
        values = values.double()
        sums = torch.stack([values.sum(), values.new_tensor(float(len(values)))])
        value_sum, added = total(sums).tolist()
        new_mean = value_sum / added
        new_squares = float(total((values - new_mean).square().sum()))
        count = self.count + added
        difference = new_mean - self.mean
        mean = self.mean + difference * added / count
        squares = self.squares + new_squares + difference**2 * self.count * added / count
        return RunningMoments(count, mean, squares)
