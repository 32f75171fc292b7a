"""The checkers of IFEval, from the package `if-verifiable`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from lightning_softprompt.constraints.base import Constraint
from lightning_softprompt.system.optional_packages import import_optional

REGISTRY = "if_verifiable.ifeval.instructions_registry"
REFUSED = {
    "length_constraints:number_sentences": "sentence_count",
    "change_case:capital_word_frequency": None,
}  # by id: the constraint of this package to use instead


@dataclass(frozen=True)
class IfEval(Constraint):
    """One of the instructions of IFEval (Zhou et al. 2023, arXiv 2311.07911).

    Requires `pip install 'lightning-softprompt[alignment]'`. 23 of the 25 checkers are available. The other two load
    the sentence model of NLTK, a pickle that must be downloaded.

    Args:
        id: Its id, such as `punctuation:no_comma`.
        arguments: All of its arguments. (The package chooses missing ones at random.)
    """

    id: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._create_checker()

    def _create_checker(self) -> Any:
        """Creates the checker.

        Raises:
            ValueError: If the package is not installed, the id is unknown or refused, or arguments are missing.
        """
        if self.id in REFUSED:
            other = REFUSED[self.id]
            hint = f"; use the constraint {other!r} instead" if other else ""
            raise ValueError(f"{self.id} loads a pickle of NLTK that must be downloaded, which is refused{hint}")
        import_optional("if_verifiable")
        classes = import_module(REGISTRY).INSTRUCTION_DICT
        if self.id not in classes:
            available = sorted(set(classes) - set(REFUSED))
            raise ValueError(f"IFEval has no instruction {self.id!r}; available are {available}")
        import_module("langdetect").DetectorFactory.seed = 0  # otherwise results differ from call to call
        checker = classes[self.id](self.id)
        required = sorted(checker.get_instruction_args_keys())
        if required != sorted(self.arguments):
            raise ValueError(f"{self.id} requires the arguments {required}, got {sorted(self.arguments)}")
        checker.build_description(**self.arguments)
        return checker

    @property
    def label(self) -> str:
        """The id, as part of the name of a metric."""
        return "if_eval_" + self.id.rpartition(":")[2]

    @property
    def instruction(self) -> str:
        """The sentence that asks for it, in the words of IFEval."""
        return str(self._create_checker().build_description(**self.arguments))

    def is_met(self, answer: str) -> bool:
        """Returns whether the answer follows the instruction."""
        return bool(self._create_checker().check_following(answer))
