"""A batch sampler whose position can be saved and restored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Self, final

from torch.utils.data import Sampler


class ResumableBatchSampler(Sampler[list[int]], ABC):
    """Batches of row numbers, whose order depends only on seed and epoch, and the number of batches returned so far.

    Args:
        seed: Seed of the order.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.epoch, self.done, self._start = 0, 0, 0
        self.repeats = False  # whether each epoch has the batches of the first one
        self.drawn: list[list[int]] | None = None  # the rows of a limited pass, by task

    @abstractmethod
    def __len__(self) -> int:
        """Number of batches per epoch."""

    @abstractmethod
    def _batches(self, start: int) -> Iterator[list[int]]:
        """Yields the batches of the epoch from a position on."""

    @property
    @abstractmethod
    def _identity(self) -> dict[str, Any]:
        """Values that must be equal to resume in this order."""

    @property
    def _order_state(self) -> dict[str, Any]:
        """Values of the order that cannot be computed again, such as losses of an earlier state of the model."""
        return {}

    def _restore_order_state(self, state: Mapping[str, Any]) -> None:
        """Sets the values of `_order_state`."""
        return

    @final
    @property
    def order_epoch(self) -> int:
        """The epoch whose order is used."""
        return 0 if self.repeats else self.epoch

    @final
    @property
    def _order(self) -> dict[str, Any]:
        """The identity, and whether each epoch repeats the first one; checkpoints without this value do not."""
        return {**self._identity, "repeats the first epoch": True} if self.repeats else self._identity

    def __iter__(self) -> Iterator[list[int]]:
        self.done = self._start
        return self._batches(self._start)

    @final
    @property
    def sampler(self) -> Self:
        """This object: Lightning passes the epoch only to `loader.sampler` and `loader.batch_sampler.sampler`."""
        return self

    @final
    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch; a position in another epoch is discarded."""
        if epoch != self.epoch:
            self.epoch, self.done, self._start = epoch, 0, 0

    @final
    def skip_to(self, row: int) -> int:
        """Starts the next pass at the batch that contains a row, or at the end; returns the number skipped."""
        batches = enumerate(self._batches(0))
        self.done = self._start = next((number for number, rows in batches if row in rows), len(self))
        return self._start

    @final
    def count(self) -> None:
        """Counts a batch that was returned; loaders request further batches in advance."""
        self.done += 1
        self._start = 0  # a later pass begins at the beginning; torch begins a pass twice when it has workers

    @final
    def state_dict(self) -> dict[str, Any]:
        """The epoch and the number of its batches that were returned. The end of an epoch is the start of the next."""
        over = self.done >= len(self)
        position = {"epoch": self.epoch + over, "done": 0 if over else self.done}
        return {**position, **self._order, **self._order_state}

    @final
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Starts the next pass at the saved position.

        Raises:
            ValueError: If the order of the saved pass was different.
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
        self._restore_order_state(state)
        self.epoch = state["epoch"]
        self.done = self._start = state["done"]
