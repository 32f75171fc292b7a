"""Scores of answers from a trained linear head."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.types import Batch, Classes
from lightning_softprompt.readouts.base import Readout

FIT_STEPS = 500  # of L-BFGS


@final
class RewardHead(Readout):
    """A linear map of the final state of an answer's last token to its score (Stiennon et al. 2020, arXiv 2009.01325).

    The score is (w h + b - mean) / std. It is used with `RewardModeling` and a decoder-only backbone; the last token of
    an answer is the one that stops generation. Weights begin with variance 1 / (H + 1), the bias with 0 (Huang et al.
    2024, arXiv 2403.17031): with weights of 0, the prompt would have no gradient.

    Args:
        codec: Codec of the backbone.
        classes: No classes, since answers are scored.
        fit_first: Whether to fit the head to the training pairs before the first step, by logistic regression on the
            states of the initial prompt. Prompt and head are then trained further.
        l2: Weight of the squared norm in this regression, for states of unit variance.
        lr: Learning rate of the head; null for that of the prompt.

    Raises:
        ValueError: If there are classes, or an argument is out of range.
    """

    scores_answers = True
    mean: Tensor
    std: Tensor

    def __init__(
        self, codec: Codec, classes: Classes, fit_first: bool = False, l2: float = 0.3, lr: float | None = 0.001
    ) -> None:
        super().__init__(codec, classes)
        if len(classes):
            raise ValueError(
                f"RewardHead scores answers, but the data has the classes {list(classes.names)[:3]}; use "
                "PreferenceDataModule, or another readout"
            )
        if l2 <= 0 or (lr is not None and lr <= 0):
            raise ValueError(f"l2 and lr of RewardHead must be above 0, got {l2} and {lr}")
        self.fit_first, self.l2, self.lr = fit_first, l2, lr

    def build(self, backbone: Backbone) -> None:
        """Creates weights [1, H] and bias, and the normalization of scores.

        Raises:
            ValueError: If the backbone is not a decoder, whose last state attends to the whole answer.
        """
        if not backbone.is_causal:
            raise ValueError(f"RewardHead requires a decoder-only backbone, but {backbone.spec.name} is another model")
        self.linear = nn.Linear(backbone.hidden_size, 1)
        nn.init.normal_(self.linear.weight, std=1 / math.sqrt(backbone.hidden_size + 1))
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def features(self, lm: PromptedLM, batch: Batch) -> Tensor:
        """Returns the final state [B, H] of the last token of each row."""
        positions = torch.arange(batch.mask.shape[1], device=batch.mask.device)
        last = (positions * batch.mask).amax(1, keepdim=True)
        return lm.backbone.states(batch, lm.prompt(batch), last).hidden[:, 0]

    def forward(self, lm: PromptedLM, batch: Batch) -> Tensor:
        """Computes scores [B] in float32."""
        states = self.features(lm, batch).to(self.linear.weight.dtype)
        scores = self.linear(states).squeeze(-1)
        return (scores - self.mean) / self.std  # type: ignore[no-any-return]

    @torch.no_grad()
    def fit(self, better: Tensor, worse: Tensor) -> Tensor:
        """Fits the weights by logistic regression on states of better answers minus those of worse answers.

        Differences d have unit variance in the regression, and the weights are scaled back afterwards. The loss is
        mean -log sigmoid(w d) + l2 / 2 w w. With the bias, the mean score is 0.

        Args:
            better: States [N, H] of the better answers.
            worse: States [N, H] of the worse answers.

        Returns:
            The differences of scores [N].
        """
        better, worse = better.double(), worse.double()
        differences = better - worse
        scale = differences.pow(2).mean(0).sqrt()
        scale = scale.where(scale > 0, 1)
        inputs = differences / scale
        weights = fit_logistic(inputs, self.l2)
        self.linear.weight.copy_((weights / scale)[None])
        center = (better.mean(0) + worse.mean(0)) / 2
        self.linear.bias.fill_(-(center / scale) @ weights)
        return inputs @ weights


def fit_logistic(inputs: Tensor, l2: float) -> Tensor:
    """Returns the weights [H] that minimize mean -log sigmoid(w x) + l2 / 2 w w over inputs [N, H]."""
    weights = inputs.new_zeros(inputs.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=FIT_STEPS, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def compute_loss() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = softplus(-(inputs @ weights)).mean() + l2 / 2 * weights.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(compute_loss)  # type: ignore[no-untyped-call]
    return weights.detach()
