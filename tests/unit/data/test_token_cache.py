"""Caches are optional: damaged files are replaced, and a run continues without a cache if it cannot be written."""

import logging
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lightning_softprompt.backbones.execution.context_cache import KEYS, ContextCache
from lightning_softprompt.core.types import Encoded
from lightning_softprompt.data.token_cache import content_key, load_or_encode, representation
from lightning_softprompt.retrieval import result_cache
from lightning_softprompt.retrieval.search.fusion import Ranking
from lightning_softprompt.system.cache_dirs import cache_folder

ROWS = [
    Encoded(ids=(4, 5, 6), answers=(), targets=(7,), slots=(0,), words=(), num_truncated=0),
    Encoded(ids=(8,), answers=(), targets=(9, 1), slots=(0,), words=(2,), num_truncated=3),
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def token_file():
    """The file of cached rows."""
    assert load_or_encode("key", lambda: ROWS) == ROWS
    return cache_folder("tokens") / "key.safetensors"


class Counted:
    """A function without arguments that returns a value and counts its calls."""

    def __init__(self, value):
        self.value, self.calls = value, 0

    def __call__(self):
        self.calls += 1
        return self.value


def fail():
    raise AssertionError("the value was computed again")


def change_each_byte(file):
    """Writes the content of a file with one changed bit in each byte in turn; yields its position."""
    content = file.read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1
        file.write_bytes(changed)
        yield position


def test_rows_are_encoded_once(token_file):
    assert load_or_encode("key", fail) == ROWS


def test_digests_do_not_depend_on_the_current_names_of_fields():
    expected = "Encoded(ids=(8,), answers=(), targets=(9, 1), slots=(0,), words=(2,), cut=3, second_start=-1)"
    assert representation(ROWS[1]) == expected
    assert content_key(ROWS) == "5c105e6516ca06fecfbff26e6db3fb52"


def test_rows_are_encoded_again_after_any_byte_changes(token_file):
    encode = Counted(ROWS)
    for num_changes, position in enumerate(change_each_byte(token_file), start=1):
        assert load_or_encode("key", encode) == ROWS
        assert encode.calls == num_changes, position
    assert load_or_encode("key", fail) == ROWS


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 40])
def test_a_file_with_other_content_is_replaced(token_file, content, caplog):
    token_file.write_bytes(content)
    assert load_or_encode("key", lambda: ROWS) == ROWS
    assert "is damaged and is replaced" in caplog.text
    assert load_or_encode("key", fail) == ROWS


def test_a_folder_with_the_name_of_the_file_is_reported(token_file, caplog):
    token_file.unlink()
    token_file.mkdir()
    assert load_or_encode("key", lambda: ROWS) == ROWS
    assert "it is an optional cache" in caplog.text
    assert str(token_file) in caplog.text


def test_rows_are_encoded_without_a_cache_if_it_cannot_be_written(folder, caplog):
    folder.write_text("a file")
    assert load_or_encode("key", lambda: ROWS) == ROWS
    assert "it is an optional cache" in caplog.text


class CountingRetriever:
    """A retriever that counts its searches."""

    identity = ("index",)
    searches = 0

    def rank(self, questions, k):
        self.searches += 1
        return [Ranking(np.array([3, 1]), np.array([0.5, 0.25], dtype=np.float32)) for _ in questions]


def test_a_search_is_repeated_if_its_cached_ranking_is_damaged_or_cannot_be_written(folder, caplog):
    retriever = CountingRetriever()
    for _ in range(2):
        (ranking,) = result_cache.rank_cached(retriever, ["why?"], 2)
        assert ranking.rows.tolist() == [3, 1]
    assert retriever.searches == 1
    (path,) = result_cache.cache_folder().iterdir()
    content = bytearray(path.read_bytes())
    content[len(content) // 8] ^= 1
    path.write_bytes(content)
    result_cache.rank_cached(retriever, ["why?"], 2)
    assert retriever.searches == 2
    os.rename(folder, f"{folder}-away")
    folder.write_text("a file")
    with caplog.at_level(logging.WARNING):
        result_cache.rank_cached(retriever, ["why?"], 2)
    assert retriever.searches == 3
    assert "it is an optional cache" in caplog.text


CONTEXT = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)


def load_context(folder, compute):
    """Returns the context of a row as a new process does: from disk, or computed."""
    return ContextCache(memory=0, disk=1 << 20, folder=folder).get("row", compute)


def test_a_context_is_computed_again_after_any_byte_changes(tmp_path, caplog):
    load_context(tmp_path, lambda: CONTEXT)
    compute = Counted(CONTEXT)
    for num_changes, position in enumerate(change_each_byte(tmp_path / "row.safetensors"), start=1):
        assert torch.equal(load_context(tmp_path, compute), CONTEXT)
        assert compute.calls == num_changes, position
    assert "recomputing" in caplog.text
    assert torch.equal(load_context(tmp_path, fail), CONTEXT)


def test_a_context_without_a_checksum_is_computed_again(tmp_path):
    save_file({KEYS: CONTEXT + 1}, tmp_path / "row.safetensors")
    assert torch.equal(load_context(tmp_path, lambda: CONTEXT), CONTEXT)
    assert torch.equal(load_context(tmp_path, fail), CONTEXT)


def test_contexts_that_cannot_be_written_are_reported_once(tmp_path, caplog):
    (tmp_path / "file").write_text("a file")
    cache = ContextCache(memory=0, disk=1 << 20, folder=tmp_path / "file")
    for name in "ab":
        assert torch.equal(cache.get(name, lambda: CONTEXT), CONTEXT)
    assert caplog.text.count("cannot be written") == 1
