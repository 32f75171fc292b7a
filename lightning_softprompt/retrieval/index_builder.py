"""Builds and updates indexes.

A build writes all files to a new folder, and then the manifest, which names that folder. Readers see the old state or
the new one, and an interrupted build leaves the old state. Unchanged passages reuse their words and vectors, so an
update reads and splits the corpus, but stems and encodes only new passages. Vectors, which take most of the time, are
logged while they are encoded, and the next build resumes with the vectors of an interrupted one.
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
    """Returns the items without showing progress."""
    return items


def build_index(
    folder: str | Path, documents: Iterable[Document], settings: IndexSettings | None = None, track: Track = iterate
) -> Manifest:
    """Builds an index of exactly these documents, and reuses the files of an existing index.

    Args:
        folder: Folder of the index; created if it does not exist.
        documents: All documents of the corpus.
        settings: Settings of the index; files that depend on changed settings are built again.
        track: Shows progress.

    Raises:
        CorpusError: If the corpus cannot be indexed; the index is unchanged.
        BadIndexError: If the folder contains other files, or another build writes it.
        ValueError: If a package or the encoder is missing.
    """
    trust_settings(settings or IndexSettings())
    with _lock_folder(Path(folder).expanduser()) as place:
        return _build(place, documents, settings or IndexSettings(), _open_earlier(place), track)


def update_index(
    folder: str | Path, add: Iterable[Document] = (), remove: Collection[str] = (), track: Track = iterate
) -> Manifest:
    """Adds documents to an index, which replace documents with the same id, and removes documents.

    Args:
        folder: Folder of the index.
        add: New or changed documents.
        remove: Ids of documents to remove.
        track: Shows progress.

    Raises:
        CorpusError: If an id to remove does not exist, or the resulting corpus cannot be indexed.
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
            raise CorpusError(f"{document.source}: the id {document.id!r} occurs twice. Use a unique id per document")
    to_remove = set(remove)
    for document in index.passages.texts:
        if document.id not in to_remove:
            yield new.pop(document.id, document)
        to_remove.discard(document.id)
    if to_remove:
        raise CorpusError(_describe_missing(index, sorted(to_remove)))
    yield from new.values()


def _describe_missing(index: Index, missing: list[str]) -> str:
    near = get_close_matches(missing[0], [document.id for document in index.passages.texts])
    hint = f"Did you mean {' or '.join(near)}?" if near else "Use the ids of the corpus"
    return f"{index.folder} has no document {missing[0]!r} to remove ({len(missing)} missing ids). {hint}"


class _UnchangedError(Exception):
    """The index already contains the corpus."""


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
        assert earlier, "only an existing index can be unchanged"
        return earlier.manifest
    manifest = replace(written[0], files=describe_files(place / generation))
    manifest.write(place)
    _remove_old_files(place, manifest, earlier)
    return manifest


def _write(
    draft: Path, place: Path, documents: Iterable[Document], start: Manifest, earlier: Index | None, track: Track
) -> Manifest:
    settings = start.settings
    draft.chmod(place.stat().st_mode)  # a draft is private; an index has the access rights of its folder
    corpus, count = write_documents(draft, track(documents, "reading", None))
    if earlier and (earlier.manifest.corpus, earlier.manifest.settings) == (corpus, settings):
        raise _UnchangedError
    left_out = write_passages(draft, settings.chunking(), track(Texts(draft), "splitting", count))
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
    for row in track(range(len(passages)), "stemming", len(passages)):
        before = known.get(passages.digests[row].tobytes()) if old else None
        kept = old.bm25.words(before) if old and before is not None else None
        tokens.append(kept if kept is not None else words(passages[row].searched, settings.language))
    (draft / LEXICAL).mkdir()
    write_lexical(draft / LEXICAL, tokens, settings)


def _write_vectors(
    draft: Path, place: Path, passages: Passages, manifest: Manifest, same: Index | None, track: Track
) -> int:
    """Writes a vector for each passage; returns H. `same` is an earlier state with vectors of the same encoder."""
    (draft / DENSE).mkdir()
    store = open_store(place, draft, manifest, None)
    encode = partial(vector_log.encode_passages, place, passages, str(manifest.settings.encoder), track)
    try:
        return store.write(np.asarray(passages.digests), encode, _reusable_vectors(same))
    except BaseException:
        if same is None:
            store.delete()
        raise
    finally:
        store.close()


def _reusable_vectors(same: Index | None) -> Vectors | None:
    """Returns the vectors of an earlier state in files. Vectors in a database are not copied."""
    if same is None or same.manifest.settings.store == "qdrant":
        return None
    return Vectors(same.passages.by_digest(), FileVectors(same.files / DENSE, "flat").vectors)


def _can_reuse_vectors(earlier: Index, settings: IndexSettings) -> bool:
    """Whether the vectors of an earlier state can be used: same encoder, same kind of store."""
    before = earlier.manifest.settings
    if settings.encoder is None or before.encoder != settings.encoder or before.url != settings.url:
        return False
    if (before.store == "qdrant") != (settings.store == "qdrant"):
        return False
    try:
        earlier.vector_store.close()
    except ValueError as error:
        log.warning("all passages are encoded again: %s", error)
        return False
    return True


@contextmanager
def _lock_folder(place: Path) -> Iterator[Path]:
    """Locks a folder for one build, and removes it if the build wrote nothing."""
    place.mkdir(parents=True, exist_ok=True)
    opened = os.open(place, os.O_RDONLY)
    try:
        _lock(opened, place)
    except BaseException:  # another build has locked the folder; its files are not touched
        os.close(opened)
        raise
    try:
        for draft in place.glob(f"{DRAFT}*"):  # of an interrupted build
            shutil.rmtree(draft, ignore_errors=True)
        yield place
    finally:
        os.close(opened)
        if not (place / NAME).exists():
            shutil.rmtree(place / EMBEDDED, ignore_errors=True)
        with suppress(OSError):
            place.rmdir()  # only if it is empty


def _lock(opened: int, place: Path) -> None:
    try:
        lock_file(opened, place)
    except BlockingIOError:
        raise BadIndexError(f"another build is writing {place}; wait for it, or build in another folder") from None


def _open_earlier(place: Path) -> Index | None:
    """Opens the existing index of a folder; None if there is none, or it is damaged.

    Raises:
        BadIndexError: If the folder contains other files.
    """
    names = [path.name for path in place.iterdir() if not path.name.startswith(vector_log.NAME)]
    ours = [name for name in names if name.startswith(GENERATION) or name == EMBEDDED]
    others = sorted(set(names) - {*ours, NAME})
    if others or (NAME in names and not ours):
        examples = ", ".join((others or names)[:3])
        raise BadIndexError(f"{place} contains {examples}, so it is not an index. Set another folder")
    if NAME not in names:
        shutil.rmtree(place / EMBEDDED, ignore_errors=True)  # of an interrupted first build
        return None
    try:
        index = Index(place)
        check_files(place, index.manifest)
    except BadIndexError as error:
        log.warning("the index is built from scratch: %s", error)
        return None
    return index


def _remove_old_files(place: Path, manifest: Manifest, earlier: Index | None) -> None:
    """Removes the files that the new manifest does not use."""
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
