"""Rankings of a set of questions that are cached on disk."""

import pytest
from index_documents import CHANGES, LEXICAL, make_documents

from lightning_softprompt.retrieval import result_cache
from lightning_softprompt.retrieval.index_builder import build_index
from lightning_softprompt.retrieval.retriever import Retriever

QUESTIONS = ["funny film", "dog", "unheard"]


@pytest.fixture
def retriever(folder):
    build_index(folder, make_documents(), LEXICAL)
    return Retriever(str(folder), "lexical")


@pytest.fixture
def searches(monkeypatch):
    """The questions of each search that was not cached."""
    searches, rank = [], Retriever.rank

    def record_and_rank(self, questions, k=10):
        searches.append(list(questions))
        return rank(self, questions, k)

    monkeypatch.setattr(Retriever, "rank", record_and_rank)
    return searches


def test_a_set_of_questions_is_searched_once(folder, retriever, searches):
    hits = result_cache.search_cached(retriever, QUESTIONS, 2)
    assert [len(question_hits) for question_hits in hits] == [2, 2, 0]
    assert result_cache.search_cached(Retriever(str(folder), "lexical"), QUESTIONS, 2) == hits
    assert len(searches) == 1
    assert result_cache.search_cached(retriever, [], 2) == []
    assert len(searches) == 1
    (file,) = result_cache.cache_folder().iterdir()
    assert file.suffix == ".npz"


def test_other_questions_numbers_and_retrievers_are_searched_again(folder, retriever, searches):
    result_cache.search_cached(retriever, QUESTIONS, 2)
    result_cache.search_cached(retriever, QUESTIONS[:2], 2)
    result_cache.search_cached(retriever, QUESTIONS, 1)
    result_cache.search_cached(Retriever(str(folder), "lexical", candidates=7), QUESTIONS, 2)
    assert len(searches) == 4


def test_a_changed_index_is_searched_again(folder, retriever, searches):
    result_cache.search_cached(retriever, QUESTIONS, 2)
    build_index(folder, make_documents(CHANGES["removed"]), LEXICAL)
    hits = result_cache.search_cached(Retriever(str(folder), "lexical"), QUESTIONS, 2)
    assert len(hits[1]) == 1
    assert len(searches) == 2


def test_a_damaged_cache_is_replaced(retriever, searches, caplog):
    hits = result_cache.search_cached(retriever, QUESTIONS, 2)
    (file,) = result_cache.cache_folder().iterdir()
    file.write_bytes(b"half")
    assert result_cache.search_cached(retriever, QUESTIONS, 2) == hits
    assert "is damaged and is replaced" in caplog.text
    assert len(searches) == 2


def test_a_cache_that_cannot_be_written_does_not_prevent_a_search(retriever, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr(result_cache, "cache_folder", lambda: tmp_path / "file" / "rankings")
    rankings = result_cache.rank_cached(retriever, ["funny film", "dog"], 2)
    assert [len(ranking) for ranking in rankings] == [2, 2]
    assert "it is an optional cache" in caplog.text


def test_a_cache_of_other_questions_is_replaced(retriever, caplog):
    result_cache.rank_cached(retriever, ["funny film", "dog"], 2)
    (file,) = result_cache.cache_folder().iterdir()
    result_cache._write(file, retriever.rank(["dog"], 2))
    assert len(result_cache.rank_cached(retriever, ["funny film", "dog"], 2)) == 2
    assert "it has 1 rankings for 2 questions" in caplog.text
