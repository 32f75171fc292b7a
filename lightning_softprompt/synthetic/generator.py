"""Generates the texts of a batch of rows, with the bare backbone or a trained prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.backbones.generation.row_format import RowFormat
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import IGNORE
from lightning_softprompt.inference.prompt import Prompt, TaskView, load_prompt
from lightning_softprompt.methods.baselines.no_prompt import NoPrompt
from lightning_softprompt.synthetic.writers.base import Generated, Step

INSTRUCTION = "{instruction}"  # its place in a frame
CHAT_FRAME = "user\n{instruction}<|im_end|>\n<|im_start|>assistant\n{target}"  # of the packaged backbone


class Generator:
    """A frozen backbone, bare or with a trained prompt, that generates the texts of rows.

    Args:
        spec: The backbone. A prompt file names its own.
        decoding: How texts are generated.
        prompt: A prompt file, for steps without an instruction; None for the bare backbone.
        frame: The template around an instruction.
        max_tokens: Maximum tokens of an instruction and its answer. Columns are truncated to fit.

    Raises:
        ValueError: If the frame lacks `{instruction}` or `{target}`, or the prompt cannot be loaded.
    """

    def __init__(
        self,
        spec: BackboneSpec,
        decoding: Decoding,
        prompt: Path | None = None,
        frame: str = CHAT_FRAME,
        max_tokens: int = 512,
    ) -> None:
        if frame.count(INSTRUCTION) != 1 or frame.count("{target}") != 1:
            raise ValueError(f"the frame must contain {{instruction}} and {{target}} once, got {frame!r}")
        self.decoding, self.frame, self.max_tokens = decoding, frame, max_tokens
        self.trained = None if prompt is None else load_prompt(prompt)
        self.prompt_file = prompt
        self.bare = NoPrompt(backbone=spec)
        if self.trained is None:
            self.bare.configure_model()
        else:
            self.bare.attach(self.trained.backbone)
        self.bare.eval()

    @property
    def name(self) -> str:
        """The name of the backbone."""
        return str(self.bare.loaded.spec.name)

    def describe(self, step: Step) -> str:
        """Describes the prompt of a step: its template, or the prompt file with a hash of its content."""
        if step.instruction is not None:
            return self._template(step)
        digest = sha256(Path(self.prompt_file or "").read_bytes()).hexdigest()[:8]
        return f"{self.prompt_file} ({digest})"

    def check(self, steps: Sequence[Step]) -> None:
        """Checks that each step has an instruction or a trained prompt.

        Raises:
            ValueError: If a step has neither, or a trained prompt is not used.
        """
        uses_prompt = any(step.instruction is None for step in steps)
        if uses_prompt and self.trained is None:
            raise ValueError("this writer requires a trained prompt; set --prompt to its prompt.safetensors")
        if not uses_prompt and self.trained is not None:
            raise ValueError("--prompt requires the writer PromptText; other writers instruct the bare backbone")

    def _template(self, step: Step) -> str:
        text = self.frame.replace(INSTRUCTION, str(step.instruction))
        return text.replace("{target}", step.opening + "{target}")

    def _prompt(self, step: Step) -> Prompt:
        if step.instruction is None and self.trained is not None:
            return self.trained
        template = self._template(step)
        columns = Template(template).columns
        row_format = RowFormat(template, columns, self.max_tokens, "end", self.decoding.most, self.decoding)
        return Prompt(self.bare, {"": row_format})

    def __call__(self, step: Step, rows: Sequence[Mapping[str, str]], seed: int) -> list[Generated]:
        """Generates the text of a step for each row of a batch.

        Args:
            step: The step.
            rows: The columns of each row.
            seed: Seed of sampling.
        """
        prompt = self._prompt(step)
        view = prompt.view(None)
        (batch,) = view.batches(rows, len(rows))
        decoding = replace(self.decoding, seed=seed)
        with torch.inference_mode(), decoding.drawing():
            ids = prompt.method.lm().generate(batch, **decoding.options)
        codec = prompt.backbone.codec
        texts = decoding.texts(codec, ids)
        raw_texts = codec.decode(ids)
        logprobs = _mean_logprobs(prompt, view, rows, texts)
        generated = []
        for tokens, raw, text, logprob in zip(ids.tolist(), raw_texts, texts, logprobs, strict=True):
            stops = [place for place, token in enumerate(tokens) if token in codec.stop]
            has_stop_text = any(stop in raw for stop in decoding.stop)
            num_tokens = stops[0] if stops else sum(token != codec.pad_id for token in tokens)
            generated.append(Generated(text, bool(stops) or has_stop_text, num_tokens, logprob))
        return generated

    def mean_logprobs(self, step: Step, rows: Sequence[Mapping[str, str]], texts: Sequence[str]) -> list[float | None]:
        """Returns the mean log-probability of the tokens of each text as the text of a step; None for empty texts."""
        prompt = self._prompt(step)
        return _mean_logprobs(prompt, prompt.view(None), rows, texts)


def _mean_logprobs(
    prompt: Prompt, view: TaskView, rows: Sequence[Mapping[str, str]], texts: Sequence[str]
) -> list[float | None]:
    """Returns the mean log-probability of the tokens of each text; None for empty texts."""
    codec, row_format = prompt.backbone.codec, view.format
    positions = [b for b, text in enumerate(texts) if text]
    logprobs: list[float | None] = [None] * len(texts)
    if not positions:
        return logprobs
    encoded = [row_format.encode(codec, row_format.fields(rows[b]), texts[b]) for b in positions]
    batch = codec.collate(encoded).to(prompt.backbone.word_embeddings.device)
    with torch.inference_mode():
        losses: Tensor = prompt.method.lm().cross_entropy(batch)  # [B, U]
    counts = (batch.targets != IGNORE).sum(1).clamp(min=1)
    means = -losses.sum(1) / counts
    for b, mean in zip(positions, means.tolist(), strict=True):
        logprobs[b] = round(mean, 4)
    return logprobs


def derive_seed(*parts: Any) -> int:
    """Returns a seed that depends on all parts, such as the seed of a file and the number of a row.

    >>> derive_seed(0, "text", 1) != derive_seed(0, "text", 2)
    True
    """
    digest = sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4])
