"""Windows of evaluations that follow a context without loss, as published perplexities do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import cast

from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import Example, WindowExample
from lightning_softprompt.data.corpus.windows import Window, find_context
from lightning_softprompt.data.readers.rows import Origin
from lightning_softprompt.data.splits.row_encoder import RowEncoder

CONTEXT = "context"  # the field of a window that has no loss


def divide_by_stride(
    examples: Sequence[Example], origins: Sequence[Origin], divide: Callable[[str], Iterable[Window]], room: int
) -> tuple[list[Example], list[Origin]]:
    """Divides the documents of windows into shorter windows, each with the text before it as context.

    Args:
        examples: Windows that join to their documents.
        origins: Where each comes from.
        divide: Divides a document into windows.
        room: Maximum bytes of a context.
    """
    divided: list[Example] = []
    places: list[Origin] = []
    pairs = zip(examples, origins, strict=True)
    for _, group in groupby(pairs, key=lambda pair: cast(WindowExample, pair[0]).document):
        windows, of_document = zip(*group, strict=True)
        text = "".join(window.target for window in windows)
        for example in windows_with_context(windows[0], text, divide(text), room):
            places.append(replace(of_document[0], index=len(places)))
            divided.append(example)
    return divided, places


def windows_with_context(
    document: WindowExample, text: str, windows: Iterable[Window], room: int
) -> Iterator[WindowExample]:
    """Yields the windows of a document with their contexts."""
    content, start = text.encode(), 0
    for window in windows:
        context = content[find_context(content, start, room) : start].decode()
        yield replace(
            document,
            fields={CONTEXT: context},
            target=window.text,
            num_bytes=window.num_bytes,
            num_words=window.num_words,
            ends_text=False,
        )
        start += window.num_bytes


def encode_context(encoder: RowEncoder) -> RowEncoder:
    """Returns an encoder of windows whose context precedes the target, and is truncated at its start to fit."""
    text = encoder.template.text.replace("{target}", f"{{{CONTEXT}}}{{target}}")
    return replace(encoder, template=Template(text, [CONTEXT]), truncation_side="start")
