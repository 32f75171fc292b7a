"""Precisions that convert a whole model, such as `64-true`, for batches that contain the rows as text."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision
from lightning.pytorch.strategies import Strategy

from lightning_softprompt.core.types import Batch


class BatchDoublePrecision(DoublePrecision):
    """Lightning's double precision; batches stay as they are, since they have no floating-point tensors."""

    def convert_input(self, data: Any) -> Any:
        """Convert floating-point tensors, except in a `Batch`."""
        return data if isinstance(data, Batch) else super().convert_input(data)


class BatchHalfPrecision(HalfPrecision):
    """Lightning's half precision; batches stay as they are, since they have no floating-point tensors."""

    def convert_input(self, data: Any) -> Any:
        """Convert floating-point tensors, except in a `Batch`."""
        return data if isinstance(data, Batch) else super().convert_input(data)


def keep_batches(strategy: Strategy) -> None:
    """Replaces a precision plugin of Lightning that would copy batches, and fails on their frozen rows."""
    plugin = strategy.precision_plugin
    if type(plugin) is DoublePrecision:
        strategy.precision_plugin = BatchDoublePrecision()
    elif type(plugin) is HalfPrecision:
        strategy.precision_plugin = BatchHalfPrecision(plugin.precision)
