"""Vectors in Qdrant, embedded: the same client and calls as with a server."""

import numpy as np
import pytest

from lightning_softprompt.retrieval.index import Index
from lightning_softprompt.retrieval.index_builder import build_index
from lightning_softprompt.retrieval.passages.documents import Document
from lightning_softprompt.retrieval.retriever import Retriever
from lightning_softprompt.retrieval.search import encoder
from lightning_softprompt.retrieval.search.settings import IndexSettings

pytest.importorskip("qdrant_client")

TEXTS = ["a warm and funny film", "the dog is sad", "a story about a dog", "great , very great indeed", "dull"]


def documents(texts=TEXTS):
    return [Document(text, "", text) for text in texts]


@pytest.fixture
def name(tiny_folder):
    return str(tiny_folder("bert"))


def points(folder):
    index = Index(folder)
    store = index.vector_store
    found = store.client.count(store.collection).count
    store.close()
    return found


def test_it_finds_what_files_find(tmp_path, name):
    rankings = {}
    for store in ("flat", "qdrant"):
        build_index(tmp_path / store, documents(), IndexSettings(encoder=name, store=store))
        index = Index(tmp_path / store)
        rankings[store] = index.dense(["a dog", "a great film"], 4)
        index.vector_store.close()
    for files, qdrant in zip(*rankings.values(), strict=True):
        assert files.rows.tolist() == qdrant.rows.tolist()
        np.testing.assert_allclose(files.scores, qdrant.scores, atol=1e-5)


def test_an_update_sends_what_is_new_and_removes_what_is_gone(tmp_path, name, monkeypatch):
    settings = IndexSettings(encoder=name, store="qdrant")
    first = build_index(tmp_path, documents(), settings)
    encoded, plain = [], encoder.SentenceEncoder.passages
    monkeypatch.setattr(encoder.SentenceEncoder, "passages", lambda e, t: encoded.extend(t) or plain(e, t))
    second = build_index(tmp_path, documents([*TEXTS[1:], "a wonderful thing"]), settings)
    assert encoded[1:] == ["a wonderful thing"]
    assert second.collection == first.collection
    assert points(tmp_path) == 5


def test_points_of_a_build_that_died_are_not_found_and_not_sent_again(tmp_path, name, monkeypatch):
    settings = IndexSettings(encoder=name, store="qdrant")
    build_index(tmp_path, documents(), settings)
    new = ["a dog", "dog", "the dog"]
    with monkeypatch.context() as patched:
        patched.setattr("lightning_softprompt.retrieval.manifest.Manifest.write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build_index(tmp_path, documents([*TEXTS, *new]), settings)
    assert points(tmp_path) == 8
    retriever = Retriever(str(tmp_path), "dense")
    hits = retriever.search(["a dog"], 5)[0]
    assert {hit.passage.text for hit in hits} == set(TEXTS)
    retriever.index.vector_store.close()
    encoded, plain = [], encoder.SentenceEncoder.passages
    monkeypatch.setattr(encoder.SentenceEncoder, "passages", lambda e, t: encoded.extend(t) or plain(e, t))
    build_index(tmp_path, documents([*TEXTS, *new]), settings)
    assert encoded[1:] == []
    assert points(tmp_path) == 8


def test_another_encoder_takes_the_old_collection_away(tmp_path, name, tiny_folder):
    first = build_index(tmp_path, documents(), IndexSettings(encoder=name, store="qdrant"))
    second = build_index(tmp_path, documents(), IndexSettings(encoder=str(tiny_folder("bert", 1)), store="qdrant"))
    assert first.collection != second.collection
    store = Index(tmp_path).vector_store
    assert [c.name for c in store.client.get_collections().collections] == [second.collection]
    store.close()


def test_embedded_it_serves_one_at_a_time(tmp_path, name):
    build_index(tmp_path, documents(), IndexSettings(encoder=name, store="qdrant"))
    store = Index(tmp_path).vector_store
    with pytest.raises(ValueError, match="in use by another process, and embedded Qdrant serves one at a time"):
        Retriever(str(tmp_path), "dense").search(["a dog"])
    store.close()
    assert Retriever(str(tmp_path), "dense").search(["a dog"])[0]


def test_a_first_build_that_fails_leaves_nothing(tmp_path, name, monkeypatch):
    monkeypatch.setattr(encoder.SentenceEncoder, "passages", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_index(tmp_path / "index", documents(), IndexSettings(encoder=name, store="qdrant"))
    assert not (tmp_path / "index").exists()


def test_a_server_that_does_not_answer_is_told(tmp_path, name):
    settings = IndexSettings(encoder=name, store="qdrant", url="http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"no Qdrant answers at http://127\.0\.0\.1:9"):
        build_index(tmp_path / "index", documents(), settings)
    assert not (tmp_path / "index").exists()
