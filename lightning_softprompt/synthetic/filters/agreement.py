"""Agreement of a classifier with the label of a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import Classes
from lightning_softprompt.inference.prompt import Prompt, load_prompt
from lightning_softprompt.methods.baselines.no_prompt import NoPrompt
from lightning_softprompt.readouts.calibrated import Calibrated
from lightning_softprompt.synthetic.filters.base import Filter, Reasons, Row


@dataclass(frozen=True)
class Agreement(Filter):
    r"""Drops rows whose label a classifier does not predict: the bare backbone, or a trained prompt.

    Args:
        prompt: File of a trained prompt, which contains template and classes; null for the bare backbone.
        template: Template of a row for the bare backbone, such as "Review: {text}\nSentiment: {target}".
        labels: Label words of the bare backbone by class.
        calibrated: Whether the probabilities of the bare backbone are calibrated by a row without content. Requires
            label words of a single token.
        min_probability: Smallest probability of the label that passes.
        label: Column of the label.
        backbone: The bare backbone.
        batch_size: Rows that are classified at once.
    """

    prompt: str | None = None
    template: str | None = None
    labels: Mapping[str, str | Sequence[str]] | None = None
    calibrated: bool = True
    min_probability: float = 0.0
    label: str = "label"
    backbone: BackboneSpec | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        is_zero_shot = self.template is not None and self.labels is not None
        if (self.prompt is None) != is_zero_shot:
            raise ValueError("Agreement requires either a prompt file, or a template and labels for the bare backbone")

    def reasons(self, rows: Sequence[Row]) -> Reasons:
        """Returns the predicted class and the probability of the label for rows that are dropped."""
        if not rows:
            return []
        classifier = self._load_classifier()
        records = classifier.predict(rows, batch_size=self.batch_size)
        reasons: Reasons = []
        for row, record in zip(rows, records, strict=True):
            label, scores = row.get(self.label), record["scores"]
            if scores is None or label not in scores:
                raise ValueError(f"the classifier has the classes {list(scores or ())}, got the label {label!r}")
            agrees = record["prediction"] == label and scores[label] >= self.min_probability
            reasons.append(None if agrees else f"predicted {record['prediction']}, label {scores[label]:.2f}")
        return reasons

    def _load_classifier(self) -> Prompt:
        if self.prompt is not None:
            return load_prompt(Path(self.prompt))
        template = str(self.template)
        glue = Template(template).glue
        words = {}
        for name, listed in (self.labels or {}).items():
            words[name] = [glue + word for word in ([listed] if isinstance(listed, str) else listed)]
        readout: Any = Calibrated if self.calibrated else None
        method = NoPrompt(backbone=self.backbone, classes=Classes(words, template), readout=readout)
        method.configure_model()
        return Prompt(method)
