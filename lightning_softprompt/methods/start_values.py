"""`StartValues`: the trained values of a method at the start of its run, for objectives that compare with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from lightning_softprompt.methods.optimizers import trainable_parameters
from lightning_softprompt.system.tensor_files import hash_tensors


@final
class StartValues:
    """The values of trainable parameters at the start of a run. Checkpoints contain them, so that a run can be resumed.

    Args:
        method: The method.
    """

    def __init__(self, method: nn.Module) -> None:
        self.method = method
        self.tensors: dict[str, Tensor] = {}
        self.identity = ""

    def remember(self) -> None:
        """Stores the current values, unless a checkpoint has set them."""
        if not self.tensors:
            current = trainable_parameters(self.method)
            self.set({name: parameter.detach().clone() for name, parameter in current.items()})

    def set(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets the values, such as those of a checkpoint."""
        self.tensors = dict(tensors)
        self.identity = hash_tensors(self.tensors)[:16]

    @contextmanager
    def restore(self) -> Iterator[str]:
        """Gives the parameters their values at the start within a `with` block, in evaluation mode.

        Yields:
            A hash of the values.

        Raises:
            ValueError: If they are unknown, as for a prompt file, which contains the trained values only.
        """
        if not self.tensors:
            raise ValueError(
                "the objective compares with the start of the run, which only checkpoints contain: use a file in the "
                "folder checkpoints of the run instead of a prompt, or set the reference of the objective to the "
                "prompt from which the run started"
            )
        parameters = trainable_parameters(self.method)
        current = {name: parameter.data for name, parameter in parameters.items()}
        training = self.method.training
        self.method.eval()
        try:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.data = self.tensors[name].to(parameter)
                yield self.identity
        finally:
            for name, parameter in parameters.items():
                parameter.data = current[name]
            self.method.train(training)

    def state(self) -> dict[str, Any]:
        """Returns the values for a checkpoint."""
        return {name: tensor.cpu() for name, tensor in self.tensors.items()}
