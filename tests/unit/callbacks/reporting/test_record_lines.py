"""Unfinished files: what they belong to, how much of them is whole, and who may write them."""

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
def impatient(monkeypatch):
    monkeypatch.setattr(partial_file, "PATIENCE", 0.2)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out" / "predictions.jsonl"


@pytest.fixture
def part(path):
    path.parent.mkdir()
    return path.with_name("predictions.jsonl.part")


def left(part, content, identity=IDENTITY):
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(content)
    if identity is not None:
        identity_path(part).write_text(json.dumps(identity))
    return part


def opened(path, identity=IDENTITY, earlier=(), trainer=ALONE):
    lines = RecordLines(path)
    return lines, lines.open(trainer, identity, earlier)


BROKEN = {
    "a line without its end": (text(0, 1) + b'{"row": 2}', 2),
    "half a line": (text(0, 1) + b'{"row": 2, "pre', 2),
    "half a letter": (text(0, 1) + text(2)[:-5], 2),
    "zeros, as after a power cut": (text(0) + b"\0" * 40 + b"\n" + text(2), 1),
    "a row left out": (text(0, 1, 3), 2),
    "a line of something else": (text(0) + b"[1]\n" + text(1), 1),
    "nothing": (b"", 0),
    "all whole": (text(0, 1, 2), 3),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_file_is_gone_on_with_behind_its_last_whole_row(path, part, what):
    content, rows = BROKEN[what]
    left(part, content)
    lines, first = opened(path)
    assert first == rows
    lines.add(ALONE, records(*range(max(rows - 1, 0), 5)))  # the batch in which it broke off
    lines.close(ALONE)
    assert path.read_bytes() == text(*range(5))
    assert list(path.parent.iterdir()) == [path]


def test_rows_may_have_the_numbers_of_their_source(path, part):
    """Where rows of the source were skipped, or come from several files."""
    numbers = [0, 2, 3, 0, 1]
    made = {position: {"row": number} for position, number in enumerate(numbers)}
    content = [json.dumps(record) + "\n" for record in made.values()]
    left(part, ("".join(content[:3]) + '{"row": 9}\n').encode())
    lines = RecordLines(path)
    assert lines.open(ALONE, IDENTITY, (), numbers) == 3
    lines.add(ALONE, made)
    lines.close(ALONE)
    assert path.read_text() == "".join(content)


@pytest.mark.parametrize("label", [None, b"", b"{", b"[]"], ids=["none", "empty", "broken", "list"])
def test_a_file_that_does_not_say_what_it_belongs_to_is_kept(path, part, caplog, label):
    left(part, text(0, 1), None)
    if label is not None:
        identity_path(part).write_bytes(label)
    _, first = opened(path)
    assert first == 0
    assert part.with_name(f"{part.name}.1").read_bytes() == text(0, 1)
    assert "starts from the beginning" in caplog.text


def test_what_is_kept_replaces_nothing_that_was_kept_before(path, part):
    for number in range(3):
        lines, first = opened(path, {"rows": str(number)})
        assert first == 0
        lines.add(ALONE, records(*range(number + 1)))
        lines.leave()
    assert [count_complete_lines(part.with_name(f"{part.name}.{n}"))[0] for n in (1, 2)] == [1, 2]
    assert json.loads(identity_path(part.with_name(f"{part.name}.2")).read_text()) == {"rows": "1"}
    assert count_complete_lines(part)[0] == 3


def test_several_processes_begin_anew_and_say_so(path, part, caplog):
    left(part, text(0, 1))
    lines, first = opened(path, None, trainer=SimpleNamespace(is_global_zero=True, world_size=2))
    assert first == 0
    assert "in a single process" in caplog.text
    assert part.with_name(f"{part.name}.1").read_bytes() == text(0, 1)
    assert not identity_path(part).exists()
    lines.leave()


def test_a_finished_file_is_replaced_when_the_new_one_is_whole(path, part):
    path.write_bytes(text(0))
    lines, first = opened(path)
    assert first == 0
    lines.add(ALONE, records(0, 1))
    assert path.read_bytes() == text(0)
    lines.close(ALONE)
    assert path.read_bytes() == text(0, 1)


def test_two_runs_do_not_write_one_file(path):
    lines, _ = opened(path)
    lines.add(ALONE, records(0))
    with pytest.raises(ValueError, match=r"another run is writing .*predictions\.jsonl\.part; wait"):
        opened(path)
    lines.add(ALONE, records(1))
    lines.close(ALONE)
    assert path.read_bytes() == text(0, 1)


def test_the_newest_file_of_the_same_run_that_nobody_writes_is_taken_over(tmp_path, path):
    other = left(tmp_path / "5" / "p.part", text(0), {"rows": "b"})
    held, _ = opened(tmp_path / "4" / "p")
    held.add(ALONE, records(0, 1))
    mine = left(tmp_path / "3" / "p.part", text(0, 1, 2))
    older = left(tmp_path / "2" / "p.part", text(0, 1, 2, 3))
    gone = tmp_path / "1" / "p.part"
    earlier = [gone, other, tmp_path / "4" / "p.part", mine, older]
    lines, first = opened(path, earlier=earlier)
    assert first == 3
    assert [part.exists() for part in earlier] == [False, True, True, False, True]
    assert not identity_path(mine).exists()
    lines.leave()
    held.leave()


def test_a_file_of_its_own_goes_before_those_of_other_runs(tmp_path, path, part):
    left(part, text(0))
    other = left(tmp_path / "1" / "p.part", text(0, 1))
    assert opened(path, earlier=[other])[1] == 1
    assert other.exists()


class FullDisk(io.StringIO):
    """Takes so many lines."""

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


@pytest.mark.parametrize(("identity", "way_out"), [(IDENTITY, "the same command again"), (None, "run it again")])
def test_a_full_disk_is_told_with_file_row_and_way_out(path, part, monkeypatch, identity, way_out):
    file = FullDisk(part, 3)
    monkeypatch.setattr(PartialFile, "open", lambda *_: (file, 0))
    lines, _ = opened(path, identity)
    lines.add(ALONE, records(0, 1))
    wanted = rf"jsonl\.part cannot be written \(No space left on device\): it has rows 0 to 2\. Free .* {way_out}"
    with pytest.raises(UnwritableError, match=wanted):
        lines.add(ALONE, records(2, 3))
    lines.leave()
    assert part.read_bytes() == text(0, 1, 2)


def test_a_folder_that_cannot_be_made_is_told_in_the_same_way(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UnwritableError, match=r"file/p\.part cannot be written \(.*\): it has no complete row"):
        opened(tmp_path / "file" / "p")


def test_standard_output_that_takes_ascii_alone_gets_the_same_records(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", out)
    lines = RecordLines("-")
    lines.open(ALONE)
    lines.add(ALONE, {0: {"text": "é \x9b2J"}})
    assert json.loads(out.buffer.getvalue()) == {"text": "é \x9b2J"}


def test_records_hold_no_raw_control_characters(tmp_path):
    lines = RecordLines(tmp_path / "rows.jsonl")
    lines.open(ALONE)
    lines.add(ALONE, {0: {"text": "\x1b[2J \x9b31m \u202e é"}})
    lines.close(ALONE)
    content = (tmp_path / "rows.jsonl").read_text()
    assert json.loads(content) == {"text": "\x1b[2J \x9b31m \u202e é"}
    assert not {"\x1b", "\x9b", "\u202e"} & set(content)
    assert "é" in content
