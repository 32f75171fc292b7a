"""Indexes of small corpora, and a record of what an encoder encodes."""

import pytest

from lightning_softprompt.retrieval.search.encoder import SentenceEncoder
from lightning_softprompt.retrieval.search.settings import IndexSettings


@pytest.fixture
def folder(tmp_path):
    """The folder of an index that a test builds."""
    return tmp_path / "index"


@pytest.fixture
def dense(tiny_folder):
    """Settings of an index of short passages with vectors."""
    return IndexSettings(size=6, overlap=2, encoder=str(tiny_folder("bert")))


@pytest.fixture
def record_encoded_texts(monkeypatch):
    """Returns a function that returns a list to which each passage is added that an encoder encodes from then on."""

    def record_encoded_texts():
        texts, encode = [], SentenceEncoder.passages

        def record_and_encode(self, passages):
            texts.extend(passages)
            return encode(self, passages)

        monkeypatch.setattr(SentenceEncoder, "passages", record_and_encode)
        return texts

    return record_encoded_texts
