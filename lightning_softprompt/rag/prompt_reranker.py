"""A soft prompt as a judge of what was found."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from hashlib import file_digest
from pathlib import Path
from typing import Any, cast, final

import torch

from lightning_softprompt.checkpoints.prompt_file import read_prompt
from lightning_softprompt.checkpoints.restore import load_method
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import Batch, Classes
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.retrieval.passages.documents import Passage
from lightning_softprompt.retrieval.reranker import Reranker

COLUMNS = ("question", "title", "passage")


@final
class PromptReranker(Reranker):
    """Puts passages in order by how sure a prompt is that they are relevant, on the backbone that it was trained on.

    In a configuration it is the retriever's: `reranker: {class_path: PromptReranker, init_args: {path: FILE}}`.

    Args:
        path: A `prompt.safetensors`, or a checkpoint, of a run on `RelevanceDataModule`.
        relevant: The class that says so.
        max_tokens: Tokens of a pair; the passage gives way.
        batch_size: Pairs that are judged at once.
        device: Where it runs; the first CUDA device if there is one, unless given.
    """

    def __init__(
        self,
        path: str,
        relevant: str = "relevant",
        max_tokens: int = 512,
        batch_size: int = 16,
        device: str | None = None,
    ) -> None:
        self.path, self.relevant, self.max_tokens = path, relevant, max_tokens
        self.batch_size, self.device = batch_size, device

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "method"}

    @property
    def identity(self) -> tuple[object, ...]:
        """The file's content, and how pairs are written.

        Raises:
            ValueError: If there is no such file.
        """
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise ValueError(f"no prompt at {path}; name the prompt.safetensors of a run on RelevanceDataModule")
        with path.open("rb") as file:
            return file_digest(file, "sha256").hexdigest(), self.relevant, self.max_tokens

    @torch.inference_mode()
    def scores(self, question: str, passages: Sequence[Passage]) -> list[float]:
        """The log-probability that each is relevant.

        Raises:
            ValueError: If the prompt cannot be loaded, or was trained for something else.
        """
        lm, place = self.method.lm(), self._classes.names.index(self.relevant)
        found: list[float] = []
        for start in range(0, len(passages), self.batch_size):
            batch = self._batch(question, passages[start : start + self.batch_size])
            found += lm.scores(batch).log_softmax(-1)[:, place].tolist()
        return found

    def _batch(self, question: str, passages: Sequence[Passage]) -> Batch:
        codec, classes = self.method.loaded.codec, self._classes
        template = Template(classes.template, ["passage"])
        any_word = next(iter(classes.words.values()))[0].removeprefix(template.glue)
        said = [template.pieces(dict(zip(COLUMNS, (question, p.title, p.text), strict=True))) for p in passages]
        rows = [codec.encode(pieces, any_word, self.max_tokens) for pieces in said]
        return codec.collate(rows).to(self.method.loaded.word_embeddings.device)

    @property
    def _classes(self) -> Classes:
        assert self.method.classes is not None, "checked when it was loaded"
        return self.method.classes

    @cached_property
    def method(self) -> SoftPromptModule:
        """The method as it was trained.

        Raises:
            ValueError: If it cannot be loaded, or was trained for something else.
        """
        path = Path(self.path).expanduser()
        method = cast(SoftPromptModule, load_method(read_prompt(path), path))
        classes = method.classes
        if classes is None or self.relevant not in classes.words:
            told = "no classes" if classes is None else f"the classes {list(classes.names)}"
            raise ValueError(f"{path} has {told}, wanted {self.relevant!r}; train one on RelevanceDataModule")
        if strange := set(Template(classes.template).columns) - set(COLUMNS):
            raise ValueError(f"{path} was trained on rows with {sorted(strange)}; a re-ranker knows {COLUMNS} alone")
        return method.to(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
