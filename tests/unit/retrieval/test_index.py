"""An index is there whole or not at all, says what it is, and keeps what it can when the corpus changes."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest

from lightning_softprompt.retrieval import index_builder, result_cache
from lightning_softprompt.retrieval.index import Index
from lightning_softprompt.retrieval.index_builder import EMBEDDED, _lock_folder, build_index, update_index
from lightning_softprompt.retrieval.manifest import BadIndexError, Manifest, check_files
from lightning_softprompt.retrieval.passages.documents import CorpusError, Document
from lightning_softprompt.retrieval.retriever import Retriever
from lightning_softprompt.retrieval.search import encoder
from lightning_softprompt.retrieval.search.settings import IndexSettings

TEXTS = {
    "film": "a warm and funny film",
    "dog": "the dog is sad . it never ends",
    "story": "a story about a dog and a film",
    "great": "great , very great indeed",
}
LEXICAL = IndexSettings(encoder=None)
LONG = " ".join(f"{word} story number {number} ." for number in range(40) for word in ("dull", "great"))


def documents(texts=TEXTS):
    return [Document(name, name.title(), text, f"corpus.jsonl:{n}") for n, (name, text) in enumerate(texts.items(), 1)]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "index"


@pytest.fixture
def dense(tiny_folder):
    return IndexSettings(size=6, overlap=2, encoder=str(tiny_folder("bert")))


def found(folder, question, way="lexical", k=5):
    return [hit.passage.document for hit in Retriever(str(folder), way).search([question], k)[0]]


def files(folder, but=()):
    return {name: told for name, told in Index(folder).manifest.files.items() if name not in but}


def test_an_index_finds_passages_with_all_they_come_with(folder):
    build_index(folder, documents(), LEXICAL)
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


def test_titles_and_stems_are_searched_and_accents_do_not_matter(folder):
    texts = {"um": "O acadêmico poderá solicitar", "dois": "Nada disso"}
    build_index(folder, documents(texts), IndexSettings(encoder=None, language="portuguese"))
    assert found(folder, "academicos") == found(folder, "acadêmica") == ["um"]
    assert found(folder, "DOIS") == ["dois"]


def test_each_way_of_searching_finds(folder, dense):
    build_index(folder, documents(), dense)
    for way in ("lexical", "dense", "hybrid"):
        assert found(folder, TEXTS["film"], way, 1) == ["film"]
    assert len(found(folder, "a dog", "dense", 100)) == len(Index(folder))


def test_a_retriever_goes_to_other_processes(folder):
    build_index(folder, documents(), LEXICAL)
    retriever = Retriever(str(folder), "lexical")
    before = retriever.search(["sad dog"])
    assert pickle.loads(pickle.dumps(retriever)).search(["sad dog"]) == before
    assert pickle.loads(pickle.dumps(Index(folder))).manifest == Index(folder).manifest


def test_content_that_comes_again_is_left_out(folder):
    again = [Document("copy", "Film", "a  warm and\nfunny film"), Document("film", "Film", TEXTS["film"])]
    manifest = build_index(folder, [*documents(), *again], LEXICAL)
    assert (manifest.documents, manifest.passages, manifest.duplicates) == (5, 4, 1)
    assert found(folder, "funny") == ["film"]
    assert update_index(folder, remove=["film"]).duplicates == 0
    assert found(folder, "funny") == ["copy"]


def test_one_id_for_two_documents_names_both_places(folder):
    with pytest.raises(CorpusError, match=r"b\.jsonl:2: the id 'film' belongs to another document at corpus\.jsonl:1"):
        build_index(folder, [*documents(), Document("film", "", "another", "b.jsonl:2")], LEXICAL)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "has no documents"),
        ([Document("a", "", "  ")], "no document of the corpus has a word"),
        ([Document("a", "", ".. !")], "no passage has a letter or digit"),
    ],
)
def test_a_corpus_of_nothing_is_refused_and_leaves_nothing(folder, given, said):
    with pytest.raises(CorpusError, match=said):
        build_index(folder, given, LEXICAL)
    assert not folder.exists()


CHANGES = {
    "added": {**TEXTS, "new": "what a wonderful thing . never dull"},
    "changed": {**TEXTS, "dog": "the dog is good . it never ends"},
    "removed": {name: text for name, text in TEXTS.items() if name != "dog"},
    "all of it": {"new": LONG, "great": "great film", "film": TEXTS["film"], "story": TEXTS["story"]},
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_update_is_a_rebuild_that_encodes_only_what_is_new(folder, tmp_path, dense, change, monkeypatch):
    new = documents(CHANGES[change])
    build_index(tmp_path / "anew", new, dense)
    build_index(folder, documents(), dense)
    before = {Index(folder).passages[row].searched for row in range(len(Index(folder)))}
    after = {Index(tmp_path / "anew").passages[row].searched for row in range(len(Index(tmp_path / "anew")))}
    encoded, plain = [], encoder.SentenceEncoder.passages
    monkeypatch.setattr(encoder.SentenceEncoder, "passages", lambda e, t: encoded.extend(t) or plain(e, t))
    monkeypatch.setattr(
        index_builder, "words", lambda text, language: stemmed.append(text) or plain_words(text, language)
    )
    stemmed = []
    build_index(folder, new, dense)
    assert set(stemmed) == after - before
    assert sorted(encoded[1:]) == sorted(after - before)  # the first recognises the encoder
    vectors = "dense/vectors.npy"
    assert files(folder, [vectors]) == files(tmp_path / "anew", [vectors])
    ours, theirs = (Index(place).vector_store.vectors for place in (folder, tmp_path / "anew"))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert Index(folder).manifest.identity == Index(tmp_path / "anew").manifest.identity


plain_words = index_builder.words


def test_documents_are_added_replaced_and_removed_one_by_one(folder, tmp_path):
    build_index(folder, documents(), LEXICAL)
    new = [Document("dog", "Dog", "a good dog"), Document("new", "New", "a wonderful thing")]
    update_index(folder, new, ["story"])
    by_hand = {document.id: document for document in documents()} | {document.id: document for document in new}
    del by_hand["story"]
    build_index(tmp_path / "anew", by_hand.values(), LEXICAL)
    assert files(folder) == files(tmp_path / "anew")
    assert (found(folder, "sad story"), found(folder, "wonderful"), found(folder, "dog")) == ([], ["new"], ["dog"])


def test_an_id_that_is_not_there_cannot_be_removed(folder):
    build_index(folder, documents(), LEXICAL)
    with pytest.raises(CorpusError, match=r"no document 'stroy' to remove \(1 missing ids\)\. Did you mean story"):
        update_index(folder, remove=["stroy"])
    with pytest.raises(CorpusError, match="the id 'a' occurs twice"):
        update_index(folder, [Document("a", "", "one"), Document("a", "", "two")])
    assert len(Index(folder)) == 4


def test_the_same_again_changes_nothing(folder):
    assert build_index(folder, documents(), LEXICAL) == build_index(folder, documents(), LEXICAL)
    assert len(list(folder.iterdir())) == 2


def test_vectors_go_to_another_store_without_being_made_again(folder, dense, monkeypatch):
    build_index(folder, documents(), dense)
    before = Index(folder).dense(["a sad dog"], 3)[0]
    encoded, plain = [], encoder.SentenceEncoder.passages
    monkeypatch.setattr(encoder.SentenceEncoder, "passages", lambda e, t: encoded.extend(t) or plain(e, t))
    for store in ("hnsw", "ivf", "flat"):
        build_index(folder, documents(), replace(dense, store=store))
        after = Index(folder).dense(["a sad dog"], 3)[0]
        assert after.rows.tolist() == before.rows.tolist()
        np.testing.assert_allclose(after.scores, before.scores, atol=1e-6)
    assert set(encoded) == {Index(folder).passages[0].searched}  # by which the encoder is recognised


def test_an_index_is_for_whom_its_folder_is_for(folder):
    folder.mkdir(mode=0o750)
    manifest = build_index(folder, documents(), LEXICAL)
    assert (folder / manifest.generation).stat().st_mode == folder.stat().st_mode


def test_other_settings_make_the_index_anew(folder, dense):
    build_index(folder, documents({**TEXTS, "long": LONG}), LEXICAL)
    short = build_index(folder, documents({**TEXTS, "long": LONG}), IndexSettings(size=10, overlap=5, encoder=None))
    assert short.passages > 10
    assert build_index(folder, documents(), dense).width == 32
    assert found(folder, "a dog", "dense")


BUILD = """
    import sys, time
    from lightning_softprompt.retrieval.index_builder import build_index
    from lightning_softprompt.retrieval.passages.documents import Document
    from lightning_softprompt.retrieval.search.settings import IndexSettings

    def track(items, doing, total):
        for item in items:
            if doing.startswith(sys.argv[2]):
                print("there", flush=True)
                time.sleep(60)
            yield item

    new = [Document("other", "", "something else"), Document("more", "", "and more")]
    build_index(sys.argv[1], new, IndexSettings(encoder=sys.argv[3] or None), track)
