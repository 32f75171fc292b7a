"""Predictions are lost by no accident: a killed run, a full disk, a reader that leaves."""

import json
import os
import resource
import signal
import subprocess
import sys

import pytest
import tiny
from row_files import read_rows

from lightning_softprompt.cli.app import main
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.runs.run_spec import last_folder

ROWS = 301  # the last batch is not full


@pytest.fixture
def options(tmp_path, tiny_folder):
    """Of a command on rows of several lengths; the prompt is as it starts, by the seed."""
    words = tiny.WORDS[:20]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(words[: 1 + i % 20])}) + "\n" for i in range(ROWS)))
    return [
        f"--backbone.name={tiny_folder('llama')}",
        "--model=PromptTuning",
        "--model.length=3",
        "--data=ClassificationDataModule",
        f"--data.predict={path}",
        "--data.template={soft}{text} it is{target}",
        '--data.labels={"negative": "bad", "neutral": "one", "positive": "good"}',
        "--data.batch_size=2",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        f"--run.folder={tmp_path / 'runs'}",
    ]


@pytest.fixture
def command(options):
    """As a process is started with it, which runs on one thread as tests do."""
    code = (
        "import sys, torch; torch.set_num_threads(1); from lightning_softprompt.__main__ import main; sys.exit(main())"
    )
    return [sys.executable, "-c", code, "predict", *options]


@pytest.fixture
def asked(monkeypatch):
    """The rows that the model is given from here on."""
    rows, step = [], SoftPromptModule.predict_step

    def counted(module, batch, batch_idx):
        rows.extend(batch.row_ids)
        return step(module, batch, batch_idx)

    monkeypatch.setattr(SoftPromptModule, "predict_step", counted)
    return rows


def killed(argv, batch=10):
    """Runs a command in a copy of this process, which is killed before it predicts a batch; nobody waits for that."""
    strike = {"class_path": "signals.SignalAt", "init_args": {"batch": batch, "name": "SIGKILL"}}
    if not (process := os.fork()):
        try:
            main([*argv, f"--trainer.callbacks={json.dumps([strike])}"])
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


def count(path):
    return path.read_bytes().count(b"\n")


def test_a_run_that_was_killed_goes_on_and_leaves_the_file_of_one_that_was_not(tmp_path, options, asked):
    whole, path = tmp_path / "whole.jsonl", tmp_path / "out" / "predictions.jsonl"
    assert main(["predict", *options, f"--run.predictions={whole}"]) == 0
    assert count(whole) == ROWS
    named, part = f"--run.predictions={path}", path.with_name("predictions.jsonl.part")
    killed(["predict", *options, named])
    assert count(part) == 20
    with part.open("ab") as file:
        file.write(b'{"row": 999, "inp')  # a line that broke off
    killed(["predict", *options, named])
    done = count(part)
    assert done == 40
    asked.clear()
    assert main(["predict", *options, named]) == 0
    assert asked == list(range(done - done % 2, ROWS))
    assert path.read_bytes() == whole.read_bytes()
    assert list(path.parent.iterdir()) == [path]


def test_predictions_have_the_row_numbers_and_the_files_of_their_sources(tmp_path, options):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.csv"
    first.write_text('{"text": "a"}\n{"text": null}\nbroken\n{"text": "dog"}\n')
    second.write_text("text\ngood\n")
    path = tmp_path / "predictions.jsonl"
    more = ["--data.on_bad_row=skip", f"--data.predict={json.dumps([str(first), str(second)])}"]
    killed(["predict", *options, *more, f"--run.predictions={path}"], batch=1)
    assert count(path.with_name("predictions.jsonl.part")) == 2
    assert main(["predict", *options, *more, f"--run.predictions={path}"]) == 0
    records = read_rows(path)
    assert [(record["row"], record["file"]) for record in records] == [
        (0, str(first)),
        (3, str(first)),
        (0, str(second)),
    ]


