"""Writes the folder of an extended tokenizer, and checks that it can be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lightning_softprompt.backbones.fingerprint import tokenizer_digest
from lightning_softprompt.backbones.tokenization.added_rows import Vocabulary
from lightning_softprompt.system.atomic_files import write_folder
from lightning_softprompt.vocabulary.base import Extension


def write_tokenizer(folder: Path, extension: Extension, base: str) -> Any:
    """Writes an extended tokenizer with its `vocabulary.json`, and returns it as it is read again.

    Args:
        folder: The folder, which must not exist.
        extension: The tokenizer with its new tokens.
        base: Name of the backbone whose tokenizer is extended.

    Raises:
        ValueError: If the folder exists, or the tokenizer differs after it is read again.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists; remove it, or choose another --out")
    vocabulary = Vocabulary(base, tokenizer_digest(extension.tokenizer), tuple(extension.rows))
    extended = extension.extended()

    def write(draft: Path) -> None:
        extended.save_pretrained(draft)
        vocabulary.save(draft)

    write_folder(folder, write)
    loaded = AutoTokenizer.from_pretrained(folder)
    if tokenizer_digest(loaded) != tokenizer_digest(extended):
        raise ValueError(
            f"{folder} was written, but transformers reads another tokenizer from it; report this tokenizer"
        )
    return loaded
