"""Updates of an index, builds that are interrupted, and readers during a build."""

import subprocess
import sys
from dataclasses import replace
from textwrap import dedent

import numpy as np
import pytest
from index_documents import CHANGES, LEXICAL, TEXTS, make_documents, search_documents

from lightning_softprompt.retrieval import index_builder
from lightning_softprompt.retrieval.index import Index
from lightning_softprompt.retrieval.index_builder import EMBEDDED, _lock_folder, build_index, update_index
from lightning_softprompt.retrieval.manifest import BadIndexError, Manifest, check_files
from lightning_softprompt.retrieval.passages.documents import CorpusError, Document
from lightning_softprompt.retrieval.retriever import Retriever
from lightning_softprompt.retrieval.search.settings import IndexSettings

VECTORS = "dense/vectors.npy"
STORIES = [Document(str(n), "", f"story number {n}") for n in range(20)]


def checksums(folder, without=()):
    """Returns the manifest entry of each file of an index."""
    files = Index(folder).manifest.files
    return {name: entry for name, entry in files.items() if name not in without}


def vectors_of(folder):
    return Index(folder).vector_store.vectors


def passage_texts(folder):
    passages = Index(folder).passages
    return {passages[row].searched for row in range(len(passages))}


# Updates


@pytest.fixture
def record_stemmed_texts(monkeypatch):
    """Returns a function that returns a list to which each passage is added that is stemmed from then on."""

    def record_stemmed_texts():
        texts, stem = [], index_builder.words

        def record_and_stem(text, language):
            texts.append(text)
            return stem(text, language)

        monkeypatch.setattr(index_builder, "words", record_and_stem)
        return texts

    return record_stemmed_texts


@pytest.mark.parametrize("change", CHANGES)
def test_an_update_equals_a_rebuild_but_stems_and_encodes_only_new_passages(
    folder, tmp_path, dense, change, record_stemmed_texts, record_encoded_texts
):
    documents, rebuilt = make_documents(CHANGES[change]), tmp_path / "rebuilt"
    build_index(rebuilt, documents, dense)
    build_index(folder, make_documents(), dense)
    new_texts = passage_texts(rebuilt) - passage_texts(folder)
    stemmed, encoded = record_stemmed_texts(), record_encoded_texts()
    build_index(folder, documents, dense)
    assert set(stemmed) == new_texts
    assert sorted(encoded[1:]) == sorted(new_texts)  # the first text checks whether the encoder is the same
    assert checksums(folder, [VECTORS]) == checksums(rebuilt, [VECTORS])
    np.testing.assert_allclose(vectors_of(folder), vectors_of(rebuilt), atol=1e-6)
    assert Index(folder).manifest.identity == Index(rebuilt).manifest.identity


def test_single_documents_can_be_added_replaced_and_removed(folder, tmp_path):
    build_index(folder, make_documents(), LEXICAL)
    dog, new = Document("dog", "Dog", "a good dog"), Document("new", "New", "a wonderful thing")
    update_index(folder, [dog, new], ["story"])
    film, _, _, great = make_documents()
    build_index(tmp_path / "rebuilt", [film, dog, great, new], LEXICAL)
    assert checksums(folder) == checksums(tmp_path / "rebuilt")
    assert search_documents(folder, "sad story") == []
    assert search_documents(folder, "wonderful") == ["new"]
    assert search_documents(folder, "dog") == ["dog"]


def test_unknown_and_repeated_ids_are_rejected(folder):
    build_index(folder, make_documents(), LEXICAL)
    with pytest.raises(CorpusError, match=r"no document 'stroy' to remove \(1 missing ids\)\. Did you mean story"):
        update_index(folder, remove=["stroy"])
    with pytest.raises(CorpusError, match="the id 'a' occurs twice"):
        update_index(folder, [Document("a", "", "one"), Document("a", "", "two")])
    assert len(Index(folder)) == 4


def test_a_second_build_of_the_same_corpus_changes_nothing(folder):
    assert build_index(folder, make_documents(), LEXICAL) == build_index(folder, make_documents(), LEXICAL)
    assert len(list(folder.iterdir())) == 2


def test_another_vector_store_reuses_the_vectors(folder, dense, record_encoded_texts):
    build_index(folder, make_documents(), dense)
    expected = Index(folder).dense(["a sad dog"], 3)[0]
    encoded = record_encoded_texts()
    for store in ("hnsw", "ivf", "flat"):
        build_index(folder, make_documents(), replace(dense, store=store))
        ranking = Index(folder).dense(["a sad dog"], 3)[0]
        assert ranking.rows.tolist() == expected.rows.tolist()
        np.testing.assert_allclose(ranking.scores, expected.scores, atol=1e-6)
    assert set(encoded) == {Index(folder).passages[0].searched}  # checks whether the encoder is the same


# Interrupted builds

BUILD = """
    import sys, time
    from lightning_softprompt.retrieval.index_builder import build_index
    from lightning_softprompt.retrieval.passages.documents import Document
    from lightning_softprompt.retrieval.search.settings import IndexSettings

    folder, step, encoder = sys.argv[1:]

    def track(items, current_step, total):
        for item in items:
            if current_step.startswith(step):
                print("reached", flush=True)
                time.sleep(60)
            yield item

    documents = [Document("other", "", "something else"), Document("more", "", "and more")]
    build_index(folder, documents, IndexSettings(encoder=encoder or None), track)
"""


