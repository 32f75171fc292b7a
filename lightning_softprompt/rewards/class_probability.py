"""The probability of a class by a trained prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from lightning_softprompt.backbones.generation.answers import answer_texts
from lightning_softprompt.backbones.generation.row_format import RowFormat
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.checkpoints.frozen_role import SavedRole
from lightning_softprompt.core.types import Batch
from lightning_softprompt.rewards.base import Reward, examples_of


@final
@dataclass(frozen=True)
class ClassProbability(Reward):
    """The probability that a prompt for classification assigns to a class of an answer, on the backbone of the run.

    The prompt reads the first line of the answer only, so that an answer cannot contain the text that precedes the
    class in its template.

    Args:
        path: `prompt.safetensors` or checkpoint of the prompt.
        label: The class, such as `positive`.
        text: The text to classify: `{answer}` is the answer, and other names are columns of the row.
        log_odds: Whether the reward is log(p / (1 - p)) instead of p.
    """

    path: str
    label: str
    text: str = "{answer}"
    log_odds: bool = False

    def __call__(self, lm: PromptedLM, batch: Batch) -> Tensor:
        """Computes the rewards [B].

        Raises:
            ValueError: If the file cannot be loaded on this backbone, or has no such class.
        """
        method, row_format = self._load(lm)
        column = row_format.required_columns[0]
        word = next(iter(method.classes.words.values()))[0]
        codec = lm.backbone.codec
        rows = []
        for answer, example in zip(answer_texts(lm, batch), examples_of(batch), strict=True):
            text = self._text(answer, example.fields)
            rows.append(row_format.encode(codec, row_format.fields({column: text}), word.strip()))
        scores = method.lm().scores(codec.collate(rows).to(batch.targets.device)).float()
        log_p = scores.log_softmax(-1)[:, method.classes.names.index(self.label)]
        if not self.log_odds:
            return log_p.exp()
        return log_p - torch.log(-torch.expm1(log_p.clamp(max=-1e-6)))

    def _text(self, answer: str, columns: Mapping[str, str]) -> str:
        lines = answer.strip().splitlines()
        return self.text.format(**{**columns, "answer": lines[0] if lines else ""})

    def _load(self, lm: PromptedLM) -> tuple[Any, RowFormat]:
        """Returns the method and how its rows are written."""
        if "method" not in self._state:
            role = SavedRole.load(Path(self.path).expanduser(), lm.backbone)
            method: Any = role.method
            if method.classes is None or self.label not in method.classes.names:
                known = [] if method.classes is None else list(method.classes.names)
                raise ValueError(f"{self.path} has the classes {known}, but label is {self.label!r}")
            self._state["method"] = method, RowFormat(method.classes.template)
        loaded: tuple[Any, RowFormat] = self._state["method"]
        return loaded

    @cached_property
    def _state(self) -> dict[str, Any]:
        return {}
