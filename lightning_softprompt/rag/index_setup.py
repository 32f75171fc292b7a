"""Builds the index of a run, or checks that an existing index contains the corpus of the run."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning_softprompt.data.readers.corpora import Columns, read_documents
from lightning_softprompt.data.readers.sources import DataError
from lightning_softprompt.retrieval.index import Index
from lightning_softprompt.retrieval.index_builder import build_index
from lightning_softprompt.retrieval.manifest import NAME
from lightning_softprompt.retrieval.passages.documents import Document, content_digest
from lightning_softprompt.retrieval.search.settings import IndexSettings
from lightning_softprompt.retrieval.trusted_names import trust_settings

log = logging.getLogger(__name__)
FIX = "Remove the folder to rebuild the index, or set retriever.index to another folder"


def ensure_index(
    folder: str | Path, corpus: str, settings: IndexSettings | None = None, columns: Columns | None = None
) -> None:
    """Builds the index of a corpus, or checks that an existing index contains the corpus.

    Args:
        folder: Folder of the index.
        corpus: Source of the documents, as for `softprompt index build`.
        settings: Settings of the index; None uses the defaults for a new index and accepts any existing index.
        columns: Columns of the corpus.

    Raises:
        DataError: If the corpus cannot be read, or the index has another corpus or other settings.
        ValueError: If the index is damaged or cannot be built.
    """
    path = Path(folder).expanduser()
    if not (path / NAME).exists():
        log.info("Building the index %s from %s", path, corpus)
        build_index(path, read_documents(corpus, columns), settings, track_progress)
        return
    if settings is not None:
        trust_settings(settings)
    index = Index(path)
    _check_settings(index, settings)
    difference = _find_difference(index.passages.texts, read_documents(corpus, columns))
    if difference:
        raise DataError(f"{path} does not contain the corpus {corpus}: {difference}. {FIX}")


def track_progress(items: Iterable[Any], doing: str, total: int | None) -> Iterable[Any]:
    """Shows a progress bar on standard error if it is a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, doing, total, console=console, transient=True, disable=not console.is_terminal)


def _check_settings(index: Index, settings: IndexSettings | None) -> None:
    if settings is None:
        return
    old = index.manifest.settings.plain()
    changed = {name: value for name, value in settings.plain().items() if value != old[name]}
    differences = [f"{name} was {old[name]!r} and is {value!r}" for name, value in changed.items()]
    if differences:
        raise DataError(f"{index.folder} was built with other settings: {', '.join(differences)}. {FIX}")


def _find_difference(indexed: Iterable[Document], corpus: Iterable[Document]) -> str | None:
    """Describes the first document that differs between an index and a corpus; None if they are the same."""
    old, new = _contents(indexed), _contents(corpus)
    for name in new:
        if name not in old:
            return f"it lacks the document {name!r}"
    for name in old:
        if name not in new:
            return f"its document {name!r} is not in the corpus"
    for name, content in new.items():
        if old[name] != content:
            return f"the document {name!r} has changed"
    return None


def _contents(documents: Iterable[Document]) -> dict[str, bytes]:
    return {document.id: content_digest(f"{document.title}\n{document.text}") for document in documents}
