import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lightning_softprompt.checkpoints import files
from lightning_softprompt.checkpoints.files import SavedPrompt, check_backbone, identity, read_prompt, write_prompt

FAMILIES = ("llama",)
METHOD = {"class_path": "lightning_softprompt.methods.PromptTuning", "init_args": {"length": 3}}


@pytest.fixture
def prompt(backbone):
    return SavedPrompt({"tokens": torch.randn(3, 32), "scale": torch.ones(())}, identity(backbone), METHOD)


@pytest.fixture
def file(prompt, tmp_path):
    write_prompt(tmp_path / "prompt.safetensors", prompt)
    return tmp_path / "prompt.safetensors"


@pytest.fixture
def checkpoint(prompt, tmp_path):
    values = {"state_dict": dict(prompt.tensors), "backbone": prompt.backbone, "hyper_parameters": METHOD}
    torch.save(values, tmp_path / "run.ckpt")
    return tmp_path / "run.ckpt"


class Code:
    """Unpickling it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_what_is_written_is_read(prompt, file, checkpoint):
    for path in (file, checkpoint):
        saved = read_prompt(path)
        assert saved.tensors.keys() == prompt.tensors.keys()
        assert all(torch.equal(saved.tensors[name], value) for name, value in prompt.tensors.items())
        assert (saved.backbone, saved.method) == (prompt.backbone, METHOD)


def test_a_prompt_is_kilobytes_of_plain_safetensors(file):
    assert file.stat().st_size < 2000
    with safe_open(file, framework="pt") as opened:
        assert set(opened.metadata()) == {"backbone", "method"}


def test_writing_replaces_the_file_whole_or_not_at_all(prompt, file, monkeypatch):
    before = file.read_bytes()

    def broken(tensors, path, header):
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(files, "save_file", broken)
    with pytest.raises(OSError, match="no space left"):
        write_prompt(file, prompt)
    assert file.read_bytes() == before


def test_writing_leaves_nothing_else_behind(file):
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_trainable_parameters_can_be_written(prompt, tmp_path):
    tokens = torch.nn.Parameter(torch.randn(4, 6).T)  # not contiguous either
    write_prompt(tmp_path / "p.safetensors", SavedPrompt({"tokens": tokens}, prompt.backbone, METHOD))
    assert torch.equal(read_prompt(tmp_path / "p.safetensors").tensors["tokens"], tokens)


@pytest.mark.parametrize("name", ["prompt.safetensors", "run.ckpt"])
def test_a_file_that_is_not_there_is_named(tmp_path, name):
    with pytest.raises(ValueError, match=f"no prompt at {tmp_path / name}"):
        read_prompt(tmp_path / name)


@pytest.mark.parametrize("share", [0, 0.03, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_told_as_such(file, checkpoint, share):
    for path in (file, checkpoint):
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=f"{path} is no whole"):
            read_prompt(path)


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"version https://git-lfs.github.com/spec/v1\n"])
@pytest.mark.parametrize("name", ["prompt.safetensors", "run.ckpt"])
def test_another_kind_of_file_is_told_as_such(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="is no whole"):
        read_prompt(tmp_path / name)


@pytest.mark.parametrize("content", [b"hello", b"\x80\x02.", b"\x80\x02q"])
def test_bytes_that_are_no_pickle_are_told_as_such(tmp_path, content):
    (tmp_path / "run.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match="is no whole"):
        read_prompt(tmp_path / "run.ckpt")


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, write):
    write({"state_dict": {}, "backbone": Code(tmp_path / "made")}, tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match="no whole checkpoint of plain values and tensors"):
        read_prompt(tmp_path / "run.ckpt")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("header", [None, {"format": "pt"}])
def test_safetensors_of_others_are_told_as_such(tmp_path, header):
    save_file({"tokens": torch.ones(2, 3)}, tmp_path / "other.safetensors", header)
    with pytest.raises(ValueError, match="was not written by this project"):
        read_prompt(tmp_path / "other.safetensors")


@pytest.mark.parametrize("value", [{"state_dict": {}}, [1, 2], {}, torch.ones(2)])
def test_checkpoints_of_others_are_told_as_such(tmp_path, value):
    torch.save(value, tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match="was not written by this project"):
        read_prompt(tmp_path / "run.ckpt")


def test_a_prompt_is_bound_to_its_weights_and_not_to_their_name(backbone, load, tmp_path):
    saved = identity(backbone)
    check_backbone({**saved, "name": "somewhere else"}, backbone, "p")
    check_backbone(saved, load("llama", dtype="bfloat16"), "p")
    other = load("llama", seed=1)
    with pytest.raises(ValueError, match=r"p was trained on .* set backbone\.name") as error:
        check_backbone(saved, other, "p")
    assert saved["fingerprint"] in str(error.value)
    assert other.fingerprint() in str(error.value)
    with pytest.raises(ValueError, match="trained on"):
        check_backbone({}, backbone, "p")
