"""Partial files: which run they belong to, how many rows are complete, and which process can write them."""

import errno
import io
import json
import os
from types import SimpleNamespace

import pytest

from lightning_softprompt.callbacks.reporting.record_lines import RecordLines, UnwritableError
from lightning_softprompt.system import partial_file
from lightning_softprompt.system.partial_file import PartialFile, count_complete_lines, identity_path

ALONE = SimpleNamespace(is_global_zero=True, world_size=1)
IDENTITY = {"rows": "a", "settings": 0.1}


def records(*rows):
    return {row: {"row": row, "prediction": f"é {row}"} for row in rows}


def text(*rows):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records(*rows).values()).encode()


@pytest.fixture(autouse=True)
def short_patience(monkeypatch):
    monkeypatch.setattr(partial_file, "PATIENCE", 0.2)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out" / "predictions.jsonl"


@pytest.fixture
def part(path):
    path.parent.mkdir()
    return path.with_name("predictions.jsonl.part")


def write_partial(part, content, identity=IDENTITY):
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(content)
    if identity is not None:
        identity_path(part).write_text(json.dumps(identity))
    return part


def open_lines(path, identity=IDENTITY, earlier=(), trainer=ALONE):
    lines = RecordLines(path)
    return lines, lines.open(trainer, identity, earlier)


PARTIAL = {
    "a line without its newline": (text(0, 1) + b'{"row": 2}', 2),
    "half a line": (text(0, 1) + b'{"row": 2, "pre', 2),
    "half a letter": (text(0, 1) + text(2)[:-5], 2),
    "zeros, as after a power cut": (text(0) + b"\0" * 40 + b"\n" + text(2), 1),
    "a missing row": (text(0, 1, 3), 2),
    "a line that is not a record": (text(0) + b"[1]\n" + text(1), 1),
    "nothing": (b"", 0),
    "only complete rows": (text(0, 1, 2), 3),
}


@pytest.mark.parametrize("name", PARTIAL)
def test_a_partial_file_is_continued_after_its_last_complete_row(path, part, name):
    content, rows = PARTIAL[name]
    write_partial(part, content)
    lines, first = open_lines(path)
    assert first == rows
    lines.add(ALONE, records(*range(max(rows - 1, 0), 5)))  # from the interrupted batch
    lines.close(ALONE)
    assert path.read_bytes() == text(*range(5))
    assert list(path.parent.iterdir()) == [path]


def test_rows_can_have_the_numbers_of_their_source(path, part):
    """If rows of the source were skipped, or come from several files."""
    numbers = [0, 2, 3, 0, 1]
    numbered = {position: {"row": number} for position, number in enumerate(numbers)}
    content = [json.dumps(record) + "\n" for record in numbered.values()]
    write_partial(part, ("".join(content[:3]) + '{"row": 9}\n').encode())
    lines = RecordLines(path)
    assert lines.open(ALONE, IDENTITY, (), numbers) == 3
    lines.add(ALONE, numbered)
    lines.close(ALONE)
    assert path.read_text() == "".join(content)


@pytest.mark.parametrize("label", [None, b"", b"{", b"[]"], ids=["none", "empty", "broken", "list"])
def test_a_partial_file_without_an_identity_is_renamed(path, part, caplog, label):
    write_partial(part, text(0, 1), None)
    if label is not None:
        identity_path(part).write_bytes(label)
    _, first = open_lines(path)
    assert first == 0
    assert part.with_name(f"{part.name}.1").read_bytes() == text(0, 1)
    assert "starts from the beginning" in caplog.text


def test_a_renamed_file_does_not_replace_an_earlier_one(path, part):
    for number in range(3):
        lines, first = open_lines(path, {"rows": str(number)})
        assert first == 0
        lines.add(ALONE, records(*range(number + 1)))
        lines.leave()
    first, second = (part.with_name(f"{part.name}.{n}") for n in (1, 2))
    assert count_complete_lines(first)[0] == 1
    assert count_complete_lines(second)[0] == 2
    assert json.loads(identity_path(second).read_text()) == {"rows": "1"}
    assert count_complete_lines(part)[0] == 3


