import shutil
import subprocess

import pytest

from lightning_softprompt.runs.run_record import note_start, read_record
from lightning_softprompt.system.git import read_commit

COMMIT = ["-c", "user.name=n", "-c", "user.email=e@example.org", "commit", "-qm", "first"]


@pytest.fixture
def repository(tmp_path, monkeypatch):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commit_is_that_of_the_current_folder_and_changes_are_marked(repository):
    assert read_commit() is None
    (repository / "file").write_text("one")
    for arguments in (["init", "-q"], ["add", "file"], COMMIT):
        subprocess.run(["git", *arguments], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert read_commit() == head
    note_start(repository / "run", wandb_id="a1")
    record = read_record(repository / "run")
    assert (record.commit, record.wandb_id) == (head, "a1")
    (repository / "file").write_text("two")
    assert read_commit() == f"{head}-dirty"


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert read_commit() is None
