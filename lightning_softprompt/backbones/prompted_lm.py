"""A frozen backbone with the prompt of a method: what objectives, readouts and evaluations are handed for one step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.execution.lm_head import States, TargetScores
from lightning_softprompt.core.types import Batch, SoftPrompt

Explain = Callable[["PromptedLM", Batch], tuple[Tensor, Mapping[str, Tensor]]]  # a reward and its parts


class PromptedLM:
    """Backbone and method for one step. Prompt and scores of a batch are computed once, however often asked for.

    Args:
        backbone: The frozen model.
        method: Gives the soft prompt of a batch.
        readout: Gives class scores, or scores of answers; None if the task has neither.
        reward: Gives scores of answers [B] in place of the readout.
        explain: Gives the reward and its parts by name, each [B]; None if the reward has no parts.
        start: Gives the method its values at the start of the run within a context, which yields a hash of them.
    """

    def __init__(
        self,
        backbone: Backbone,
        method: Callable[[Batch], SoftPrompt],
        readout: Callable[[PromptedLM, Batch], Tensor] | None = None,
        reward: Callable[[PromptedLM, Batch], Tensor] | None = None,
        start: Callable[[], AbstractContextManager[str]] | None = None,
        explain: Explain | None = None,
    ) -> None:
        self.backbone = backbone
        self._method = method
        self._readout = readout
        self._reward = reward
        self._start = start
        self._prompts: dict[int, tuple[Batch, SoftPrompt, bool]] = {}
        self._explain = explain
        self._scores: dict[int, Tensor] = {}
        self._states: dict[tuple[int, bool], States] = {}
        self._last_losses: tuple[tuple[int, bool, float], Batch, Tensor] | None = None

    def prompt(self, batch: Batch) -> SoftPrompt:
        """The method's prompt for the batch."""
        with_gradient = torch.is_grad_enabled()
        _, prompt, has_gradient = self._prompts.get(id(batch), (batch, None, False))
        if prompt is None or has_gradient < with_gradient:
            prompt = self._method(self.backbone.prompt_view(batch))
            self._prompts[id(batch)] = batch, prompt, with_gradient  # the batch is kept: another could get its id
        return prompt

    def with_method(self, method: Callable[[Batch], SoftPrompt]) -> PromptedLM:
        """The same backbone and readout with other prompts."""
        return PromptedLM(self.backbone, method, self._readout, self._reward, self._start, self._explain)

    def with_readout(self, readout: Callable[[PromptedLM, Batch], Tensor]) -> PromptedLM:
        """The same backbone and prompts with another readout."""
        return PromptedLM(self.backbone, self._method, readout, None, self._start)

    def with_reward(self, reward: Callable[[PromptedLM, Batch], Tensor], explain: Explain | None = None) -> PromptedLM:
        """The same backbone and prompts with another score of answers, and what returns it with its parts."""
        return PromptedLM(self.backbone, self._method, self._readout, reward, self._start, explain)

    @contextmanager
    def at_start(self) -> Iterator[tuple[PromptedLM, str]]:
        """The same method with its values at the start of the run, and a hash of them, within a `with` block.

        Raises:
            ValueError: If they are unknown.
        """
        if self._start is None:
            raise ValueError("the start of the run is known for a method only, see SoftPromptModule.lm")
        with self._start() as identity:
            yield PromptedLM(self.backbone, self._method, self._readout), identity

    @property
    def has_readout(self) -> bool:
        """Whether a readout scores classes or answers."""
        return self._readout is not None

    def __call__(self, batch: Batch, *, prompted: bool = True, words: Tensor | None = None) -> Tensor:
        """Logits of the targets [B, U, V], [B, U, W] of W words; those of the bare backbone with `prompted=False`."""
        return self.backbone(batch, self.prompt(batch) if prompted else None, words)  # type: ignore[no-any-return]

    def cross_entropy(self, batch: Batch, *, prompted: bool = True, label_smoothing: float = 0.0) -> Tensor:
        """[B, U] of the targets; 0 at positions without a target. Takes less memory than their logits.

        Without gradients, the losses of the last batch are stored: objective and evaluation both use them.
        """
        key = (id(batch), prompted, label_smoothing)
        if self._last_losses is not None and self._last_losses[0] == key and not torch.is_grad_enabled():
            return self._last_losses[2]
        losses = self.backbone.cross_entropy(batch, self.prompt(batch) if prompted else None, label_smoothing)
        if not torch.is_grad_enabled():
            self._last_losses = key, batch, losses
        return losses

    def logprobs(self, batch: Batch, *, prompted: bool = True) -> Tensor:
        """Log-probabilities [B, U] of the targets in float32; 0 at positions without a target.

        Like `cross_entropy`, it takes less memory than the logits.
        """
        return -self.cross_entropy(batch, prompted=prompted)

    def states(self, batch: Batch) -> States:
        """States from which the targets are predicted. They are computed once for a batch, also for several heads."""
        key = id(batch), torch.is_grad_enabled()
        prompt = self.prompt(batch)
        if key not in self._states:
            self._states[key] = self.backbone.states(batch, prompt)
        return self._states[key]

    def target_scores(self, batch: Batch, temperature: float = 1.0) -> TargetScores:
        """Log-probabilities and entropies [B, U] of the targets at a temperature of sampling."""
        return self.backbone.head.target_scores(self.states(batch), batch.targets, temperature)

    def values(self, batch: Batch) -> Tensor:
        """Values [B, U] of the states before the tokens of answers, from a readout such as `ValueHead`.

        Raises:
            ValueError: If the readout does not compute them.
        """
        values = None if self._readout is None else self._readout(self, batch)
        if values is None or values.shape != batch.targets.shape:
            raise ValueError("the readout computes no value for each token; set --model.readout to ValueHead")
        return values

    def answer_scores(self, batch: Batch) -> Tensor:
        """Scores [B] by which answers are compared: of the reward, else of the readout, else log-probabilities.

        Raises:
            ValueError: If the readout scores classes.
        """
        if self._reward is not None:
            return self._reward(self, batch)
        if self._readout is None:
            return self.logprobs(batch).sum(1)
        scores = self.scores(batch)
        if scores.dim() != 1:
            raise ValueError("the readout scores classes, but answers are compared; set --model.readout to RewardHead")
        return scores

    def explain_scores(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Scores [B] of answers as in `answer_scores`, and the parts of the reward by name, each [B]."""
        if self._explain is None:
            return self.answer_scores(batch), {}
        return self._explain(self, batch)

    def scores(self, batch: Batch) -> Tensor:
        """Class scores [B, C], or [B, W, C] where each word has a class; their softmax are the class probabilities.

        Raises:
            ValueError: If the task has no classes, or the readout scores rows where words have classes.
        """
        if self._readout is None:
            raise ValueError("class scores were asked for, but the data module names no classes")
        if id(batch) not in self._scores:
            self.prompt(batch)
            self._scores[id(batch)] = scores = self._readout(self, batch)
            if batch.words is not None and scores.shape[:-1] != batch.words.shape:
                raise ValueError(
                    "the readout scores rows, but words have classes here; set --model.readout to TokenHead"
                )
        return self._scores[id(batch)]

    def generate(self, batch: Batch, *, prompted: bool = True, **decoding: Any) -> Tensor:
        """Answers [B, U], see `Backbone.generate`; those of the bare backbone with `prompted=False`."""
        questions = self.backbone.without_answers(batch)
        return self.backbone.generate(questions, self.prompt(questions) if prompted else None, **decoding)
