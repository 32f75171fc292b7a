"""Files and folders are written completely or not at all."""

import os
import time

import pytest

from lightning_softprompt.system.atomic_files import default_permissions, write_file, write_folder


def test_a_folder_exists_only_after_it_is_complete(tmp_path):
    def write(folder):
        assert not (tmp_path / "created").exists()
        (folder / "file").write_text("complete")

    write_folder(tmp_path / "created", write)
    assert (tmp_path / "created" / "file").read_text() == "complete"
    assert [path.name for path in tmp_path.iterdir()] == ["created"]


def test_a_folder_has_the_usual_permissions(tmp_path):
    (tmp_path / "usual").mkdir()
    write_folder(tmp_path / "created", lambda folder: None)
    assert (tmp_path / "created").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_failed_write_leaves_no_folder(tmp_path):
    def write(folder):
        (folder / "file").write_text("incomplete")
        raise ValueError("interrupted")

    with pytest.raises(ValueError, match="interrupted"):
        write_folder(tmp_path / "created", write)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_faster_process_is_used(tmp_path):
    def write(folder):
        (tmp_path / "created").mkdir()
        (tmp_path / "created" / "file").write_text("theirs")
        (folder / "file").write_text("ours")

    write_folder(tmp_path / "created", write)
    assert (tmp_path / "created" / "file").read_text() == "theirs"


def test_drafts_of_killed_processes_are_removed_but_recent_drafts_are_not(tmp_path):
    for name, age in {".draft-old": 7200, ".draft-new": 5}.items():
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    write_folder(tmp_path / "created", lambda folder: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".draft-new", "created"]


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_a_file_has_the_permissions_that_the_user_gives_to_new_files(tmp_path, umask):
    before = os.umask(umask)
    try:
        with default_permissions(tmp_path / "created"):
            (tmp_path / "created").chmod(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "created").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_failed_write_names_the_file_and_leaves_the_old_one(tmp_path, monkeypatch):
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