def test_without_a_named_file_the_same_command_takes_over_that_of_the_killed_run(tmp_path, options, asked):
    runs = tmp_path / "runs" / "default"
    workers = "--data.num_workers=1"  # which outlives the run by some seconds, and holds its file open
    killed(["predict", *options, workers])
    (part,) = runs.glob("*/predictions.jsonl.part")
    done = count(part)
    assert done == 20
    assert main(["predict", *options]) == 0
    assert asked[0] == done - done % 2
    found = last_folder() / "predictions.jsonl"
    assert [json.loads(line)["row"] for line in found.read_text().splitlines()] == list(range(ROWS))
    assert sorted(path.name for path in runs.glob("*/predictions*")) == ["predictions.jsonl"]
    assert part.parent.is_dir()
    assert main(["predict", *options]) == 0  # the next run is another
    assert len(asked) > ROWS


@pytest.fixture
def unfinished(tmp_path, options, monkeypatch):
    """A function from options, batches and lines to a command and the file that it left unfinished."""

    def unfinished(*more, batches=4, lines=7):
        path = tmp_path / "predictions.jsonl"
        given = ["predict", *options, *more, f"--run.predictions={path}"]
        step = SoftPromptModule.predict_step

        def breaks(module, batch, batch_idx):
            if batch_idx == batches:
                raise ValueError("enough")
            return step(module, batch, batch_idx)

        with monkeypatch.context() as patched:
            patched.setattr(SoftPromptModule, "predict_step", breaks)
            assert main(given) == 2
        part = tmp_path / "predictions.jsonl.part"
        written = part.read_bytes().splitlines(keepends=True)
        assert len(written) > lines
        part.write_bytes(b"".join(written[:lines]))  # as if it broke off within a batch
        return given, path, part

    return unfinished


@pytest.fixture
def half(unfinished):
    """A command, its file, and seven rows in what it left unfinished: three batches and a half."""
    return unfinished()


OTHERS = {
    "template": (["--data.template={soft}{text} it was{target}"], "data.template was '{soft}{text} it is{target}'"),
    "prompt": (["--seed_everything=7"], "prompt was"),
    "backbone": (["--backbone.dtype=bfloat16"], "backbone.dtype was 'float32' and is 'bfloat16'"),
    "batches": (["--data.eval_batch_size=3"], "data.eval_batch_size was None and is 3"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_another_run_left_is_kept_and_told_of(half, asked, caplog, other):
    given, path, part = half
    before = part.read_bytes()
    changed, told = OTHERS[other]
    assert main([*given, *changed]) == 0
    assert sorted(set(asked)) == list(range(ROWS))
    assert count(path) == ROWS
    assert part.with_name("predictions.jsonl.part.1").read_bytes() == before
    (said,) = [record.getMessage() for record in caplog.records if "starts from the beginning" in record.getMessage()]
    assert told in said
    assert "predictions.jsonl.part.1" in said
    part.with_name("predictions.jsonl.part.1").rename(part)  # whoever wants it back renames it
    part.with_name("predictions.jsonl.part.1.json").rename(f"{part}.json")
    asked.clear()
    assert main(given) == 0
    assert asked[0] == 6
    assert count(path) == ROWS


def test_several_processes_begin_anew_and_write_all_rows(half):
    given, path, part = half
    before = part.read_bytes()
    assert main([*given, "--trainer.strategy=ddp_fork", "--trainer.devices=2"]) == 0
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == list(range(ROWS))
    assert part.with_name("predictions.jsonl.part.1").read_bytes() == before
    assert not part.exists()


def test_other_rows_begin_anew(half, tmp_path, asked, caplog):
    given, _, _ = half
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text().replace("good", "sad", 1))
    assert main(given) == 0
    assert asked[0] == 0
    assert any("rows was" in record.getMessage() for record in caplog.records)


def test_what_changes_no_answer_goes_on(half, asked, tmp_path):
    given, path, _ = half
    (tmp_path / "rows.jsonl").rename(tmp_path / "moved.jsonl")
    moved = f"--data.predict={tmp_path / 'moved.jsonl'}"
    assert main([*given, moved, "--data.num_workers=1", "--data.cache=false"]) == 0
    assert asked[0] == 6
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == list(range(ROWS))


def test_all_rows_but_not_the_name(half, asked):
    given, path, part = half
    label = part.with_name(f"{part.name}.json")
    saved = label.read_bytes()
    assert main(given) == 0
    whole = path.read_bytes()
    path.rename(part)
    label.write_bytes(saved)
    asked.clear()
    assert main(given) == 0
    assert asked == []
    assert path.read_bytes() == whole


def test_a_limit_counts_the_batches_that_are_done(half, asked):
    given, path, _ = half
    assert main([*given, "--trainer.limit_predict_batches=6"]) == 0
    assert asked == [6, 7, 8, 9, 10, 11]
    assert count(path) == 12


def test_batches_by_tokens_go_on_with_the_one_that_broke_off(unfinished, options, tmp_path, asked):
    whole, by_tokens = tmp_path / "whole.jsonl", "--data.batch_tokens=100"
    assert main(["predict", *options, by_tokens, f"--run.predictions={whole}"]) == 0
    given, path, _ = unfinished(by_tokens, batches=6, lines=20)
    asked.clear()
    assert main(given) == 0
    assert 20 - 15 < asked[0] <= 20
    assert asked == list(range(asked[0], ROWS))
    assert path.read_bytes() == whole.read_bytes()


def test_a_full_disk_names_the_file_and_the_row_and_the_same_command_goes_on(tmp_path, options, command, asked):
    whole, path = tmp_path / "whole.jsonl", tmp_path / "predictions.jsonl"
    assert main(["predict", *options, f"--run.predictions={whole}"]) == 0
    given = [*command, f"--run.predictions={path}"]
    most = 10_000  # bytes of any file
    limited = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))  # noqa: E731
    ran = subprocess.run(given, capture_output=True, text=True, preexec_fn=limited, check=False, timeout=120)
    part = tmp_path / "predictions.jsonl.part"
    assert ran.returncode == 2
    assert part.stat().st_size == most
    done = count(part)
    error = ran.stderr.splitlines()[-2]
    assert error == (
        f"error: {part} cannot be written (File too large): it has rows 0 to {done - 1}. Solve this problem, then "
        "run the same command again to continue from there"
    )
    asked.clear()
    assert main(["predict", *options, f"--run.predictions={path}"]) == 0
    assert asked[0] == done - done % 2
    assert path.read_bytes() == whole.read_bytes()


