"""Hooks that exclude frozen weights from checkpoints while loading stays strict."""

from __future__ import annotations

from typing import Any

from torch import nn


def exclude_from_checkpoints(root: nn.Module, child: str) -> None:
    """Excludes a child module from the root's state dict, wherever the root is in a larger module.

    All other keys are still required on loading. The hooks belong to the root: on the child they would also accept a
    missing prompt.
    """
    loaded_prefix = ""  # of the root's keys in the state dict that is being loaded

    def drop(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        for key in [key for key in state if key.startswith(f"{prefix}{child}.")]:
            del state[key]

    def remember_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        nonlocal loaded_prefix
        loaded_prefix = prefix

    def accept_missing(module: nn.Module, keys: Any) -> None:
        excluded = f"{loaded_prefix}{child}."
        keys.missing_keys[:] = [key for key in keys.missing_keys if not key.startswith(excluded)]

    root.register_state_dict_post_hook(drop)
    root.register_load_state_dict_pre_hook(remember_prefix)
    root.register_load_state_dict_post_hook(accept_missing)
