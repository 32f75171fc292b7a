"""Caches are optional: what is damaged is made again, and where nothing can be written a run does without."""

import logging
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lightning_softprompt.backbones.execution.context_cache import KEYS, ContextCache
from lightning_softprompt.core.types import Encoded
from lightning_softprompt.data.token_cache import content_key, load_or_encode, representation
from lightning_softprompt.retrieval import result_cache as rankings
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
def kept():
    """The file of rows that are kept."""
    assert load_or_encode("key", lambda: ROWS) == ROWS
    return cache_folder("tokens") / "key.safetensors"


def never():
    raise AssertionError("rows were made again")


def test_rows_are_made_once(kept):
    assert load_or_encode("key", never) == ROWS


def test_digests_do_not_depend_on_later_names():
    expected = "Encoded(ids=(8,), answers=(), targets=(9, 1), slots=(0,), words=(2,), cut=3)"
    assert representation(ROWS[1]) == expected
    assert content_key(ROWS) == "220aa3d042c034095fc1dec7c07c5ebd"


def test_each_flipped_bit_is_noticed(kept):
    whole = kept.read_bytes()
    for position in range(len(whole)):
        kept.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        made = []
        assert load_or_encode("key", lambda made=made: made.append(1) or ROWS) == ROWS
        assert made, position
    assert load_or_encode("key", never) == ROWS


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 40])
def test_a_file_of_something_else_is_written_again(kept, content, caplog):
    kept.write_bytes(content)
    assert load_or_encode("key", lambda: ROWS) == ROWS
    assert "is damaged and is made again" in caplog.text
    assert load_or_encode("key", never) == ROWS


def test_a_folder_in_its_place_is_reported(kept, caplog):
    kept.unlink()
    kept.mkdir()
    assert load_or_encode("key", lambda: ROWS) == ROWS
    assert "it is an optional cache" in caplog.text
    assert str(kept) in caplog.text


def test_a_cache_that_cannot_be_written_is_left_out(folder, caplog):
    folder.write_text("no folder")
    assert load_or_encode("key", lambda: ROWS) == ROWS
    assert "it is an optional cache" in caplog.text


class Searched:
    """A retriever that counts its searches."""

    identity = ("index",)
    searches = 0

    def rank(self, questions, k):
        self.searches += 1
        return [Ranking(np.array([3, 1]), np.array([0.5, 0.25], dtype=np.float32)) for _ in questions]


def test_rankings_are_searched_again_where_they_are_damaged_or_cannot_be_kept(folder, caplog):
    retriever = Searched()
    for _ in range(2):
        (found,) = rankings.rank_cached(retriever, ["why?"], 2)
        assert found.rows.tolist() == [3, 1]
    assert retriever.searches == 1
    (path,) = rankings.cache_folder().iterdir()
    content = bytearray(path.read_bytes())
    content[len(content) // 8] ^= 1
    path.write_bytes(content)
    rankings.rank_cached(retriever, ["why?"], 2)
    assert retriever.searches == 2
    os.rename(folder, f"{folder}-away")
    folder.write_text("no folder")
    with caplog.at_level(logging.WARNING):
        rankings.rank_cached(retriever, ["why?"], 2)
    assert retriever.searches == 3
    assert "it is an optional cache" in caplog.text


CONTEXT = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)


def context(folder, make):
    """What a new process gets of a cache that keeps nothing in memory."""
    return ContextCache(memory=0, disk=1 << 20, folder=folder).get("row", make)


def test_each_flipped_bit_of_a_kept_context_is_noticed(tmp_path, caplog):
    context(tmp_path, lambda: CONTEXT)
    file = tmp_path / "row.safetensors"
    whole = file.read_bytes()
    for position in range(len(whole)):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        made = []
        assert torch.equal(context(tmp_path, lambda made=made: made.append(1) or CONTEXT), CONTEXT)
        assert made, position
    assert "recomputing" in caplog.text
    assert torch.equal(context(tmp_path, never), CONTEXT)


def test_a_context_without_a_checksum_is_computed_again(tmp_path):
    save_file({KEYS: CONTEXT + 1}, tmp_path / "row.safetensors")
    assert torch.equal(context(tmp_path, lambda: CONTEXT), CONTEXT)
    assert torch.equal(context(tmp_path, never), CONTEXT)


def test_contexts_that_cannot_be_written_are_reported_once(tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    cache = ContextCache(memory=0, disk=1 << 20, folder=tmp_path / "file")
    assert [torch.equal(cache.get(name, lambda: CONTEXT), CONTEXT) for name in "ab"] == [True, True]
    assert caplog.text.count("cannot be written") == 1
