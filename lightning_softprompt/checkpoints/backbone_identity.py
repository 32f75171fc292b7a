"""Identity of the backbone of a prompt: what files store of it, and the check before a prompt is loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.backbones.fingerprint import SAMPLED, differing_part

log = logging.getLogger(__name__)


def backbone_identity(backbone: Backbone) -> dict[str, Any]:
    """Returns the name, revision, quantization and fingerprint of a backbone."""
    spec = backbone.spec
    quantization = {} if spec.quantization is None else {"quantization": spec.quantization}
    return {"name": spec.name, "revision": spec.revision, **quantization, "fingerprint": backbone.fingerprint()}


def check_backbone(saved: Mapping[str, Any], backbone: Backbone, path: Path | str) -> None:
    """Refuses a backbone with other weights or another tokenizer than that of a file. Its name may differ.

    Fingerprints of earlier versions cover a sample of the weights. They are compared in the same way, with a warning.

    Args:
        saved: Identity of the backbone in the file.
        backbone: The loaded backbone.
        path: The file, for messages.

    Raises:
        ValueError: Naming both backbones.
    """
    fingerprint = str(saved.get("fingerprint"))
    if fingerprint == backbone.spec.accept_prompts_of:
        return
    is_sampled = bool(SAMPLED.fullmatch(fingerprint))
    if is_sampled and fingerprint == backbone.sampled_fingerprint():
        log.warning(
            "%s was written by an earlier version, whose fingerprint covers only a sample of the backbone's weights "
            "and not its tokenizer; other differences would not be noticed", path,
        )  # fmt: skip
        return
    identity = backbone_identity(backbone)
    if fingerprint == identity["fingerprint"]:
        return
    difference = "" if is_sampled else f" ({differing_part(fingerprint, identity['fingerprint'])})"
    raise ValueError(
        f"{path} was trained on {_describe(saved)}, but this backbone is {_describe(identity)}{difference}. A prompt "
        f"only works with the backbone it was trained on: set --backbone.name (and revision, and quantization) to it. "
        f"If one is a quantized version of the other, accept its prompts with --backbone.accept_prompts_of "
        f"{fingerprint}"
    )


def _describe(identity: Mapping[str, Any]) -> str:
    description = str(identity.get("name"))
    if identity.get("revision"):
        description += f" at {identity['revision']}"
    if identity.get("quantization"):
        description += f" quantized to {identity['quantization']}"
    return f"{description} (fingerprint {identity.get('fingerprint')})"