@pytest.mark.parametrize("step", ["reading", "splitting", "stemming", "encoding"])
def test_a_killed_build_leaves_the_old_index(folder, tiny_folder, step):
    settings = IndexSettings(encoder=str(tiny_folder("bert"))) if step == "encoding" else LEXICAL
    build_index(folder, make_documents(), settings)
    command = [sys.executable, "-c", dedent(BUILD), str(folder), step, settings.encoder or ""]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as build:
        assert build.stdout.readline() == "reached\n"
        with pytest.raises(BadIndexError, match="another build is writing"):
            build_index(folder, make_documents(), settings)
        build.kill()
    check_files(folder, Index(folder).manifest)
    assert search_documents(folder, "funny film")[0] == "film"
    build_index(folder, make_documents(CHANGES["added"]), settings)
    assert search_documents(folder, "wonderful") == ["new"]
    assert {path.name for path in folder.iterdir()} == {Index(folder).manifest.generation, "manifest.json"}


def test_a_second_build_is_rejected_and_leaves_the_files_of_the_first(folder):
    vectors = folder / EMBEDDED / "points"
    vectors.parent.mkdir(parents=True)
    vectors.write_text("of the first build")
    with _lock_folder(folder):
        with pytest.raises(BadIndexError, match="another build is writing"):
            build_index(folder, make_documents(), LEXICAL)
        assert vectors.exists()


def test_a_build_that_fails_before_its_manifest_leaves_the_old_index(folder, monkeypatch):
    build_index(folder, make_documents(), LEXICAL)
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build_index(folder, make_documents(CHANGES["added"]), LEXICAL)
    assert search_documents(folder, "wonderful") == []
    build_index(folder, make_documents(CHANGES["added"]), LEXICAL)
    assert search_documents(folder, "wonderful") == ["new"]
    assert len(list(folder.iterdir())) == 2


BUILD_AND_DIE = """
    import os, sys
    from lightning_softprompt.retrieval import vector_log
    from lightning_softprompt.retrieval.index_builder import build_index
    from lightning_softprompt.retrieval.passages.documents import Document
    from lightning_softprompt.retrieval.search.settings import IndexSettings

    def track(items, step, total):
        for number, item in enumerate(items):
            if step.startswith("encoding") and number == 3:
                os.kill(os.getpid(), 9)
            yield item

    vector_log.WINDOW = 4
    texts = [Document(str(n), "", f"story number {n}") for n in range(20)]
    build_index(sys.argv[1], texts, IndexSettings(encoder=sys.argv[2]), track)
"""


@pytest.fixture
def interrupted_settings(folder, tiny_folder):
    """The settings of a first build of `STORIES` that was killed after it had encoded 12 of 20 passages."""
    settings = IndexSettings(encoder=str(tiny_folder("bert")))
    command = [sys.executable, "-c", dedent(BUILD_AND_DIE), str(folder), settings.encoder]
    build = subprocess.run(command, check=False)
    assert build.returncode == -9
    return settings


@pytest.mark.parametrize("incomplete", [b"", b"half a record"])
def test_the_vectors_of_a_killed_build_are_reused(
    folder, tmp_path, interrupted_settings, incomplete, record_encoded_texts
):
    with next(folder.glob(".encoded-*")).open("ab") as file:
        file.write(incomplete)
    encoded = record_encoded_texts()
    build_index(folder, STORIES, interrupted_settings)
    assert len(encoded) == 1 + 8  # one text checks whether the encoder is the same
    build_index(tmp_path / "rebuilt", STORIES, interrupted_settings)
    np.testing.assert_allclose(vectors_of(folder), vectors_of(tmp_path / "rebuilt"), atol=1e-6)
    assert not list(folder.glob(".*"))


def test_the_vectors_of_another_encoder_are_not_reused(folder, interrupted_settings, record_encoded_texts):
    file = next(folder.glob(".encoded-*"))
    records = np.fromfile(file, np.dtype([("digest", np.uint8, 16), ("vector", np.float32, 32)]))
    records["vector"] *= -1
    records.tofile(file)
    encoded = record_encoded_texts()
    build_index(folder, STORIES, interrupted_settings)
    assert len(encoded) == 1 + 20


# Readers during a build

READ = """
    import sys, pathlib
    from lightning_softprompt.retrieval.retriever import Retriever

    folder, stop = sys.argv[1:]
    count = 0
    print("started", flush=True)
    while not pathlib.Path(stop).exists():
        hits = Retriever(folder, "lexical").search(["funny film"])[0]
        assert hits[0].passage.document == "film", hits
        count += 1
    print(count)
"""


def test_readers_continue_while_the_index_changes(folder):
    """An open index does not change. A newly opened index has the old or the new state, but never parts of both."""
    build_index(folder, make_documents(), LEXICAL)
    retriever = Retriever(str(folder), "lexical")
    assert retriever.search(["funny"])
    stop = folder.parent / "stop"
    command = [sys.executable, "-c", dedent(READ), str(folder), str(stop)]
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [reader.stdout.readline() for reader in readers] == ["started\n"] * 2
    for change in list(CHANGES) * 5:
        build_index(folder, make_documents(CHANGES[change]), LEXICAL)
    stop.touch()
    assert all(int(reader.communicate()[0]) > 0 for reader in readers)
    assert [reader.returncode for reader in readers] == [0, 0]
    assert retriever.search(["sad"])[0][0].passage.text == TEXTS["dog"]
