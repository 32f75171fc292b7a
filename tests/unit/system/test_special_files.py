"""A finished file replaces any file with its name, so paths of devices and pipes are refused."""

import os
from pathlib import Path

import pytest

from lightning_softprompt.checkpoints.prompt_file import SavedPrompt, write_prompt
from lightning_softprompt.cli.commands.completion import write
from lightning_softprompt.system.atomic_files import refuse_special_file, write_file
from lightning_softprompt.system.partial_file import PartialFile


@pytest.fixture
def pipe(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    return path


def test_a_pipe_is_not_replaced(pipe):
    prompt = SavedPrompt({}, {}, {})
    writers = (
        lambda: write_file(pipe, b"x"),
        lambda: PartialFile(pipe).open(None),
        lambda: write_prompt(pipe, prompt),
        lambda: write("x", pipe),
    )
    for write_to_pipe in writers:
        with pytest.raises(ValueError, match="device or a pipe"):
            write_to_pipe()
    assert pipe.is_fifo()
    assert [path.name for path in pipe.parent.iterdir()] == ["pipe"]


@pytest.mark.parametrize("path", ["/dev/null", "/dev/stdout", "/dev/fd/1", "/dev/no-such-device", "/proc/self/fd/1"])
def test_devices_and_descriptors_are_refused_by_name(path):
    with pytest.raises(ValueError, match="device or a pipe"):
        refuse_special_file(Path(path))


def test_files_and_links_to_files_are_not_refused(tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    refuse_special_file(file)
    file.write_text("x")
    link.symlink_to(file)
    for path in (file, link, Path("/dev/shm/file")):
        refuse_special_file(path)
