"""Several methods on one backbone as one method."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.checkpoints.roles import Roles
from lightning_softprompt.core.join_prompts import join_prompts
from lightning_softprompt.core.types import Batch, SoftPrompt
from lightning_softprompt.methods.base import SoftPromptModule

SHARED_OPTIONS = {  # options of the combination that its parts cannot set, with their defaults
    "backbone": None,
    "objective": None,
    "readout": None,
    "classes": None,
    "classes_by_task": None,
    "optimizer": None,
    "scheduler": None,
    "lr_schedule": "constant",
    "warmup": 0.0,
    "penalties": None,
    "embedding_noise": 0.0,
}


class Combined(SoftPromptModule):
    """Several methods on one backbone, trained together, such as a prompt with LoRA or a prompt with a prefix.

    Each row has the soft tokens, keys and values of all parts. They are concatenated in the order of the parts, soft
    tokens at each slot and keys and values at each layer. The result can be folded if each part can.

    Each part has a separate learning rate: its `lr`, else the `lr` or `optimizer` of the combination, else the default
    rate of the part. A part may also set `prompt_dropout` and `penalty_weights`; all other common arguments belong to
    the combination.

    Paper: none
    Enters: same as its parts
    Parameters: the parameters of all parts

    Args:
        parts: The methods.
        common: Arguments of every method.

    Raises:
        ValueError: If there are no parts, a part sets an option of the combination, or several parts change layers of
            the backbone.
    """

    def __init__(self, parts: Sequence[SoftPromptModule] = (), **common: Any) -> None:
        super().__init__(**common)
        named_parts = _name_parts(parts)
        self.parts = Roles(named_parts)
        for name, part in named_parts.items():
            self._share_options(name, part)
        changing = [name for name, part in named_parts.items() if part.changes_layers]
        if len(changing) > 1:
            raise ValueError(f"{' and '.join(changing)} both change weights of the layers; combine only one of them")
        self.changes_backbone = any(part.changes_backbone for part in parts)
        self.trains = any(part.trains for part in parts)
        self.trained = any(part.trained for part in parts)
        self.requires = tuple(dict.fromkeys(requirement for part in parts for requirement in part.requires))
        self.training_loss.weights = self._merge_penalty_weights() | self.training_loss.weights
        self.sets_rate = common.get("lr") is not None or common.get("optimizer") is not None

    def _share_options(self, name: str, part: SoftPromptModule) -> None:
        """Gives a part the classes of the combination, and refuses options that only the combination can set."""
        for option, default in SHARED_OPTIONS.items():
            value = part.hparams[option]
            if value not in (default, self.hparams[option]):
                raise ValueError(f"{name} is a part of Combined and cannot set {option}; set {option} of Combined")
        part.spec, part.classes, part.classes_by_task = self.spec, self.classes, self.classes_by_task

    def _merge_penalty_weights(self) -> dict[str, float]:
        weights: dict[str, float] = {}
        for part in self.parts.methods:
            for penalty, weight in part.training_loss.weights.items():
                if weights.setdefault(penalty, weight) != weight:
                    raise ValueError(f"parts have different penalty_weights of {penalty!r}; set those of Combined only")
        return weights

    @property
    def changes_layers(self) -> bool:
        """Whether a part changes linear layers."""
        return any(part.changes_layers for part in self.parts.methods)

    def build(self, backbone: Backbone) -> None:
        """Creates the parameters of all parts on the same backbone."""
        readout: dict[str, Tensor] = {}
        for part in self.parts.methods:
            part.build_on(backbone)
            readout |= part.trained_readout
        self.trained_readout = readout

    def prompt(self, batch: Batch) -> SoftPrompt:
        """Returns the joined prompts of the parts, each with its dropout."""
        prompts = {name: self.parts[name].prompt_with_dropout(batch) for name in self.parts}
        return join_prompts(prompts, len(batch))

    def merge(self) -> None:
        """Writes the trained weights of the parts that change the backbone; the others remain as a prompt.

        Raises:
            ValueError: If no part changes weights of the backbone.
        """
        changing = [part for part in self.parts.methods if part.changes_backbone]
        if not changing:
            super().merge()
        for part in changing:
            part.merge()

    def project(self) -> None:
        """Projects the parameters of each part."""
        for part in self.parts.methods:
            part.project()

    def parameter_groups(self) -> Iterable[dict[str, Any]]:
        """Returns the parameter groups of all parts, each with the learning rate of its part."""
        groups = []
        for name in self.parts:
            part = self.parts[name]
            part_rate = part.optimizer_factory.lr
            if part_rate is None and not self.sets_rate:
                part_rate = part.default_rate
            rate = {} if part_rate is None else {"lr": part_rate}
            for group in part.parameter_groups():
                group_name = "/".join([name, group["name"]] if "name" in group else [name])
                if group["params"]:
                    groups.append({**rate, **group, "name": group_name})
        return groups


def _name_parts(parts: Sequence[SoftPromptModule]) -> dict[str, SoftPromptModule]:
    """Returns parts by the name of their class, with a number from the second part of a class on."""
    if not parts:
        raise ValueError("Combined requires parts, such as [{class_path: PromptTuning}, {class_path: LoRA}]")
    named: dict[str, SoftPromptModule] = {}
    counts: dict[str, int] = {}
    for part in parts:
        name = type(part).__name__
        counts[name] = counts.get(name, 0) + 1
        named[name if counts[name] == 1 else f"{name}_{counts[name]}"] = part
    return named
