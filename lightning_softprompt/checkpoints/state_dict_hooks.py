"""Hooks that keep frozen weights out of checkpoints while loading stays strict."""

from __future__ import annotations

from typing import Any

from torch import nn


def exclude_from_checkpoints(root: nn.Module, child: str) -> None:
    """Excludes a child module from the root's state dict. All other keys are still required on loading.

    The loading hook belongs to the root: on the child it would also accept a missing prompt.
    """
    prefix = f"{child}."

    def drop(module: nn.Module, state: dict[str, Any], at: str, _: Any) -> None:
        for key in [key for key in state if key.startswith(at + prefix)]:
            del state[key]

    def forgive(_: nn.Module, keys: Any) -> None:
        keys.missing_keys[:] = [key for key in keys.missing_keys if not key.startswith(prefix)]

    root.register_state_dict_post_hook(drop)
    root.register_load_state_dict_post_hook(forgive)
