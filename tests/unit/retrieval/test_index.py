"""Searches of an index, and indexes that are damaged or do not fit."""

import json
import os
import pickle
import shutil
import sys
import time

import numpy as np
import pytest
from index_documents import CHANGES, LEXICAL, LONG, TEXTS, make_documents, search_documents

from lightning_softprompt.retrieval.index import Index
from lightning_softprompt.retrieval.index_builder import build_index, update_index
from lightning_softprompt.retrieval.manifest import BadIndexError, check_files
from lightning_softprompt.retrieval.passages.documents import CorpusError, Document
from lightning_softprompt.retrieval.retriever import Retriever
from lightning_softprompt.retrieval.search.encoder import load_encoder
from lightning_softprompt.retrieval.search.settings import IndexSettings


def test_a_hit_is_a_passage_with_its_document_title_source_and_score(folder):
    build_index(folder, make_documents(), LEXICAL)
    hit = Retriever(str(folder), "lexical").search(["funny films"], 1)[0][0]
    assert vars(hit.passage) == {
        "document": "film",
        "title": "Film",
        "text": TEXTS["film"],
        "source": "corpus.jsonl:1",
        "start": 0,
        "end": len(TEXTS["film"]),
    }
    assert hit.passage.id == "film:0"
    assert hit.score > 0


def test_lexical_search_uses_titles_and_stems_and_ignores_accents(folder):
    documents = make_documents({"um": "O acadêmico poderá solicitar", "dois": "Nada disso"})
    build_index(folder, documents, IndexSettings(encoder=None, language="portuguese"))
    assert search_documents(folder, "academicos") == ["um"]
    assert search_documents(folder, "acadêmica") == ["um"]
    assert search_documents(folder, "DOIS") == ["dois"]


def test_each_mode_finds_the_passage_that_equals_the_question(folder, dense):
    build_index(folder, make_documents(), dense)
    for mode in ("lexical", "dense", "hybrid"):
        assert search_documents(folder, TEXTS["film"], mode, 1) == ["film"]
    assert len(search_documents(folder, "a dog", "dense", 100)) == len(Index(folder))


def test_retrievers_and_indexes_can_be_pickled(folder):
    build_index(folder, make_documents(), LEXICAL)
    retriever = Retriever(str(folder), "lexical")
    hits = retriever.search(["sad dog"])
    assert pickle.loads(pickle.dumps(retriever)).search(["sad dog"]) == hits
    assert pickle.loads(pickle.dumps(Index(folder))).manifest == Index(folder).manifest


def test_a_search_writes_nothing(folder, dense):
    build_index(folder, make_documents(), dense)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    os.sync()
    time.sleep(0.01)
    Retriever(str(folder)).search(["a dog"])
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times
    index = Index(folder)
    with pytest.raises(ValueError, match="read-only"):
        index.vector_store.vectors[0] = 0
    assert isinstance(index.passages.rows, np.memmap)


def test_an_index_has_the_permissions_of_its_folder(folder):
    folder.mkdir(mode=0o750)
    manifest = build_index(folder, make_documents(), LEXICAL)
    assert (folder / manifest.generation).stat().st_mode == folder.stat().st_mode


# Corpora


def test_duplicate_passages_are_indexed_once(folder):
    duplicates = [Document("copy", "Film", "a  warm and\nfunny film"), Document("film", "Film", TEXTS["film"])]
    manifest = build_index(folder, [*make_documents(), *duplicates], LEXICAL)
    assert (manifest.documents, manifest.passages, manifest.duplicates) == (5, 4, 1)
    assert search_documents(folder, "funny") == ["film"]
    assert update_index(folder, remove=["film"]).duplicates == 0
    assert search_documents(folder, "funny") == ["copy"]


def test_an_id_of_two_documents_is_reported_with_both_lines(folder):
    message = r"b\.jsonl:2: the id 'film' belongs to another document at corpus\.jsonl:1"
    with pytest.raises(CorpusError, match=message):
        build_index(folder, [*make_documents(), Document("film", "", "another", "b.jsonl:2")], LEXICAL)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], "has no documents"),
        ([Document("a", "", "  ")], "no document of the corpus has a word"),
        ([Document("a", "", ".. !")], "no passage has a letter or digit"),
    ],
)
def test_a_corpus_without_words_is_rejected_before_a_folder_is_created(folder, documents, message):
    with pytest.raises(CorpusError, match=message):
        build_index(folder, documents, LEXICAL)
    assert not folder.exists()


# Damaged and foreign indexes


def truncate_manifest(folder):
    manifest = folder / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:100])


def edit_manifest(folder):
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"k1": 1.5', '"k1": 2.5'))


def write_other_format(folder):
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 7}))


def write_foreign_manifest(folder):
    (folder / "manifest.json").write_text('{"name": "a web page"}')