"""


@pytest.mark.parametrize("doing", ["reading", "splitting", "stemming", "encoding"])
def test_a_build_that_is_killed_leaves_the_old_index(folder, tiny_folder, doing):
    settings = IndexSettings(encoder=str(tiny_folder("bert"))) if doing == "encoding" else LEXICAL
    build_index(folder, documents(), settings)
    words = [sys.executable, "-c", dedent(BUILD), str(folder), doing, settings.encoder or ""]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as build:
        assert build.stdout.readline() == "there\n"
        with pytest.raises(BadIndexError, match="another build is writing"):
            build_index(folder, documents(), settings)
        build.kill()
    check_files(folder, Index(folder).manifest)
    assert found(folder, "funny film")[0] == "film"
    build_index(folder, documents(CHANGES["added"]), settings)
    assert found(folder, "wonderful") == ["new"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [Index(folder).manifest.generation, "manifest.json"]
    )


def test_a_build_that_is_refused_leaves_what_the_first_one_has_written(folder):
    vectors = folder / EMBEDDED / "points"
    vectors.parent.mkdir(parents=True)
    vectors.write_text("of the build that runs")
    with _lock_folder(folder):
        with pytest.raises(BadIndexError, match="another build is writing"):
            build_index(folder, documents(), LEXICAL)
        assert vectors.exists()


KILLED = """
    import os, sys
    from lightning_softprompt.retrieval import vector_log
    from lightning_softprompt.retrieval.index_builder import build_index
    from lightning_softprompt.retrieval.passages.documents import Document
    from lightning_softprompt.retrieval.search.settings import IndexSettings

    def track(items, doing, total):
        for number, item in enumerate(items):
            if doing.startswith("encoding") and number == 3:
                os.kill(os.getpid(), 9)
            yield item

    vector_log.WINDOW = 4
    texts = [Document(str(n), "", f"story number {n}") for n in range(20)]
    build_index(sys.argv[1], texts, IndexSettings(encoder=sys.argv[2]), track)
