"""Tries the execution paths of the backbone before the first request, which would otherwise wait for the trial."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.core.types import Encoded, Example
from lightning_softprompt.serving.batching.engine import Engine
from lightning_softprompt.serving.batching.jobs import ClassificationJob, Event, GenerationJob
from lightning_softprompt.serving.errors import RequestError
from lightning_softprompt.serving.registry import ServedPrompt
from lightning_softprompt.serving.requests import encode

log = logging.getLogger(__name__)
MOST_PROMPTS = 8  # of a trial
NEVER = float("inf")  # a deadline
Row = tuple[ServedPrompt, Example, Encoded]


def warm_up(engine: Engine, prompts: Sequence[ServedPrompt], num_tokens: int) -> None:
    """Runs a long and a short row of the first prompts, in batches of one prompt and of several.

    Longer rows than these repeat the trial, once for each new maximum.

    Args:
        engine: The engine. The caller is its thread, or has not started it.
        prompts: The prompts.
        num_tokens: Length of the long rows; 0 for no trial.
    """
    first = prompts[:MOST_PROMPTS] if num_tokens else []
    if not first:
        return
    start = time.monotonic()
    with_classes = [served for served in first if served.view.evaluation is not None]
    for served in with_classes[:1]:
        engine.classification.run([ClassificationJob(*row, _ignore, NEVER) for row in _rows(served, num_tokens)])
    if first[0].prompt.backbone.model.can_generate():
        able = [served for served in first if not served.scores_answers]
        for batch in (able[:1], able):
            rows = [row for served in batch for row in _rows(served, num_tokens)]
            decoding = Decoding(max_new_tokens=4)
            engine.generation.run([GenerationJob(*row, _ignore, NEVER, decoding=decoding) for row in rows])
    log.info("Warmed up in %.1f seconds", time.monotonic() - start)


def _rows(served: ServedPrompt, num_tokens: int) -> list[Row]:
    """A long and a short row; none if the prompt has rows of another kind."""
    rows: list[Row] = []
    for text in ("a " * num_tokens, "a"):
        columns = dict.fromkeys(served.columns, "a")
        if served.columns:
            columns[served.columns[0]] = text
        row: str | dict[str, str] = text if served.view.format.chat is not None else columns
        try:
            rows.append((served, *encode(served, row, truncate=True)))
        except RequestError:
            continue
    return rows


def _ignore(event: Event) -> None:
    """Receives the events of rows that nobody waits for."""
