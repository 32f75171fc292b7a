"""Damaged and forged prompt files are read correctly or rejected by name; nothing in them is run."""

import json
import pickle
import struct

import pytest
import torch
from hostile import VALUES, fuzz, nothing_happens
from hypothesis import given
from hypothesis import strategies as st

from lightning_softprompt.checkpoints.checkpoint_file import load_checkpoint
from lightning_softprompt.checkpoints.prompt_file import SavedPrompt, read_prompt, write_prompt
from lightning_softprompt.checkpoints.restore import load_method

FAMILIES = ("llama",)
METHOD = {"_class_path": "lightning_softprompt.methods.PromptTuning", "length": 3}


class Run:
    """An object whose unpickling calls a function."""

    def __init__(self, module, name, arguments):
        function = getattr(__import__(module, fromlist=[name]), name)
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_the_audit_detects_a_write_and_a_command(tmp_path):
    with pytest.raises(AssertionError, match="open"), nothing_happens():
        (tmp_path / "created").write_text("")
    with pytest.raises(AssertionError, match=r"os\.system"), nothing_happens():
        pickle.loads(pickle.dumps(Run("os", "system", ("true",))))


@pytest.fixture
def valid_files(backbone, tmp_path):
    """A prompt, and the content of its prompt file and its checkpoint by suffix."""
    saved = SavedPrompt({"tokens": torch.randn(3, 32)}, {"name": "x", "fingerprint": backbone.fingerprint()}, METHOD)
    write_prompt(tmp_path / "p.safetensors", saved)
    values = {"state_dict": saved.tensors, "backbone": saved.backbone, "hyper_parameters": METHOD, "epoch": 1}
    torch.save(values, tmp_path / "p.ckpt")
    return saved, {suffix: (tmp_path / f"p{suffix}").read_bytes() for suffix in (".safetensors", ".ckpt")}


def damage(draw, content):
    """Return the bytes with a few of them changed, removed or inserted, or without all after a position."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        position = draw(st.integers(0, max(0, len(content) - 1)))
        match draw(st.sampled_from(["flip", "truncate", "insert", "remove"])):
            case "flip" if content:
                content[position] ^= 1 << draw(st.integers(0, 7))
            case "truncate":
                del content[position:]
            case "insert":
                content[position:position] = draw(st.binary(max_size=9))
            case _:
                del content[position : position + draw(st.integers(1, 9))]
    return bytes(content)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_damaged_file_is_rejected_by_name_or_read_correctly(valid_files, tmp_path, suffix):
    saved, content = valid_files
    path = tmp_path / f"damage{suffix}"

    @fuzz(150)
    @given(st.data())
    def check(data):
        path.write_bytes(damage(data.draw, content[suffix]))
        with nothing_happens():
            try:
                loaded = read_prompt(path)
            except ValueError as error:
                assert str(path) in str(error)  # noqa: PT017
                return
        assert torch.equal(loaded.tensors["tokens"], saved.tensors["tokens"])
        assert (loaded.backbone, loaded.method) == (saved.backbone, METHOD)

    check()


HEADERS = st.dictionaries(
    st.sampled_from(["tokens", "../../made", "/tmp/made", "__metadata__", ""]),
    st.fixed_dictionaries({}, optional={
        "dtype": st.sampled_from(["F32", "F64", "I8", "BOOL", "X", 3]),
        "shape": st.lists(st.integers(-1, 2**62), max_size=3),
        "data_offsets": st.lists(st.integers(-1, 2**62) | st.integers(0, 64), max_size=3),
        "backbone": VALUES.map(json.dumps) | st.text(max_size=4), "method": VALUES.map(json.dumps),
    }), max_size=3,
)  # fmt: skip


@fuzz(200)
@given(header=HEADERS, claimed_size=st.none() | st.integers(0, 2**64 - 1), after=st.binary(max_size=64))
def test_an_arbitrary_header_is_rejected_by_name(tmp_path, header, claimed_size, after):
    text = json.dumps(header).encode()
    path = tmp_path / "p.safetensors"
    header_size = len(text) if claimed_size is None else claimed_size
    path.write_bytes(struct.pack("<Q", header_size) + text + after)
    with nothing_happens():
        try:
            saved = read_prompt(path)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
        else:
            assert isinstance(saved.backbone, dict)
            assert isinstance(saved.method, dict)


CALLS = [
    Run("os", "system", ("touch made",)), Run("os", "mkdir", ("made",)), Run("builtins", "exec", ("open('made','w')",)),
    Run("builtins", "eval", ("open('made','w')",)), Run("subprocess", "Popen", (["touch", "made"],)),
    Run("builtins", "open", ("made", "w")), Run("pathlib", "Path", ("made",)), Run("torch", "load", ("made",)),
    Run("importlib", "import_module", ("antigravity",)), Run("builtins", "getattr", ("a", "join")),
]  # fmt: skip


@fuzz(120)
@given(
    call=st.sampled_from(CALLS),
    key=st.sampled_from(["state_dict", "backbone", "hyper_parameters", "callbacks"]),
    depth=st.integers(0, 2),
    protocol=st.integers(0, 5),
    packed=st.booleans(),
)
def test_a_pickle_that_calls_a_function_is_rejected_without_the_call(tmp_path, call, key, depth, protocol, packed):
    for _ in range(depth):
        call = {"a": [call]}
    values = {"state_dict": {"tokens": torch.ones(3, 32)}, "backbone": {}, key: call}
    path = tmp_path / "p.ckpt"
    if packed:
        torch.save(values, path, pickle_protocol=max(2, protocol))
    else:
        path.write_bytes(pickle.dumps({**values, "state_dict": {}} | {key: call}, protocol=protocol))
    for read in (read_prompt, load_checkpoint):
        with nothing_happens(), pytest.raises(ValueError, match="not a valid checkpoint of plain values and tensors"):
            read(path)


METHODS = st.dictionaries(
    st.sampled_from(["_class_path", "length", "init", "optimizer", "readout", "penalties", "prompt_dropout", "classes",
                     "backbone", "objective", "no_such"]),
    VALUES
    | st.sampled_from(["os.system", "lightning_softprompt.methods.PromptTuning", "builtins.exec", ".."])
    | st.fixed_dictionaries({
        "class_path": st.sampled_from(["os.mkdir", "subprocess.Popen",
                                       "lightning_softprompt.system.atomic_files.write_file",
                                       "lightning_softprompt.prompts.init.Uniform", "shutil.rmtree"]),
        "init_args": st.dictionaries(st.sampled_from(["path", "args", "name", "content"]), VALUES, max_size=2),
    }), max_size=4,
)  # fmt: skip


def test_arbitrary_arguments_build_a_valid_method_or_are_rejected_by_name(valid_files, backbone, tmp_path):
    saved, _ = valid_files
    path = tmp_path / "p.safetensors"
    load_method(saved, path, backbone)  # imports what later calls need

    @fuzz(40)
    @given(METHODS)
    def check(method):
        with nothing_happens():
            try:
                prompt = SavedPrompt(saved.tensors, saved.backbone, {**METHOD, **method})
                loaded = load_method(prompt, path, backbone)
            except ValueError as error:
                assert str(path) in str(error)  # noqa: PT017
            else:
                assert torch.equal(loaded.state_dict()["tokens"], saved.tensors["tokens"])

    check()