def test_several_processes_start_from_the_beginning_with_a_message(path, part, caplog):
    write_partial(part, text(0, 1))
    lines, first = open_lines(path, None, trainer=SimpleNamespace(is_global_zero=True, world_size=2))
    assert first == 0
    assert "in a single process" in caplog.text
    assert part.with_name(f"{part.name}.1").read_bytes() == text(0, 1)
    assert not identity_path(part).exists()
    lines.leave()


def test_a_finished_file_is_replaced_when_the_new_one_is_complete(path, part):
    path.write_bytes(text(0))
    lines, first = open_lines(path)
    assert first == 0
    lines.add(ALONE, records(0, 1))
    assert path.read_bytes() == text(0)
    lines.close(ALONE)
    assert path.read_bytes() == text(0, 1)


def test_two_runs_do_not_write_one_file(path):
    lines, _ = open_lines(path)
    lines.add(ALONE, records(0))
    with pytest.raises(ValueError, match=r"another run is writing .*predictions\.jsonl\.part; wait"):
        open_lines(path)
    lines.add(ALONE, records(1))
    lines.close(ALONE)
    assert path.read_bytes() == text(0, 1)


def test_the_newest_partial_file_of_the_same_run_that_no_process_writes_is_continued(tmp_path, path):
    other = write_partial(tmp_path / "5" / "p.part", text(0), {"rows": "b"})
    locked, _ = open_lines(tmp_path / "4" / "p")
    locked.add(ALONE, records(0, 1))
    continued = write_partial(tmp_path / "3" / "p.part", text(0, 1, 2))
    older = write_partial(tmp_path / "2" / "p.part", text(0, 1, 2, 3))
    missing = tmp_path / "1" / "p.part"
    earlier = [missing, other, tmp_path / "4" / "p.part", continued, older]
    lines, first = open_lines(path, earlier=earlier)
    assert first == 3
    assert [part.exists() for part in earlier] == [False, True, True, False, True]
    assert not identity_path(continued).exists()
    lines.leave()
    locked.leave()


def test_the_partial_file_of_the_path_precedes_those_of_other_runs(tmp_path, path, part):
    write_partial(part, text(0))
    other = write_partial(tmp_path / "1" / "p.part", text(0, 1))
    assert open_lines(path, earlier=[other])[1] == 1
    assert other.exists()


class FullDisk(io.StringIO):
    """A file that raises an error after a number of lines."""

    def __init__(self, part, lines):
        super().__init__()
        self.part, self.lines = part, lines

    def writelines(self, lines):
        for line in lines:
            if not self.lines:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.lines -= 1
            with self.part.open("a") as file:
                file.write(line)

    def close(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(("identity", "advice"), [(IDENTITY, "the same command again"), (None, "run it again")])
def test_the_error_of_a_full_disk_has_file_rows_and_advice(path, part, monkeypatch, identity, advice):
    file = FullDisk(part, 3)
    monkeypatch.setattr(PartialFile, "open", lambda *_: (file, 0))
    lines, _ = open_lines(path, identity)
    lines.add(ALONE, records(0, 1))
    message = rf"jsonl\.part cannot be written \(No space left on device\): it has rows 0 to 2\. Free .* {advice}"
    with pytest.raises(UnwritableError, match=message):
        lines.add(ALONE, records(2, 3))
    lines.leave()
    assert part.read_bytes() == text(0, 1, 2)


def test_a_folder_that_cannot_be_created_is_the_same_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UnwritableError, match=r"file/p\.part cannot be written \(.*\): it has no complete row"):
        open_lines(tmp_path / "file" / "p")


def test_standard_output_in_ascii_receives_the_same_records(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", out)
    lines = RecordLines("-")
    lines.open(ALONE)
    lines.add(ALONE, {0: {"text": "é \x9b2J"}})
    assert json.loads(out.buffer.getvalue()) == {"text": "é \x9b2J"}


def test_records_contain_no_raw_control_characters(tmp_path):
    lines = RecordLines(tmp_path / "rows.jsonl")
    lines.open(ALONE)
    lines.add(ALONE, {0: {"text": "\x1b[2J \x9b31m \u202e é"}})
    lines.close(ALONE)
    content = (tmp_path / "rows.jsonl").read_text()
    assert json.loads(content) == {"text": "\x1b[2J \x9b31m \u202e é"}
    assert not {"\x1b", "\x9b", "\u202e"} & set(content)
    assert "é" in content
