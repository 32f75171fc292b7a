"""A corpus of hostile files: they run, import and write nothing, are read quickly, and are printed with escapes."""

import contextlib
import gc
import json
import re
import resource
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from hostile import fuzz, nothing_happens
from hostile_corpus import ESCAPES, build_lexical, write_corpus
from hypothesis import given
from hypothesis import strategies as st
from lightning import LightningModule

from lightning_softprompt import __main__ as command
from lightning_softprompt.checkpoints.prompt_file import read_prompt
from lightning_softprompt.checkpoints.restore import load_method
from lightning_softprompt.cli import app, resume_checks
from lightning_softprompt.cli.errors import configure_output
from lightning_softprompt.data.readers.sources import DataError, read_rows
from lightning_softprompt.data.readers.text_files import read_text_file
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.reports.html import article, page
from lightning_softprompt.retrieval import trusted_names
from lightning_softprompt.retrieval.index_builder import build_index, update_index
from lightning_softprompt.retrieval.passages.documents import Document
from lightning_softprompt.retrieval.search.settings import IndexSettings
from lightning_softprompt.system.printable import HIDDEN, PrintableFormatter, printable

FAMILIES = ("llama",)
SECONDS = 30.0  # processor time for each file: far above what a busy machine needs, far below exponential work
MEMORY = 16 * 2**20  # for each file, in addition to its size
TRIES = 3  # the best one counts, because other processes only make a measurement worse
PEAK_RESET = Path("/proc/self/clear_refs")
UNTRUSTED_MODULES = ("evilmod", "antigravity", "runpy")


@pytest.fixture(scope="module")
def corpus(load, tmp_path_factory):
    backbone = load("llama")
    owner = {"name": backbone.spec.name, "revision": None, "fingerprint": backbone.fingerprint()}
    return list(write_corpus(tmp_path_factory.mktemp("corpus") / "files", owner, build_lexical))


def open_prompt(path, backbone):
    load_method(read_prompt(path), path, backbone)


def open_checkpoint(path, backbone):
    open_prompt(path, backbone)
    SoftPromptModule.load_from_checkpoint(path)


def open_config(path, backbone):
    words = resume_checks.with_run_config(["test", "--init_from", str(path.parent / "prompt.safetensors")])
    settings = json.loads(words[2])
    assert "os.system" not in words[2]
    assert "folder" not in settings.get("run", {})


def run(*words):
    code = command.main([str(word) for word in words])
    if code:
        raise ValueError(f"code {code}")


ACTIONS = {
    "prompt": open_prompt, "checkpoint": open_checkpoint, "config": open_config,
    "study": lambda path, _: run("study", path, "--show"),
    "rows": lambda path, _: read_rows(path, on_bad_row="skip"),
    "document": lambda path, _: read_text_file(path),
    "index": lambda path, _: run("index", "search", path, "is this film good"),
    "library": lambda path, _: run("prompts", "list", "--folder", path),
}  # fmt: skip
HARMLESS = {  # read without an error: their content is harmless if it is shown as text
    ("index", "texts"), ("index", "url"), ("index", "size"), ("config", "merge"),
    ("config", "callbacks"), ("config", "logger"), ("config", "plugins"), ("config", "strategy"), ("config", "run"),
    ("library", "names"), ("index", "places"),
}  # fmt: skip


def outcome(file, backbone):
    """Return the error of a file that is refused, or None."""
    try:
        ACTIONS[file.kind](file.path, backbone)
    except (ValueError, DataError) as error:
        return str(error)
    return None


def warm_up(folder, backbone):
    """Import what later calls need."""
    owner = {"name": backbone.spec.name, "revision": None, "fingerprint": backbone.fingerprint()}
    method = {"_class_path": "lightning_softprompt.methods.PromptTuning", "length": 3, "backbone": vars(backbone.spec)}
    torch.save(
        {"state_dict": {"tokens": torch.ones(3, 32)}, "backbone": owner, "hyper_parameters": method}, folder / "p.ckpt"
    )
    open_checkpoint(folder / "p.ckpt", backbone)
    (folder / "p.ckpt").unlink()


def measure(file, backbone):
    """Return the error of a file, the processor time in seconds, and the memory in addition to the size of the file."""
    best = []
    for attempt in range(TRIES):
        if attempt:  # also frees the memory of earlier files
            gc.collect()
        before, started = restart_peak(), time.process_time()
        with nothing_happens():
            error = outcome(file, backbone)
        best.append((time.process_time() - started, peak() - before - size(file.path)))
        seconds, memory = (min(values) for values in zip(*best, strict=True))
        if seconds < SECONDS and memory < MEMORY:
            break
    return error, seconds, memory


def size(path):
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def restart_peak():
    """Reset the peak memory of this process to its current memory and return it.

    Where the system does not permit the reset, return the peak since the process started. Memory that is allocated
    below that peak is then not counted.
    """
    with contextlib.suppress(OSError):
        PEAK_RESET.write_text("5")
    return peak()


