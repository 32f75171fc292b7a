"""An index that is there when a run needs it, and holds the corpus that the run names."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning_softprompt.data.readers.corpora import Columns, read_documents
from lightning_softprompt.data.readers.sources import DataError
from lightning_softprompt.retrieval.chosen import choose_settings
from lightning_softprompt.retrieval.index import Index
from lightning_softprompt.retrieval.index_builder import build_index
from lightning_softprompt.retrieval.manifest import NAME
from lightning_softprompt.retrieval.passages.documents import Document, content_digest
from lightning_softprompt.retrieval.search.settings import IndexSettings

log = logging.getLogger(__name__)
WAY_OUT = "Remove the folder to have it built anew, or name another one as the retriever's index"


def ensure_index(
    folder: str | Path, corpus: str, settings: IndexSettings | None = None, columns: Columns | None = None
) -> None:
    """Builds an index of a corpus where there is none, and looks whether one that is there holds the corpus.

    Args:
        folder: The index.
        corpus: Its source, as `softprompt index build` takes it.
        settings: What it is made with; None takes the default to build one, and any where there is one.
        columns: Which columns of the corpus hold what.

    Raises:
        DataError: If the corpus cannot be read, or the index is of another corpus or made with other settings.
        ValueError: If the index is damaged or cannot be built.
    """
    place = Path(folder).expanduser()
    if not (place / NAME).exists():
        log.info("%s is built from %s", place, corpus)
        build_index(place, read_documents(corpus, columns), settings, tracked)
        return
    if settings is not None:
        choose_settings(settings)
    index = Index(place)
    _check_settings(index, settings)
    if told := _difference(index.passages.texts, read_documents(corpus, columns)):
        raise DataError(f"{place} does not hold the corpus {corpus}: {told}. {WAY_OUT}")


def tracked(items: Iterable[Any], doing: str, total: int | None) -> Iterable[Any]:
    """Shows a bar on standard error, where that is a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, doing, total, console=console, transient=True, disable=not console.is_terminal)


def _check_settings(index: Index, settings: IndexSettings | None) -> None:
    before, now = index.manifest.settings.plain(), {} if settings is None else settings.plain()
    differ = [f"{name} was {before[name]!r} and is {value!r}" for name, value in now.items() if value != before[name]]
    if differ:
        raise DataError(f"{index.folder} was built with other settings: {', '.join(differ)}. {WAY_OUT}")


def _difference(there: Iterable[Document], here: Iterable[Document]) -> str | None:
    """What tells two corpora apart, of the first document that does."""
    before, now = _contents(there), _contents(here)
    if new := next((name for name in now if name not in before), None):
        return f"it lacks the document {new!r}"
    if gone := next((name for name in before if name not in now), None):
        return f"its document {gone!r} is not in the corpus"
    changed = next((name for name, content in now.items() if before[name] != content), None)
    return None if changed is None else f"the document {changed!r} was another"


def _contents(documents: Iterable[Document]) -> dict[str, bytes]:
    return {document.id: content_digest(f"{document.title}\n{document.text}") for document in documents}
