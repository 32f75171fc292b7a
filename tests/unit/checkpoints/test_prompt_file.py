import json
import os
import pickle
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lightning_softprompt.checkpoints import prompt_file
from lightning_softprompt.checkpoints.atomic_io import AtomicCheckpointIO
from lightning_softprompt.checkpoints.backbone_identity import backbone_identity, check_backbone
from lightning_softprompt.checkpoints.library import Library
from lightning_softprompt.checkpoints.prompt_file import SavedPrompt, read_prompt, write_prompt
from lightning_softprompt.checkpoints.restore import load_method

FAMILIES = ("llama",)
METHOD = {"class_path": "lightning_softprompt.methods.PromptTuning", "init_args": {"length": 3}}


@pytest.fixture
def prompt(backbone):
    return SavedPrompt({"tokens": torch.randn(3, 32), "scale": torch.ones(())}, backbone_identity(backbone), METHOD)


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
    """An object whose unpickling creates a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_reading_returns_what_was_written(prompt, file, checkpoint):
    for path in (file, checkpoint):
        saved = read_prompt(path)
        assert saved.tensors.keys() == prompt.tensors.keys()
        assert all(torch.equal(saved.tensors[name], value) for name, value in prompt.tensors.items())
        assert (saved.backbone, saved.method) == (prompt.backbone, METHOD)


def test_a_prompt_is_kilobytes_of_plain_safetensors(file):
    assert file.stat().st_size < 2000
    with safe_open(file, framework="pt") as opened:
        assert set(opened.metadata()) == {"backbone", "method", "checksum"}


def test_a_failed_write_leaves_the_old_file(prompt, file, monkeypatch):
    before = file.read_bytes()

    def raise_disk_full(tensors, path, header):
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(prompt_file, "save_file", raise_disk_full)
    with pytest.raises(OSError, match="no space left"):
        write_prompt(file, prompt)
    assert file.read_bytes() == before


def test_writing_leaves_no_other_file(file):
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_a_trainable_parameter_can_be_written(prompt, tmp_path):
    tokens = torch.nn.Parameter(torch.randn(4, 6).T)  # neither is it contiguous
    write_prompt(tmp_path / "p.safetensors", SavedPrompt({"tokens": tokens}, prompt.backbone, METHOD))
    assert torch.equal(read_prompt(tmp_path / "p.safetensors").tensors["tokens"], tokens)


@pytest.mark.parametrize("name", ["prompt.safetensors", "run.ckpt"])
def test_a_missing_file_is_named_in_the_error(tmp_path, name):
    with pytest.raises(ValueError, match=f"no prompt at {tmp_path / name}"):
        read_prompt(tmp_path / name)


@pytest.mark.parametrize("share", [0, 0.03, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_reported_as_not_valid(file, checkpoint, share):
    for path in (file, checkpoint):
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match=f"{path} is not a valid"):
            read_prompt(path)


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"version https://git-lfs.github.com/spec/v1\n"])
@pytest.mark.parametrize("name", ["prompt.safetensors", "run.ckpt"])
def test_another_kind_of_file_is_reported_as_not_valid(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="is not a valid"):
        read_prompt(tmp_path / name)


@pytest.mark.parametrize("content", [b"hello", b"\x80\x02.", b"\x80\x02q"])
def test_bytes_that_are_not_a_pickle_are_reported_as_not_valid(tmp_path, content):
    (tmp_path / "run.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match="is not a valid"):
        read_prompt(tmp_path / "run.ckpt")


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_code_in_a_checkpoint_is_rejected_and_not_run(tmp_path, write):
    write({"state_dict": {}, "backbone": Code(tmp_path / "created")}, tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match="not a valid checkpoint of plain values and tensors"):
        read_prompt(tmp_path / "run.ckpt")
    assert not (tmp_path / "created").exists()


@pytest.mark.parametrize("header", [None, {"format": "pt"}])
def test_a_safetensors_file_of_another_project_is_rejected(tmp_path, header):
    save_file({"tokens": torch.ones(2, 3)}, tmp_path / "other.safetensors", header)
    with pytest.raises(ValueError, match="was not written by this project"):
        read_prompt(tmp_path / "other.safetensors")


@pytest.mark.parametrize("value", [{"state_dict": {}}, [1, 2], {}, torch.ones(2)])
def test_a_checkpoint_of_another_project_is_rejected(tmp_path, value):
    torch.save(value, tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match="was not written by this project"):
        read_prompt(tmp_path / "run.ckpt")


def test_a_prompt_requires_its_weights_and_not_their_name(backbone, load, tmp_path):
    saved = backbone_identity(backbone)
    check_backbone({**saved, "name": "somewhere else"}, backbone, "p")
    check_backbone(saved, load("llama", dtype="bfloat16"), "p")
    other = load("llama", seed=1)
    with pytest.raises(ValueError, match=r"p was trained on .* set --backbone\.name") as error:
        check_backbone(saved, other, "p")
    assert saved["fingerprint"] in str(error.value)
    assert other.fingerprint() in str(error.value)
    with pytest.raises(ValueError, match="trained on"):
        check_backbone({}, backbone, "p")


def test_a_flipped_bit_is_detected_at_every_position(prompt, file, checkpoint):
    """Or it changes nothing: a checkpoint has padding, and a prompt file the name of its checksum."""
    for path, least in ((file, 0.95), (checkpoint, 0.5)):
        content, num_errors = path.read_bytes(), 0
        positions = range(0, len(content), max(1, len(content) // 150))
        for position in positions:
            damaged = bytearray(content)
            damaged[position] ^= 16
            path.write_bytes(damaged)
            try:
                saved = read_prompt(path)
            except ValueError as error:
                assert str(path) in str(error)  # noqa: PT017
                num_errors += 1
            else:
                assert all(torch.equal(saved.tensors[name], value) for name, value in prompt.tensors.items())
                assert (saved.backbone, saved.method) == (prompt.backbone, METHOD)
        assert num_errors >= least * len(positions)


def test_a_tensor_marked_as_a_folder_in_the_archive_is_rejected(checkpoint):
    content = bytearray(checkpoint.read_bytes())
    (entry,) = re.finditer(rb"PK\x01\x02.{42}\w+/data/0", bytes(content), re.DOTALL)
    content[entry.start() + 38] ^= 16  # the attributes of the entry
    checkpoint.write_bytes(content)
    with pytest.raises(ValueError, match="data/0 has zip metadata that PyTorch never writes"):
        read_prompt(checkpoint)


def test_the_error_of_a_damaged_checkpoint_names_the_newest_complete_one(checkpoint):
    content = checkpoint.read_bytes()
    for age, name in enumerate(("newer.ckpt", "older.ckpt", "broken.ckpt")):
        path = checkpoint.with_name(name)
        path.write_bytes(content if age < 2 else content[:-100])
        os.utime(path, (1e9 - age, 1e9 - age))
    checkpoint.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"run\.ckpt is not a valid .*newer\.ckpt, of 2001-09-.*, is complete"):
        read_prompt(checkpoint)


def test_a_prompt_without_a_checksum_is_read(prompt, tmp_path):
    header = {"backbone": json.dumps(prompt.backbone), "method": json.dumps(METHOD)}
    save_file(dict(prompt.tensors), tmp_path / "old.safetensors", header)
    assert read_prompt(tmp_path / "old.safetensors").method == METHOD


@pytest.mark.parametrize("header_size", [2**62, 2**63 + 8, 10**9, 90])
def test_a_header_that_claims_too_many_bytes_is_rejected(tmp_path, header_size):
    header = json.dumps({"tokens": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (tmp_path / "p.safetensors").write_bytes(struct.pack("<Q", header_size) + header.ljust(90) + bytes(8))
    with pytest.raises(ValueError, match="is not a valid safetensors file"):
        read_prompt(tmp_path / "p.safetensors")


@pytest.mark.parametrize(
    "kind", ["subprocess.Popen", "os.mkdir", "lightning_softprompt.system.atomic_files.write_folder"]
)
@pytest.mark.parametrize("where", ["method", "optimizer", "init"])
def test_a_file_cannot_name_a_function_to_run(prompt, backbone, tmp_path, kind, where):
    attack = {
        "class_path": kind,
        "init_args": {"args": ["touch", str(tmp_path / "created")], "path": str(tmp_path / "created")},
    }
    method = {"_class_path": "lightning_softprompt.methods.PromptTuning", "length": 3}
    if where == "method":
        method = {**attack["init_args"], "_class_path": kind}
    else:
        method[where] = attack
    write_prompt(tmp_path / "p.safetensors", SavedPrompt(prompt.tensors, prompt.backbone, method))
    with pytest.raises(ValueError, match=r"p\.safetensors cannot be loaded: .*which is not a plug-in"):
        load_method(read_prompt(tmp_path / "p.safetensors"), tmp_path / "p.safetensors", backbone)
    assert not (tmp_path / "created").exists()


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/b", "..", ".hidden", ""])
def test_a_name_in_a_library_is_not_a_path(file, tmp_path, name):
    with pytest.raises(ValueError, match="names may contain only letters"):
        Library(tmp_path / "library").add(name, file)
    assert [p.name for p in tmp_path.rglob("*.safetensors")] == [file.name]


def test_names_of_tensors_are_not_paths(prompt, backbone, tmp_path):
    tensors = {"../../out": torch.ones(3), "tokens": torch.ones(3, 32)}
    method = {"_class_path": "lightning_softprompt.methods.PromptTuning", "length": 3}
    write_prompt(tmp_path / "p.safetensors", SavedPrompt(tensors, prompt.backbone, method))
    with pytest.raises(ValueError, match=r"p\.safetensors contains other tensors.*Unexpected key"):
        load_method(read_prompt(tmp_path / "p.safetensors"), tmp_path / "p.safetensors", backbone)


def test_a_full_disk_leaves_the_last_checkpoint(checkpoint, monkeypatch):
    before = checkpoint.read_bytes()

    def raise_disk_full(value, file):
        file.write(b"half")
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", raise_disk_full)
        with pytest.raises(OSError, match="no space left"):
            AtomicCheckpointIO().save_checkpoint({"a": 1}, checkpoint)
    assert checkpoint.read_bytes() == before
    assert [p.name for p in checkpoint.parent.iterdir()] == [checkpoint.name]
    AtomicCheckpointIO().save_checkpoint({"a": torch.ones(3)}, checkpoint.parent / "new" / "run.ckpt")
    assert torch.equal(torch.load(checkpoint.parent / "new" / "run.ckpt", weights_only=True)["a"], torch.ones(3))


def test_a_prompt_does_not_replace_a_folder(tmp_path):
    (tmp_path / "prompt").mkdir()
    with pytest.raises(IsADirectoryError):
        write_prompt(tmp_path / "prompt", SavedPrompt({"tokens": torch.zeros(1)}, {}, {}))
    assert [path.name for path in tmp_path.iterdir()] == ["prompt"]
