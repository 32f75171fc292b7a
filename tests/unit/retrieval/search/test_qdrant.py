"""Vectors in an embedded Qdrant, which has the same client and calls as a server."""

from dataclasses import replace

import numpy as np
import pytest

from lightning_softprompt.retrieval.index import Index
from lightning_softprompt.retrieval.index_builder import build_index
from lightning_softprompt.retrieval.passages.documents import Document
from lightning_softprompt.retrieval.retriever import Retriever
from lightning_softprompt.retrieval.search.encoder import SentenceEncoder
from lightning_softprompt.retrieval.search.settings import IndexSettings

pytest.importorskip("qdrant_client")

TEXTS = ["a warm and funny film", "the dog is sad", "a story about a dog", "great , very great indeed", "dull"]


def make_documents(texts=TEXTS):
    return [Document(text, "", text) for text in texts]


@pytest.fixture
def settings(tiny_folder):
    return IndexSettings(encoder=str(tiny_folder("bert")), store="qdrant")


def count_points(folder):
    """Returns the number of vectors of an index in Qdrant."""
    store = Index(folder).vector_store
    num_points = store.client.count(store.collection).count
    store.close()
    return num_points


def test_qdrant_and_files_have_the_same_rankings(tmp_path, settings):
    def rank(store):
        build_index(tmp_path / store, make_documents(), replace(settings, store=store))
        index = Index(tmp_path / store)
        rankings = index.dense(["a dog", "a great film"], 4)
        index.vector_store.close()
        return rankings

    for flat, qdrant in zip(rank("flat"), rank("qdrant"), strict=True):
        assert flat.rows.tolist() == qdrant.rows.tolist()
        np.testing.assert_allclose(flat.scores, qdrant.scores, atol=1e-5)


def test_an_update_adds_new_vectors_and_removes_old_ones(folder, settings, record_encoded_texts):
    first = build_index(folder, make_documents(), settings)
    encoded = record_encoded_texts()
    second = build_index(folder, make_documents([*TEXTS[1:], "a wonderful thing"]), settings)
    assert encoded[1:] == ["a wonderful thing"]  # the first text checks whether the encoder is the same
    assert second.collection == first.collection
    assert count_points(folder) == 5


def test_vectors_of_a_failed_build_are_not_retrieved_and_are_reused(
    folder, settings, monkeypatch, record_encoded_texts
):
    build_index(folder, make_documents(), settings)
    documents = make_documents([*TEXTS, "a dog", "dog", "the dog"])
    with monkeypatch.context() as patch:
        patch.setattr("lightning_softprompt.retrieval.manifest.Manifest.write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build_index(folder, documents, settings)
    assert count_points(folder) == 8
    retriever = Retriever(str(folder), "dense")
    hits = retriever.search(["a dog"], 5)[0]
    assert {hit.passage.text for hit in hits} == set(TEXTS)
    retriever.index.vector_store.close()
    encoded = record_encoded_texts()
    build_index(folder, documents, settings)
    assert encoded[1:] == []
    assert count_points(folder) == 8


def test_a_build_with_another_encoder_removes_the_old_collection(folder, settings, tiny_folder):
    first = build_index(folder, make_documents(), settings)
    other_encoder = replace(settings, encoder=str(tiny_folder("bert", 1)))
    second = build_index(folder, make_documents(), other_encoder)
    assert first.collection != second.collection
    store = Index(folder).vector_store
    (collection,) = store.client.get_collections().collections
    assert collection.name == second.collection
    store.close()


def test_embedded_qdrant_has_one_user_at_a_time(folder, settings):
    build_index(folder, make_documents(), settings)
    store = Index(folder).vector_store
    with pytest.raises(ValueError, match="in use by another process, and embedded Qdrant serves one at a time"):
        Retriever(str(folder), "dense").search(["a dog"])
    store.close()
    assert Retriever(str(folder), "dense").search(["a dog"])[0]


def test_a_failed_first_build_leaves_no_folder(folder, settings, monkeypatch):
    monkeypatch.setattr(SentenceEncoder, "passages", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_index(folder, make_documents(), settings)
    assert not folder.exists()


def test_an_unreachable_server_is_reported(folder, settings):
    with pytest.raises(ValueError, match=r"no Qdrant answers at http://127\.0\.0\.1:9"):
        build_index(folder, make_documents(), replace(settings, url="http://127.0.0.1:9"))
    assert not folder.exists()