def peak():
    """Return the peak memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_the_measurement_counts_allocated_memory():
    size_of_tensor = 4 * MEMORY  # above 32 MB, where malloc never reuses memory that is free but still resident
    bytearray(size_of_tensor)  # raises the peak, or fits below an earlier one
    highest = peak()
    before = restart_peak()
    if before == highest:
        pytest.skip("the system does not permit a process to reset its peak memory")
    torch.ones(size_of_tensor // 4)
    assert peak() - before > MEMORY


def test_the_corpus_covers_every_kind(corpus):
    assert len(corpus) >= 150
    assert min(Counter(file.kind for file in corpus).values()) >= 1
    assert set(ACTIONS) == {file.kind for file in corpus}


@pytest.mark.parametrize("kind", list(ACTIONS))
def test_hostile_files_do_nothing(corpus, backbone, monkeypatch, capsys, caplog, tmp_path, kind):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evilmod.py").write_text("open('made', 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    caplog.handler.setFormatter(PrintableFormatter())
    chosen = [file for file in corpus if file.kind == kind]
    warm_up(tmp_path, backbone)
    outcome(chosen[-1], backbone)
    for file in chosen:
        error, seconds, memory = measure(file, backbone)
        assert seconds < SECONDS, file
        assert memory < MEMORY, file
        assert not set(UNTRUSTED_MODULES) & (set(sys.modules) - {"runpy"}), file
        assert kind in ("rows", "document") or (error is None) == ((kind, file.name) in HARMLESS), (file, error)
        assert not error or kind in ("study", "index", "library") or str(file.path.parent.name) in error, (file, error)
        shown = capsys.readouterr()
        assert not HIDDEN.search(shown.out + shown.err), file
        assert "Traceback" not in shown.err, file
    assert not HIDDEN.search(caplog.text)
    assert {path.name for path in tmp_path.iterdir()} <= {"evilmod.py", "__pycache__"}


def test_loading_by_lightning_runs_nothing(corpus, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = next(file.path for file in corpus if (file.kind, file.name) == ("checkpoint", "readout"))
    content = {**torch.load(path), "pytorch-lightning_version": "2.6.6"}
    content["hyper_parameters"]["_instantiator"] = "lightning.pytorch.cli.instantiate_module"
    torch.save(content, tmp_path / "p.ckpt")
    with nothing_happens(), pytest.raises(ValueError, match=r"os\.system"):
        LightningModule.load_from_checkpoint(tmp_path / "p.ckpt")


def test_changed_files_of_the_corpus_are_harmless(corpus, backbone, tmp_path):
    files = [
        file for file in corpus if file.kind in ("prompt", "checkpoint", "rows") and file.path.stat().st_size < 10**5
    ]

    @fuzz(80)
    @given(st.sampled_from(files), st.integers(0, 10**5), st.binary(max_size=6), st.integers(0, 9))
    def check(file, position, inserted, num_removed):
        content = file.path.read_bytes()
        position = position % (len(content) + 1)
        path = tmp_path / f"changed{file.path.suffix}"
        path.write_bytes(content[:position] + inserted + content[position + num_removed :])
        with nothing_happens():
            try:
                ACTIONS[file.kind](path, backbone)
            except ValueError as error:
                assert "changed" in str(error)  # noqa: PT017

    check()


@pytest.mark.parametrize("text", ["plain", "Ünï — 漢字 👩‍👧 नि", "tab\tand\nnewline", "شكرا"])
def test_ordinary_text_is_shown_without_changes(text):
    assert printable(text) == text


def test_control_characters_are_shown_with_the_escapes_of_json():
    shown = printable(ESCAPES)
    assert not HIDDEN.search(shown)
    assert json.loads(f'"{shown}"') == ESCAPES


def test_warnings_show_no_control_characters(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    configure_output()
    shown = warnings.formatwarning(f"{ESCAPES}\nmore", UserWarning, "file.py", 1)
    assert shown.count("\n") == 1
    assert "file.py" not in shown
    assert shown.startswith("UserWarning: ")
    assert "evil" in shown
    assert not HIDDEN.search(shown)


def test_pages_show_no_control_characters():
    html = page(ESCAPES, article(ESCAPES, {ESCAPES: "x"}))
    assert not HIDDEN.search(html)
    assert "<script>" not in html


@pytest.fixture
def foreign_index(tiny_folder, tmp_path, monkeypatch):
    """An index with vectors, built on the machine of another user."""
    name = str(tiny_folder("bert"))
    documents = [Document("1", "a", "is this film good"), Document("2", "b", "a sad story about a dog")]
    build_index(tmp_path / "index", documents, IndexSettings(encoder=name))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(trusted_names, "_trusted", set())
    return tmp_path / "index", name


def test_an_encoder_is_loaded_after_the_user_names_it(foreign_index, monkeypatch, capsys):
    index, name = foreign_index
    words = ["index", "search", str(index), "film"]
    assert command.main(words) == 2
    assert f"--encoder {name}" in capsys.readouterr().err
    assert command.main([*words, "--mode", "lexical"]) == 0
    with pytest.raises(ValueError, match="you have not named yourself"):
        update_index(index, [Document("3", "c", "what")])
    assert command.main([*words, "--encoder", name]) == 0
    monkeypatch.setattr(trusted_names, "_trusted", set())
    assert command.main(words) == 0  # remembered for later processes


def test_an_index_connects_only_to_a_server_that_the_user_names(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(trusted_names, "_trusted", set())
    settings = IndexSettings(encoder=None, store="qdrant", url="http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"names the url .* --url"):
        trusted_names.check_trusted(tmp_path, settings, encoder=False)


@pytest.mark.parametrize("name", ["laughs", "nested", "digits", "sixties", "product", "tag"])
def test_a_hostile_config_of_the_command_line_is_refused(corpus, name, capsys):
    path = next(file.path for file in corpus if (file.kind, file.name) == ("study", name))
    started = time.process_time()
    with nothing_happens(), pytest.raises((SystemExit, ValueError)):
        app.make_cli(["fit", "--config", str(path)])
    assert time.process_time() - started < SECONDS
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
