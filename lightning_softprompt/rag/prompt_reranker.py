"""Re-ranks retrieved passages with a soft prompt."""

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
    """Ranks passages by the probability of the class `relevant`, with a prompt on the backbone it was trained on.

    It is set in the config of a retriever: `reranker: {class_path: PromptReranker, init_args: {path: FILE}}`.

    Args:
        path: A `prompt.safetensors` or a checkpoint of a run with `RelevanceDataModule`.
        relevant: Name of the class of relevant passages.
        max_tokens: Maximum tokens of a pair; longer passages are truncated.
        batch_size: Pairs per batch.
        device: Device of the backbone (default: CUDA if available, else the CPU).
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
        """Digest of the prompt file, and the settings.

        Raises:
            ValueError: If the file does not exist.
        """
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise ValueError(f"no prompt at {path}; set path to prompt.safetensors of a run with RelevanceDataModule")
        with path.open("rb") as file:
            return file_digest(file, "sha256").hexdigest(), self.relevant, self.max_tokens

    @torch.inference_mode()
    def scores(self, question: str, passages: Sequence[Passage]) -> list[float]:
        """Returns the log-probability that each passage is relevant.

        Raises:
            ValueError: If the prompt cannot be loaded, or was trained for another task.
        """
        lm, relevant = self.method.lm(), self._classes.names.index(self.relevant)
        scores: list[float] = []
        for start in range(0, len(passages), self.batch_size):
            batch = self._batch(question, passages[start : start + self.batch_size])
            scores += lm.scores(batch).log_softmax(-1)[:, relevant].tolist()
        return scores

    def _batch(self, question: str, passages: Sequence[Passage]) -> Batch:
        codec, classes = self.method.loaded.codec, self._classes
        template = Template(classes.template, ["passage"])
        any_word = next(iter(classes.words.values()))[0].removeprefix(template.glue)
        rows = []
        for passage in passages:
            fields = {"question": question, "title": passage.title, "passage": passage.text}
            rows.append(codec.encode(template.pieces(fields), any_word, self.max_tokens))
        return codec.collate(rows).to(self.method.loaded.word_embeddings.device)

    @property
    def _classes(self) -> Classes:
        assert self.method.classes is not None, "checked by `method`"
        return self.method.classes

    @cached_property
    def method(self) -> SoftPromptModule:
        """The trained method.

        Raises:
            ValueError: If it cannot be loaded, or was trained for another task.
        """
        path = Path(self.path).expanduser()
        method = cast(SoftPromptModule, load_method(read_prompt(path), path))
        classes = method.classes
        if classes is None or self.relevant not in classes.words:
            names = "no classes" if classes is None else f"the classes {list(classes.names)}"
            raise ValueError(f"{path} has {names} instead of {self.relevant!r}; train it with RelevanceDataModule")
        unknown = set(Template(classes.template).columns) - set(COLUMNS)
        if unknown:
            raise ValueError(f"{path} was trained with the columns {sorted(unknown)}; a re-ranker has only {COLUMNS}")
        return method.to(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
