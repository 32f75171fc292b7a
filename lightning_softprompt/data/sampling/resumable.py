"""A place in an order of batches that can be left and taken up again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Self, final

from torch.utils.data import Sampler


class ResumableBatchSampler(Sampler[list[int]], ABC):
    """Batches of row numbers whose order is a function of seed and epoch alone, and how many of them were handed out.

    Args:
        seed: Of the order.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.epoch, self.done, self._start = 0, 0, 0
        self.repeats = False  # whether each epoch has the batches of the first one
        self.drawn: list[list[int]] | None = None  # by task, the rows of a pass of which only some batches run

    @abstractmethod
    def __len__(self) -> int:
        """How many batches an epoch has."""

    @abstractmethod
    def _batches(self, start: int) -> Iterator[list[int]]:
        """Those of the epoch, from one on."""

    @property
    @abstractmethod
    def _identity(self) -> dict[str, Any]:
        """What must be the same for the order to go on."""

    @final
    @property
    def order_epoch(self) -> int:
        """The epoch whose order is used."""
        return 0 if self.repeats else self.epoch

    @final
    @property
    def _order(self) -> dict[str, Any]:
        """The identity, and whether each epoch is the first one again; checkpoints without that do not repeat it."""
        return {**self._identity, "repeats the first epoch": True} if self.repeats else self._identity

    def __iter__(self) -> Iterator[list[int]]:
        self.done = self._start
        return self._batches(self._start)

    @final
    @property
    def sampler(self) -> Self:
        """Itself, since Lightning passes the epoch to `loader.sampler` and `loader.batch_sampler.sampler` only."""
        return self

    @final
    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch; a place in another epoch is forgotten."""
        if epoch != self.epoch:
            self.epoch, self.done, self._start = epoch, 0, 0

    @final
    def skip_to(self, row: int) -> int:
        """Make the next pass begin with the batch that has a row, or at the end; gives how many are left out."""
        batches = enumerate(self._batches(0))
        self.done = self._start = next((number for number, rows in batches if row in rows), len(self))
        return self._start

    @final
    def count(self) -> None:
        """Note that a batch was handed out; loaders ask for more of them ahead of time."""
        self.done += 1
        self._start = 0  # a later pass begins at the beginning; torch begins a pass twice when it has workers

    @final
    def state_dict(self) -> dict[str, Any]:
        """The epoch, and how many of its batches were handed out. The end of an epoch is the start of the next."""
        over = self.done >= len(self)
        return {"epoch": self.epoch + over, "done": 0 if over else self.done, **self._order}

    @final
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make the next pass begin where the saved one was.

        Raises:
            ValueError: If the saved order was another.
        """
        changed = {name: value for name, value in self._order.items() if state.get(name) != value}
        if changed:
            differences = ", ".join(
                f"{name} was {state.get(name)!r} and is {value!r}" for name, value in changed.items()
            )
            raise ValueError(
                f"the checkpoint belongs to another order of batches: {differences}. Resume with the data and settings "
                "of the saved run, or start a new run from its prompt"
            )
        self.epoch = state["epoch"]
        self.done = self._start = state["done"]