def piped(command):
    return [word for word in command if not word.startswith("--data.predict")] + ["--data.predict=-"]


def test_standard_output_has_the_lines_and_nothing_else(command, tmp_path):
    text = b"the movie was great\n\nthat dog is one dog\n"
    ran = subprocess.run(piped(command), input=text, capture_output=True, check=False, timeout=120)
    assert ran.returncode == 0, ran.stderr.decode()
    records = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [record["input"] for record in records] == ["the movie was great it is", "that dog is one dog it is"]
    assert list(tmp_path.rglob("predictions*")) == []


def test_a_reader_that_leaves_ends_the_run_quietly(command):
    process = subprocess.Popen(
        piped(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ
    )
    process.stdin.write(b"a warm film\n" * 5000)
    process.stdin.close()
    assert json.loads(process.stdout.readline())["row"] == 0
    process.stdout.close()
    said = process.stderr.read().decode()
    assert process.wait(timeout=60) == 0, said
    assert "Traceback" not in said
    assert "error" not in said.lower()
    process.stderr.close()


def test_standard_output_on_a_full_disk_is_a_clear_error(command):
    with open("/dev/full", "w") as full:
        ran = subprocess.run(piped(command), input=b"dull\n", stdout=full, stderr=subprocess.PIPE, check=False)
    assert ran.returncode == 2
    said = ran.stderr.decode().splitlines()
    assert "error: standard output cannot be written: No space left on device" in said
    assert not any("Exception ignored" in line for line in said)


def test_a_terminated_prediction_stops_at_once_and_the_same_command_continues_it(options, tmp_path, monkeypatch):
    file, step = tmp_path / "rows.out", SoftPromptModule.predict_step

    def terminated(module, batch, batch_idx):
        if batch_idx == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(module, batch, batch_idx)

    monkeypatch.setattr(SoftPromptModule, "predict_step", terminated)
    with pytest.raises(SystemExit) as stopped:
        main(["predict", *options, f"--run.predictions={file}"])
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert not file.exists()
    monkeypatch.setattr(SoftPromptModule, "predict_step", step)
    assert main(["predict", *options, f"--run.predictions={file}"]) == 0
    assert len(file.read_text().splitlines()) == ROWS