def remove_manifest(folder):
    (folder / "manifest.json").unlink()


def truncate_file(folder):
    os.truncate(folder / Index(folder).manifest.generation / "passages.npy", 100)


def remove_file(folder):
    (folder / Index(folder).manifest.generation / "lexical" / "data.csc.index.npy").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate_manifest, "or is damaged"),
        (edit_manifest, r"manifest\.json was changed after it was written\. Build the index again"),
        (write_other_format, "is an index of format 7; this version reads 2"),
        (write_foreign_manifest, "is not a manifest of an index"),
        (remove_manifest, r"is not an index, since it has no manifest\.json"),
        (truncate_file, r"passages\.npy has 100 bytes, expected \d+"),
        (remove_file, r"data\.csc\.index\.npy is missing"),
    ],
)
def test_a_damaged_or_foreign_index_is_rejected_and_can_be_rebuilt(folder, damage, message):
    build_index(folder, make_documents(), LEXICAL)
    damage(folder)
    with pytest.raises(BadIndexError, match=message):
        Index(folder)
    with pytest.raises(BadIndexError, match=message):
        update_index(folder, remove=["dog"])
    build_index(folder, make_documents(), LEXICAL)
    assert search_documents(folder, "funny") == ["film"]


def test_a_changed_byte_is_found_by_the_check_of_files(folder):
    manifest = build_index(folder, make_documents(), LEXICAL)
    file = folder / manifest.generation / "passages.npy"
    content = bytearray(file.read_bytes())
    content[-8] = 1
    file.write_bytes(content)
    Index(folder)
    with pytest.raises(BadIndexError, match=r"passages\.npy has changed"):
        check_files(folder, manifest)
    build_index(folder, make_documents(), LEXICAL)
    check_files(folder, Index(folder).manifest)


def test_an_index_is_not_built_in_a_folder_with_other_files(folder):
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(BadIndexError, match=r"contains thesis\.tex, so it is not an index"):
        build_index(folder, make_documents(), LEXICAL)
    with pytest.raises(BadIndexError, match="there is no index"):
        Index(folder / "none")
    assert (folder / "thesis.tex").read_text() == "years of work"


def test_another_encoder_with_the_same_name_is_rejected_until_the_index_is_rebuilt(
    folder, tiny_folder, tmp_path, caplog
):
    settings = IndexSettings(encoder=str(tmp_path / "encoder"))
    shutil.copytree(tiny_folder("bert"), settings.encoder)
    build_index(folder, make_documents(), settings)
    shutil.copytree(tiny_folder("bert", 1), settings.encoder, dirs_exist_ok=True)
    load_encoder.cache_clear()
    with pytest.raises(ValueError, match="is not the one that"):
        Retriever(str(folder)).search(["a dog"])
    build_index(folder, make_documents(CHANGES["added"]), settings)
    assert "all passages are encoded again" in caplog.text
    assert search_documents(folder, TEXTS["film"], "dense", 1) == ["film"]


# Settings


def test_other_settings_rebuild_the_index(folder, dense):
    documents = make_documents({**TEXTS, "long": LONG})
    build_index(folder, documents, LEXICAL)
    short_passages = build_index(folder, documents, IndexSettings(size=10, overlap=5, encoder=None))
    assert short_passages.passages > 10
    assert build_index(folder, make_documents(), dense).width == 32
    assert search_documents(folder, "a dog", "dense")


def test_dense_search_requires_vectors(folder):
    build_index(folder, make_documents(), LEXICAL)
    with pytest.raises(ValueError, match="has no vectors, since it was built without an encoder; use mode lexical"):
        Retriever(str(folder)).search(["a dog"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"store": "annoy"}, "store must be one of flat"),
        ({"whole": "words"}, "whole must be one of sentences"),
        ({"url": "here:6333"}, "set store to qdrant"),
        ({"b": 2.0}, "BM25 requires"),
        ({"size": 0}, "overlap must be at least 0 and below size"),
    ],
)
def test_invalid_settings_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        IndexSettings(**options)


def test_an_unknown_language_is_reported_with_the_known_ones(folder):
    with pytest.raises(ValueError, match="no stems of 'klingon' are known; known: none, arabic"):
        build_index(folder, make_documents(), IndexSettings(encoder=None, language="klingon"))
    assert not folder.exists()


@pytest.mark.parametrize(("package", "extra"), [("bm25s", "rag"), ("faiss", "rag"), ("qdrant_client", "qdrant")])
def test_a_missing_package_is_reported_with_its_extra(folder, dense, monkeypatch, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    settings = IndexSettings(encoder=dense.encoder, store="qdrant" if extra == "qdrant" else "flat")
    message = rf"requires the package {package}; pip install 'lightning-softprompt\[{extra}\]'"
    with pytest.raises(ValueError, match=message):
        build_index(folder, make_documents(), settings)
