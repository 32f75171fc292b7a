"""A folder of trained prompts of one backbone, by name."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from torch import Tensor

from lightning_softprompt.backbones.fingerprint import SAMPLED
from lightning_softprompt.checkpoints.folding import parameter_name
from lightning_softprompt.checkpoints.prompt_file import SavedPrompt, read_prompt, write_prompt

log = logging.getLogger(__name__)
NAME = re.compile(r"\w[\w.-]*")
TOKENS = ("tokens", parameter_name("tokens"), "shared")  # parameters of plain, folded and shared soft tokens
OTHER_PARTS = ("u", "v", "readout")  # allowed in addition: factors of tasks and the readout


class Library:
    """Soft tokens of trained prompts, to initialize other prompts from.

    Args:
        folder: Folder of the prompts, each a `NAME.safetensors`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def names(self) -> list[str]:
        """Names of the stored prompts, sorted."""
        return sorted(path.stem for path in self.folder.glob("*.safetensors"))

    def path(self, name: str) -> Path:
        """Returns the file of a prompt."""
        return self.folder / f"{name}.safetensors"

    def read(self) -> dict[str, SavedPrompt]:
        """Reads all prompts by name.

        Raises:
            ValueError: If the library is empty, or a file is damaged.
        """
        if not self.names:
            raise ValueError(f"no prompts in {self.folder}; put some there: softprompt prompts add NAME FILE")
        return {name: read_prompt(self.path(name)) for name in self.names}

    def add(self, name: str, file: Path) -> SavedPrompt:
        """Stores a copy of a prompt.

        Raises:
            ValueError: If the name is invalid or exists, the file has no soft tokens, or belongs to another backbone.
        """
        if not NAME.fullmatch(name):
            raise ValueError(f"names may contain only letters, digits, '_', '.' and '-', got {name!r}")
        if self.path(name).exists():
            raise ValueError(f"{self.path(name)} already exists; remove it, or use another name")
        saved = read_prompt(file)
        soft_tokens(saved, file)
        for other in self.names[:1]:
            refuse_other_backbone(saved, file, read_prompt(self.path(other)), self.path(other))
        self.folder.mkdir(parents=True, exist_ok=True)
        write_prompt(self.path(name), saved)
        return saved


def refuse_other_backbone(one: SavedPrompt, path: Path, other: SavedPrompt, other_path: Path) -> None:
    """Refuses to compare prompts of different backbones.

    Raises:
        ValueError: Naming both.
    """
    fingerprint, other_fingerprint = (str(saved.backbone.get("fingerprint")) for saved in (one, other))
    if fingerprint == other_fingerprint:
        return
    name, other_name = (saved.backbone.get("name") for saved in (one, other))
    has_other_scheme = bool(SAMPLED.fullmatch(fingerprint)) != bool(SAMPLED.fullmatch(other_fingerprint))
    if has_other_scheme and name == other_name:
        log.warning(
            "%s and %s have fingerprints of different versions, which cannot be compared; both are for %s",
            path, other_path, name,
        )  # fmt: skip
        return
    raise ValueError(
        f"{path} is for {name} and {other_path} is for {other_name}: prompts of different backbones cannot be compared"
    )


def soft_tokens(saved: SavedPrompt, path: Path, name: str | None = None) -> Tensor:
    """Returns soft tokens [P, H] in float32.

    Args:
        saved: The prompt.
        path: Its file, for messages.
        name: The parameter; None to detect it.

    Raises:
        ValueError: If the prompt has no such parameter, or consists of more than soft tokens.
    """
    candidates = TOKENS if name is None else (name,)
    parameter = next((candidate for candidate in candidates if candidate in saved.tensors), None)
    if parameter is None:
        raise ValueError(f"{path} has no soft tokens in {name or TOKENS}, but {sorted(saved.tensors)}")
    others = [other for other in saved.tensors if other != parameter]
    unexpected = sorted(other for other in others if other.partition(".")[0] not in OTHER_PARTS)
    if unexpected and name is None:
        raise ValueError(
            f"{path} has more than soft tokens, {unexpected}: a network computes them, or the prompt has other parts; "
            f"fold it first with softprompt fold {path}"
        )
    return saved.tensors[parameter].float().flatten(0, -2)  # folded soft tokens are [1, P, H]