"""


@pytest.fixture
def killed(folder, tiny_folder, monkeypatch):
    """A first build of 20 passages, of which 12 were encoded; and the texts that are encoded from here on."""
    settings = IndexSettings(encoder=str(tiny_folder("bert")))
    died = subprocess.run([sys.executable, "-c", dedent(KILLED), str(folder), settings.encoder], check=False)
    assert died.returncode == -9
    encoded, plain = [], encoder.SentenceEncoder.passages
    monkeypatch.setattr(encoder.SentenceEncoder, "passages", lambda e, t: encoded.extend(t) or plain(e, t))
    return settings, encoded


STORIES = [Document(str(n), "", f"story number {n}") for n in range(20)]


@pytest.mark.parametrize("torn", [b"", b"half a record"])
def test_vectors_of_a_build_that_was_killed_are_not_made_again(folder, tmp_path, killed, torn):
    settings, encoded = killed
    with next(folder.glob(".encoded-*")).open("ab") as file:
        file.write(torn)
    build_index(folder, STORIES, settings)
    assert len(encoded) == 1 + 8  # one recognises the encoder
    build_index(tmp_path / "anew", STORIES, settings)
    ours, theirs = (Index(place).vector_store.vectors for place in (folder, tmp_path / "anew"))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert not list(folder.glob(".*"))


def test_vectors_that_another_encoder_made_are_made_again(folder, killed):
    settings, encoded = killed
    file = next(folder.glob(".encoded-*"))
    records = np.fromfile(file, np.dtype([("digest", np.uint8, 16), ("vector", np.float32, 32)]))
    records["vector"] *= -1
    records.tofile(file)
    build_index(folder, STORIES, settings)
    assert len(encoded) == 1 + 20


def test_a_build_that_dies_before_its_manifest_leaves_the_old_index(folder, monkeypatch):
    build_index(folder, documents(), LEXICAL)
    with monkeypatch.context() as patched:
        patched.setattr(Manifest, "write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build_index(folder, documents(CHANGES["added"]), LEXICAL)
    assert found(folder, "wonderful") == []
    build_index(folder, documents(CHANGES["added"]), LEXICAL)
    assert found(folder, "wonderful") == ["new"]
    assert len(list(folder.iterdir())) == 2


def test_readers_go_on_while_the_index_changes(folder):
    """One that was opened stays as it was; others open the old or the new state, never half of one."""
    build_index(folder, documents(), LEXICAL)
    opened = Retriever(str(folder), "lexical")
    assert opened.search(["funny"])
    read = """
        import sys, pathlib
        from lightning_softprompt.retrieval.retriever import Retriever
        count = 0
        print("there", flush=True)
        while not pathlib.Path(sys.argv[2]).exists():
            hits = Retriever(sys.argv[1], "lexical").search(["funny film"])[0]
            assert hits[0].passage.document == "film", hits
            count += 1
        print(count)
    """
    stop = folder.parent / "stop"
    words = [sys.executable, "-c", dedent(read), str(folder), str(stop)]
    readers = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [reader.stdout.readline() for reader in readers] == ["there\n"] * 2
    for change in list(CHANGES) * 5:
        build_index(folder, documents(CHANGES[change]), LEXICAL)
    stop.touch()
    assert all(int(reader.communicate()[0]) > 0 for reader in readers)
    assert [reader.returncode for reader in readers] == [0, 0]
    assert opened.search(["sad"])[0][0].passage.text == TEXTS["dog"]


def test_searching_writes_nothing(folder, dense):
    build_index(folder, documents(), dense)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    os.sync()
    time.sleep(0.01)
    Retriever(str(folder)).search(["a dog"])
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    index = Index(folder)
    with pytest.raises(ValueError, match="read-only"):
        index.vector_store.vectors[0] = 0
    assert isinstance(index.passages.rows, np.memmap)


def broken(folder, how):
    manifest = folder / "manifest.json"
    files = folder / Index(folder).manifest.generation
    if how == "cut off":
        manifest.write_bytes(manifest.read_bytes()[:100])
    elif how == "edited":
        manifest.write_text(manifest.read_text().replace('"k1": 1.5', '"k1": 2.5'))
    elif how == "other format":
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 7}))
    elif how == "foreign":
        manifest.write_text('{"name": "a web page"}')
    elif how == "gone":
        manifest.unlink()
    elif how == "file cut":
        os.truncate(files / "passages.npy", 100)
    elif how == "file gone":
        (files / "lexical" / "data.csc.index.npy").unlink()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("cut off", "or is damaged"),
        ("edited", r"manifest\.json was changed after it was written\. Build the index again"),
        ("other format", "is an index of format 7; this version reads 2"),
        ("foreign", "is not a manifest of an index"),
        ("gone", r"is not an index, since it has no manifest\.json"),
        ("file cut", r"passages\.npy has 100 bytes, expected \d+"),
        ("file gone", r"data\.csc\.index\.npy is missing"),
    ],
)
def test_a_damaged_or_foreign_index_is_refused_and_built_anew(folder, how, said):
    build_index(folder, documents(), LEXICAL)
    broken(folder, how)
    with pytest.raises(BadIndexError, match=said):
        Index(folder)
    with pytest.raises(BadIndexError, match=said):
        update_index(folder, remove=["dog"])
    build_index(folder, documents(), LEXICAL)
    assert found(folder, "funny") == ["film"]


def test_a_bit_that_turned_is_found_by_the_check(folder):
    manifest = build_index(folder, documents(), LEXICAL)
    file = folder / manifest.generation / "passages.npy"
    file.write_bytes(file.read_bytes()[:-8] + b"\x01" + file.read_bytes()[-7:])
    Index(folder)
    with pytest.raises(BadIndexError, match=r"passages\.npy has changed"):
        check_files(folder, manifest)
    build_index(folder, documents(), LEXICAL)
    check_files(folder, Index(folder).manifest)


def test_no_index_is_built_among_other_files(folder):
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(BadIndexError, match=r"contains thesis\.tex, so it is not an index"):
        build_index(folder, documents(), LEXICAL)
    with pytest.raises(BadIndexError, match="there is no index"):
        Index(folder / "none")
    assert (folder / "thesis.tex").read_text() == "years of work"


def test_another_encoder_under_the_same_name_is_refused(folder, tiny_folder, tmp_path, caplog):
    name = shutil.copytree(tiny_folder("bert"), tmp_path / "encoder")
    build_index(folder, documents(), IndexSettings(encoder=str(name)))
    shutil.copytree(tiny_folder("bert", 1), name, dirs_exist_ok=True)
    encoder.load_encoder.cache_clear()
    with pytest.raises(ValueError, match="is not the one that"):
        Retriever(str(folder)).search(["a dog"])
    build_index(folder, documents(CHANGES["added"]), IndexSettings(encoder=str(name)))
    assert "all passages are encoded again" in caplog.text
    assert found(folder, TEXTS["film"], "dense", 1) == ["film"]


def test_dense_search_wants_vectors(folder):
    build_index(folder, documents(), LEXICAL)
    with pytest.raises(ValueError, match="has no vectors, since it was built without an encoder; use mode lexical"):
        Retriever(str(folder)).search(["a dog"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"store": "annoy"}, "store must be one of flat"),
        ({"whole": "words"}, "whole must be one of sentences"),
        ({"url": "here:6333"}, "set store to qdrant"),
        ({"b": 2.0}, "BM25 requires"),
        ({"size": 0}, "do not get on"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        IndexSettings(**options)


def test_languages_are_named_where_one_is_not_known(folder):
    with pytest.raises(ValueError, match="no stems of 'klingon' are known; known: none, arabic"):
        build_index(folder, documents(), IndexSettings(encoder=None, language="klingon"))
    assert not folder.exists()


@pytest.mark.parametrize(("package", "extra"), [("bm25s", "rag"), ("faiss", "rag"), ("qdrant_client", "qdrant")])
def test_a_missing_package_is_told_with_its_extra(folder, dense, monkeypatch, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    store = "qdrant" if extra == "qdrant" else "flat"
    with pytest.raises(
        ValueError, match=rf"requires the package {package}; pip install 'lightning-softprompt\[{extra}\]'"
    ):
        build_index(folder, documents(), IndexSettings(encoder=dense.encoder, store=store))


def test_a_question_set_is_searched_once(folder, monkeypatch, caplog):
    build_index(folder, documents(), LEXICAL)
    questions, searched, plain = ["funny film", "dog", "unheard"], [], Retriever.rank
    monkeypatch.setattr(Retriever, "rank", lambda r, q, k=10: searched.append(list(q)) or plain(r, q, k))
    first = result_cache.search_cached(Retriever(str(folder), "lexical"), questions, 2)
    assert [len(hits) for hits in first] == [2, 2, 0]
    assert result_cache.search_cached(Retriever(str(folder), "lexical"), questions, 2) == first
    assert len(searched) == 1
    result_cache.search_cached(Retriever(str(folder), "lexical"), questions[:2], 2)
    result_cache.search_cached(Retriever(str(folder), "lexical"), questions, 1)
    result_cache.search_cached(Retriever(str(folder), "lexical", candidates=7), questions, 2)
    assert len(searched) == 4
    build_index(folder, documents(CHANGES["removed"]), LEXICAL)
    assert len(result_cache.search_cached(Retriever(str(folder), "lexical"), questions, 2)[1]) == 1
    assert len(searched) == 5
    assert result_cache.search_cached(Retriever(str(folder), "lexical"), [], 2) == []
    for file in result_cache.cache_folder().iterdir():
        file.write_bytes(b"half")
    assert len(result_cache.search_cached(Retriever(str(folder), "lexical"), questions, 2)) == 3
    assert "is damaged and is replaced" in caplog.text
    assert len(searched) == 6
    assert all(Path(file).suffix == ".npz" for file in result_cache.cache_folder().iterdir())


def test_a_cache_that_cannot_be_written_stops_no_search(folder, tmp_path, monkeypatch, caplog):
    build_index(folder, documents(), LEXICAL)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(result_cache, "cache_folder", lambda: tmp_path / "file" / "found")
    found = result_cache.rank_cached(Retriever(str(folder), "lexical"), ["funny film", "dog"], 2)
    assert [len(ranking) for ranking in found] == [2, 2]
    assert "it is an optional cache" in caplog.text


def test_kept_rankings_of_other_questions_are_not_taken(folder, caplog):
    build_index(folder, documents(), LEXICAL)
    retriever = Retriever(str(folder), "lexical")
    result_cache.rank_cached(retriever, ["funny film", "dog"], 2)
    (kept,) = result_cache.cache_folder().iterdir()
    result_cache._write(kept, retriever.rank(["dog"], 2))
    assert len(result_cache.rank_cached(retriever, ["funny film", "dog"], 2)) == 2
    assert "it has 1 rankings for 2 questions" in caplog.text
