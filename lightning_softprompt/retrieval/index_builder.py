"""Building an index, and bringing one up to date.

All is written to a folder of its own, and the manifest, which names that folder, last: whoever opens the index finds
the old state or the new one, and a build that is killed leaves the old. Passages that were there keep their words and
their vectors, so an update reads and cuts the corpus, but stems and encodes only what is new. Vectors, which take
longest by far, are kept as they are made, and the next build goes on with those of one that was killed.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from lightning_softprompt.retrieval import vector_log
from lightning_softprompt.retrieval.index import DENSE, EMBEDDED, LEXICAL, Index, open_store
from lightning_softprompt.retrieval.manifest import (
    FORMAT,
    NAME,
    BadIndexError,
    Manifest,
    check_files,
    describe_files,
    package_versions,
)
from lightning_softprompt.retrieval.passages.documents import CorpusError, Document
from lightning_softprompt.retrieval.passages.text_files import Passages, Texts, write_documents, write_passages
from lightning_softprompt.retrieval.passages.words import words
from lightning_softprompt.retrieval.search.bm25 import write_lexical
from lightning_softprompt.retrieval.search.settings import IndexSettings
from lightning_softprompt.retrieval.search.vectors import FileVectors, Vectors
from lightning_softprompt.retrieval.trusted_names import check_trusted, trust_settings
from lightning_softprompt.retrieval.vector_log import Track
from lightning_softprompt.system.atomic_files import write_folder
from lightning_softprompt.system.file_locks import lock_file

log = logging.getLogger(__name__)
GENERATION, DRAFT = "generation-", ".draft-"


def iterate(items: Iterable[Any], doing: str, total: int | None) -> Iterable[Any]:
    """Shows nothing."""
    return items


def build_index(
    folder: str | Path, documents: Iterable[Document], settings: IndexSettings | None = None, track: Track = iterate
) -> Manifest:
    """Makes an index hold these documents and no others, with what it had of them.

    Args:
        folder: Where; made if it is not there.
        documents: The whole corpus.
        settings: What it is made with; other settings than before make anew what they change.
        track: Shows progress.

    Raises:
        CorpusError: If the corpus cannot be indexed; the index stays as it was.
        BadIndexError: If the folder holds something else, or another build writes it.
        ValueError: If a package or the encoder is missing.
    """
    trust_settings(settings or IndexSettings())
    with _lock_folder(Path(folder).expanduser()) as place:
        return _build(place, documents, settings or IndexSettings(), _open_earlier(place), track)


def update_index(
    folder: str | Path, add: Iterable[Document] = (), remove: Collection[str] = (), track: Track = iterate
) -> Manifest:
    """Adds documents to an index, in place of those with the same id, and removes others.

    Args:
        folder: The index.
        add: New or changed documents.
        remove: Ids of documents.
        track: Shows progress.

    Raises:
        CorpusError: If an id to remove is not there, or the corpus that results cannot be indexed.
        BadIndexError: If there is no index, or it is damaged.
        ValueError: If a package or the encoder is missing.
    """
    with _lock_folder(Path(folder).expanduser()) as place:
        index = Index(place)
        check_files(place, index.manifest)
        check_trusted(place, index.manifest.settings, encoder=True)
        return _build(place, _merge(index, add, remove), index.manifest.settings, index, track)


def _merge(index: Index, add: Iterable[Document], remove: Collection[str]) -> Iterator[Document]:
    new: dict[str, Document] = {}
    for document in add:
        if new.setdefault(document.id, document) != document:
            raise CorpusError(f"{document.source}: the id {document.id!r} was given twice. Give each an id of its own")
    gone = set(remove)
    for document in index.passages.texts:
        if document.id not in gone:
            yield new.pop(document.id, document)
        gone.discard(document.id)
    if gone:
        raise CorpusError(_describe_missing(index, sorted(gone)))
    yield from new.values()


def _describe_missing(index: Index, gone: list[str]) -> str:
    near = get_close_matches(gone[0], [document.id for document in index.passages.texts])
    hint = f"Did you mean {' or '.join(near)}?" if near else "Name ids as the corpus has them"
    return f"{index.folder} has no document {gone[0]!r} to remove ({len(gone)} such ids). {hint}"


class _UnchangedError(Exception):
    """The corpus is the one that the index holds."""


def _build(
    place: Path, documents: Iterable[Document], settings: IndexSettings, earlier: Index | None, track: Track
) -> Manifest:
    generation, collection = f"{GENERATION}{uuid4().hex[:12]}", f"passages-{uuid4().hex}"
    written: list[Manifest] = []
    start = Manifest(FORMAT, generation, collection, "", settings, 0, 0, 0, 0, package_versions(), {})
    try:
        write_folder(
            place / generation, lambda draft: written.append(_write(draft, place, documents, start, earlier, track))
        )
    except _UnchangedError:
        assert earlier, "nothing else can be unchanged"
        return earlier.manifest
    manifest = replace(written[0], files=describe_files(place / generation))
    manifest.write(place)
    _remove_old_files(place, manifest, earlier)
    return manifest


def _write(
    draft: Path, place: Path, documents: Iterable[Document], start: Manifest, earlier: Index | None, track: Track
) -> Manifest:
    settings = start.settings
    draft.chmod(place.stat().st_mode)  # drafts are the maker's own, an index is for whom its folder is for
    corpus, count = write_documents(draft, track(documents, "reading", None))
    if earlier and (earlier.manifest.corpus, earlier.manifest.settings) == (corpus, settings):
        raise _UnchangedError
    left_out = write_passages(draft, settings.chunking(), track(Texts(draft), "cutting", count))
    passages = Passages(draft)
    known = earlier.passages.by_digest() if earlier else {}
    _write_words(draft, passages, settings, earlier, known, track)
    manifest = replace(start, corpus=corpus, documents=count, passages=len(passages), duplicates=left_out)
    if settings.encoder is None:
        return manifest
    same = earlier if earlier and _can_reuse_vectors(earlier, settings) else None
    manifest = replace(manifest, collection=same.manifest.collection if same else start.collection)
    return replace(manifest, width=_write_vectors(draft, place, passages, manifest, same, track))


def _write_words(
    draft: Path,
    passages: Passages,
    settings: IndexSettings,
    earlier: Index | None,
    known: dict[bytes, int],
    track: Track,
) -> None:
    old = earlier if earlier and earlier.manifest.settings.language == settings.language else None
    tokens = []
    for row in track(range(len(passages)), "finding words", len(passages)):
        before = known.get(passages.digests[row].tobytes()) if old else None
        kept = old.bm25.words(before) if old and before is not None else None
        tokens.append(kept if kept is not None else words(passages[row].searched, settings.language))
    (draft / LEXICAL).mkdir()
    write_lexical(draft / LEXICAL, tokens, settings)


def _write_vectors(
    draft: Path, place: Path, passages: Passages, manifest: Manifest, same: Index | None, track: Track
) -> int:
    """Keeps a vector for each passage; gives H. `same` is an earlier state with vectors of the same encoder."""
    (draft / DENSE).mkdir()
    store = open_store(place, draft, manifest, None)
    encode = partial(vector_log.encode_passages, place, passages, str(manifest.settings.encoder), track)
    try:
        return store.write(np.asarray(passages.digests), encode, _kept(same))
    except BaseException:
        if same is None:
            store.delete()
        raise
    finally:
        store.close()


def _kept(same: Index | None) -> Vectors | None:
    """The vectors of an earlier state in files; those in a database stay where they are."""
    if same is None or same.manifest.settings.store == "qdrant":
        return None
    return Vectors(same.passages.by_digest(), FileVectors(same.files / DENSE, "flat").vectors)


def _can_reuse_vectors(earlier: Index, settings: IndexSettings) -> bool:
    """Whether an earlier state has vectors that serve here: of the same encoder, in the same kind of place."""
    before = earlier.manifest.settings
    if settings.encoder is None or before.encoder != settings.encoder or before.url != settings.url:
        return False
    if (before.store == "qdrant") != (settings.store == "qdrant"):
        return False
    try:
        earlier.vector_store.close()
    except ValueError as error:
        log.warning("all passages are encoded anew: %s", error)
        return False
    return True


@contextmanager
def _lock_folder(place: Path) -> Iterator[Path]:
    """Holds a folder for one build alone, and takes it away again where nothing came of it."""
    place.mkdir(parents=True, exist_ok=True)
    opened = os.open(place, os.O_RDONLY)
    try:
        _lock(opened, place)
    except BaseException:  # another build holds the folder, and what stands there is its own
        os.close(opened)
        raise
    try:
        for draft in place.glob(f"{DRAFT}*"):  # of a build that was killed
            shutil.rmtree(draft, ignore_errors=True)
        yield place
    finally:
        os.close(opened)
        if not (place / NAME).exists():
            shutil.rmtree(place / EMBEDDED, ignore_errors=True)
        with suppress(OSError):
            place.rmdir()  # only where it is empty


def _lock(opened: int, place: Path) -> None:
    try:
        lock_file(opened, place)
    except BlockingIOError:
        raise BadIndexError(f"another build is writing {place}; wait for its end, or build elsewhere") from None


def _open_earlier(place: Path) -> Index | None:
    """What a folder holds of an index that can be built on.

    Raises:
        BadIndexError: If it holds something else.
    """
    found = [path.name for path in place.iterdir() if not path.name.startswith(vector_log.NAME)]
    ours = [name for name in found if name.startswith(GENERATION) or name == EMBEDDED]
    others = sorted(set(found) - {*ours, NAME})
    if others or (NAME in found and not ours):
        raise BadIndexError(f"{place} holds {', '.join((others or found)[:3])}, so it is no index. Name another folder")
    if NAME not in found:
        shutil.rmtree(place / EMBEDDED, ignore_errors=True)  # of a first build that was killed
        return None
    try:
        index = Index(place)
        check_files(place, index.manifest)
    except BadIndexError as error:
        log.warning("the index is built from nothing: %s", error)
        return None
    return index


def _remove_old_files(place: Path, manifest: Manifest, earlier: Index | None) -> None:
    """Takes away what no index names any more."""
    vector_log.delete_logs(place)
    for path in place.glob(f"{GENERATION}*"):
        if path.name != manifest.generation:
            shutil.rmtree(path, ignore_errors=True)
    if earlier and earlier.manifest.settings.encoder is not None:
        store = open_store(place, earlier.files, earlier.manifest, None)
        if earlier.manifest.collection == manifest.collection:
            store.prune(np.asarray(Passages(place / manifest.generation).digests))
        else:
            store.delete()
        store.close()
