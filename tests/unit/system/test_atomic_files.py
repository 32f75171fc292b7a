"""Folders are there whole or not at all."""

import os
import time

import pytest

from lightning_softprompt.system.atomic_files import default_permissions, write_file, write_folder


def test_a_folder_appears_when_all_of_it_is_written(tmp_path):
    def write(folder):
        assert not (tmp_path / "made").exists()
        (folder / "file").write_text("whole")

    write_folder(tmp_path / "made", write)
    assert (tmp_path / "made" / "file").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_folder_has_the_usual_permissions(tmp_path):
    (tmp_path / "usual").mkdir()
    write_folder(tmp_path / "made", lambda folder: None)
    assert (tmp_path / "made").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_what_fails_on_the_way_leaves_nothing(tmp_path):
    def write(folder):
        (folder / "file").write_text("half")
        raise ValueError("broken off")

    with pytest.raises(ValueError, match="broken off"):
        write_folder(tmp_path / "made", write)
    assert list(tmp_path.iterdir()) == []


def test_a_faster_process_wins(tmp_path):
    def write(folder):
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / "file").write_text("theirs")
        (folder / "file").write_text("ours")

    write_folder(tmp_path / "made", write)
    assert (tmp_path / "made" / "file").read_text() == "theirs"


def test_drafts_of_killed_processes_are_cleared_away_but_not_those_under_way(tmp_path):
    for name, age in {".draft-old": 7200, ".draft-new": 5}.items():
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    write_folder(tmp_path / "made", lambda folder: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".draft-new", "made"]


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_a_file_has_the_permissions_that_the_user_gives_to_new_files(tmp_path, umask):
    before = os.umask(umask)
    try:
        with default_permissions(tmp_path / "made"):
            (tmp_path / "made").chmod(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_file_that_cannot_be_written_is_named_and_the_old_one_stays(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    write_file(path, b"old")

    def fail(part, content):
        part.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", fail)
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.json'"):
        write_file(path, b"new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]
