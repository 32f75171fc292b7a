"""Indexes that a data module builds from a corpus, or compares with it."""

import pytest
from questions import LEXICAL, ROW, TEXTS, documents_of, first_example
from row_files import write_rows

from lightning_softprompt.data.readers.sources import DataError
from lightning_softprompt.rag.index_setup import ensure_index
from lightning_softprompt.retrieval.manifest import BadIndexError
from lightning_softprompt.retrieval.retriever import Retriever
from lightning_softprompt.retrieval.search.settings import IndexSettings

FAMILIES = ("llama",)


def write_corpus(folder, texts):
    rows = [{"id": name, "text": text} for name, text in texts.items()]
    return str(write_rows(folder / "corpus.jsonl", rows))


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path, TEXTS)


def test_a_missing_index_is_built_and_an_existing_one_is_unchanged(make_qa_data, tmp_path, corpus):
    retriever = Retriever(str(tmp_path / "index"), "lexical")
    module = make_qa_data([ROW], retriever=retriever, corpus=corpus, index_settings=LEXICAL)
    module.prepare_data()
    assert documents_of(first_example(module)) == ["dog", "story"]
    manifest = tmp_path / "index" / "manifest.json"
    content = manifest.read_bytes()
    module.prepare_data()
    make_qa_data([ROW], retriever=retriever, corpus=corpus).prepare_data()
    assert manifest.read_bytes() == content


def test_the_order_of_a_corpus_can_differ_from_the_index(tmp_path, corpus):
    ensure_index(tmp_path / "index", corpus, LEXICAL)
    ensure_index(tmp_path / "index", write_corpus(tmp_path, dict(reversed(TEXTS.items()))))


WITHOUT_LONG = {name: text for name, text in TEXTS.items() if name != "long"}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({**TEXTS, "cat": "a cat"}, "it lacks the document 'cat'"),
        (WITHOUT_LONG, "its document 'long' is not in the corpus"),
        ({**TEXTS, "film": "a dull film"}, "the document 'film' has changed"),
    ],
)
def test_an_index_of_another_corpus_is_rejected(tmp_path, corpus, texts, message):
    ensure_index(tmp_path / "index", corpus, LEXICAL)
    with pytest.raises(DataError, match=f"does not contain the corpus .*{message}.*Remove the folder"):
        ensure_index(tmp_path / "index", write_corpus(tmp_path, texts))


def test_an_index_with_other_settings_is_rejected(tmp_path, corpus):
    ensure_index(tmp_path / "index", corpus, LEXICAL)
    with pytest.raises(DataError, match=r"other settings: size was 200 and is 100\. Remove"):
        ensure_index(tmp_path / "index", corpus, IndexSettings(encoder=None, size=100))


def test_a_folder_with_other_files_is_rejected(tmp_path, corpus):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "thesis.tex").write_text("My thesis")
    with pytest.raises(BadIndexError, match=r"contains thesis\.tex"):
        ensure_index(tmp_path / "index", corpus, LEXICAL)
