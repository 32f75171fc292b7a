"""Predictions survive a killed run, a full disk and a reader that closes its pipe."""

import json
import os
import resource
import signal
import subprocess
import sys
from functools import partial

import pytest
import tiny
from row_files import read_rows, write_rows

from lightning_softprompt.cli.app import main
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.runs.run_spec import last_folder

ROWS = 301  # the last batch is not full


@pytest.fixture
def options(tmp_path, tiny_folder):
    """Options of a command on rows of several lengths; the prompt is the initial one of the seed."""
    texts = [" ".join(tiny.WORDS[: 1 + i % 20]) for i in range(ROWS)]
    path = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
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
    """Returns the words that start a prediction in a separate process, on one thread as in the tests."""
    code = (
        "import sys, torch; torch.set_num_threads(1); from lightning_softprompt.__main__ import main; sys.exit(main())"
    )
    return [sys.executable, "-c", code, "predict", *options]


@pytest.fixture
def predicted_rows(monkeypatch):
    """A list that receives the indices of the rows that the model predicts."""
    rows, step = [], SoftPromptModule.predict_step

    def record(module, batch, batch_idx):
        rows.extend(batch.row_ids)
        return step(module, batch, batch_idx)

    monkeypatch.setattr(SoftPromptModule, "predict_step", record)
    return rows


def run_and_kill(argv, batch=10):
    """Runs a command in a fork of this process, which is killed before it predicts a batch."""
    strike = {"class_path": "signals.SignalAt", "init_args": {"batch": batch, "name": "SIGKILL"}}
    if not (process := os.fork()):
        try:
            main([*argv, f"--trainer.callbacks={json.dumps([strike])}"])
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


def count_lines(path):
    return path.read_bytes().count(b"\n")


def row_numbers(path):
    return [record["row"] for record in read_rows(path)]


def test_a_killed_run_resumes_and_writes_the_file_of_an_uninterrupted_one(tmp_path, options, predicted_rows):
    whole, path = tmp_path / "whole.jsonl", tmp_path / "out" / "predictions.jsonl"
    assert main(["predict", *options, f"--run.predictions={whole}"]) == 0
    assert count_lines(whole) == ROWS
    output, part = f"--run.predictions={path}", path.with_name("predictions.jsonl.part")
    run_and_kill(["predict", *options, output])
    assert count_lines(part) == 20
    with part.open("ab") as file:
        file.write(b'{"row": 999, "inp')  # an incomplete line
    run_and_kill(["predict", *options, output])
    done = count_lines(part)
    assert done == 40
    predicted_rows.clear()
    assert main(["predict", *options, output]) == 0
    assert predicted_rows == list(range(done - done % 2, ROWS))
    assert path.read_bytes() == whole.read_bytes()
    assert list(path.parent.iterdir()) == [path]


def test_predictions_have_the_row_numbers_and_the_files_of_their_sources(tmp_path, options):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.csv"
    first.write_text('{"text": "a"}\n{"text": null}\nbroken\n{"text": "dog"}\n')
    second.write_text("text\ngood\n")
    path = tmp_path / "predictions.jsonl"
    more = ["--data.on_bad_row=skip", f"--data.predict={json.dumps([str(first), str(second)])}"]
    run_and_kill(["predict", *options, *more, f"--run.predictions={path}"], batch=1)
    assert count_lines(path.with_name("predictions.jsonl.part")) == 2
    assert main(["predict", *options, *more, f"--run.predictions={path}"]) == 0
    records = read_rows(path)
    expected = [(0, str(first)), (3, str(first)), (0, str(second))]
    assert [(record["row"], record["file"]) for record in records] == expected


def test_without_a_named_file_the_same_command_resumes_the_file_of_the_killed_run(tmp_path, options, predicted_rows):
    runs = tmp_path / "runs" / "default"
    workers = "--data.num_workers=1"  # for some seconds after the run, the worker still has its file open
    run_and_kill(["predict", *options, workers])
    (part,) = runs.glob("*/predictions.jsonl.part")
    done = count_lines(part)
    assert done == 20
    assert main(["predict", *options]) == 0
    assert predicted_rows[0] == done - done % 2
    assert row_numbers(last_folder() / "predictions.jsonl") == list(range(ROWS))
    assert sorted(path.name for path in runs.glob("*/predictions*")) == ["predictions.jsonl"]
    assert part.parent.is_dir()
    assert main(["predict", *options]) == 0  # the next run starts from the first row
    assert len(predicted_rows) > ROWS


@pytest.fixture
def interrupted_run(tmp_path, options, monkeypatch):
    """A function from options, batches and lines to a command, its file and its partial file."""

    def interrupted_run(*more, batches=4, lines=7):
        path = tmp_path / "predictions.jsonl"
        command = ["predict", *options, *more, f"--run.predictions={path}"]
        step = SoftPromptModule.predict_step

        def fail(module, batch, batch_idx):
            if batch_idx == batches:
                raise ValueError("enough")
            return step(module, batch, batch_idx)

        with monkeypatch.context() as patched:
            patched.setattr(SoftPromptModule, "predict_step", fail)
            assert main(command) == 2
        part = tmp_path / "predictions.jsonl.part"
        part_lines = part.read_bytes().splitlines(keepends=True)
        assert len(part_lines) > lines
        part.write_bytes(b"".join(part_lines[:lines]))  # as if the run stopped within a batch
        return command, path, part

    return interrupted_run


@pytest.fixture
def half(interrupted_run):
    """A command, its file, and its partial file with seven rows, which are three and a half batches."""
    return interrupted_run()


OTHERS = {
    "template": (["--data.template={soft}{text} it was{target}"], "data.template was '{soft}{text} it is{target}'"),
    "prompt": (["--seed_everything=7"], "prompt was"),
    "backbone": (["--backbone.dtype=bfloat16"], "backbone.dtype was 'float32' and is 'bfloat16'"),
    "batches": (["--data.eval_batch_size=3"], "data.eval_batch_size was None and is 3"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_the_unfinished_file_of_another_run_is_renamed_and_reported(half, predicted_rows, caplog, other):
    command, path, part = half
    before = part.read_bytes()
    changed, difference = OTHERS[other]
    assert main([*command, *changed]) == 0
    assert sorted(set(predicted_rows)) == list(range(ROWS))
    assert count_lines(path) == ROWS
    assert part.with_name("predictions.jsonl.part.1").read_bytes() == before
    messages = [record.getMessage() for record in caplog.records]
    (message,) = [message for message in messages if "starts from the beginning" in message]
    assert difference in message
    assert "predictions.jsonl.part.1" in message
    part.with_name("predictions.jsonl.part.1").rename(part)  # renaming it restores it
    part.with_name("predictions.jsonl.part.1.json").rename(f"{part}.json")
    predicted_rows.clear()
    assert main(command) == 0
    assert predicted_rows[0] == 6
    assert count_lines(path) == ROWS


def test_several_processes_start_again_and_write_all_rows(half):
    command, path, part = half
    before = part.read_bytes()
    assert main([*command, "--trainer.strategy=ddp_fork", "--trainer.devices=2"]) == 0
    assert row_numbers(path) == list(range(ROWS))
    assert part.with_name("predictions.jsonl.part.1").read_bytes() == before
    assert not part.exists()


def test_other_rows_start_again(half, tmp_path, predicted_rows, caplog):
    command, _, _ = half
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text().replace("good", "sad", 1))
    assert main(command) == 0
    assert predicted_rows[0] == 0
    assert any("rows was" in record.getMessage() for record in caplog.records)


def test_options_that_change_no_prediction_resume(half, predicted_rows, tmp_path):
    command, path, _ = half
    (tmp_path / "rows.jsonl").rename(tmp_path / "moved.jsonl")
    moved = f"--data.predict={tmp_path / 'moved.jsonl'}"
    assert main([*command, moved, "--data.num_workers=1", "--data.cache=false"]) == 0
    assert predicted_rows[0] == 6
    assert row_numbers(path) == list(range(ROWS))


def test_a_file_with_all_rows_only_gets_its_name(half, predicted_rows):
    command, path, part = half
    settings = part.with_name(f"{part.name}.json")
    saved = settings.read_bytes()
    assert main(command) == 0
    whole = path.read_bytes()
    path.rename(part)
    settings.write_bytes(saved)
    predicted_rows.clear()
    assert main(command) == 0
    assert predicted_rows == []
    assert path.read_bytes() == whole


def test_a_limit_counts_the_batches_that_are_done(half, predicted_rows):
    command, path, _ = half
    assert main([*command, "--trainer.limit_predict_batches=6"]) == 0
    assert predicted_rows == [6, 7, 8, 9, 10, 11]
    assert count_lines(path) == 12


def test_batches_by_tokens_resume_with_the_incomplete_one(interrupted_run, options, tmp_path, predicted_rows):
    whole, by_tokens = tmp_path / "whole.jsonl", "--data.batch_tokens=100"
    assert main(["predict", *options, by_tokens, f"--run.predictions={whole}"]) == 0
    command, path, _ = interrupted_run(by_tokens, batches=6, lines=20)
    predicted_rows.clear()
    assert main(command) == 0
    assert 20 - 15 < predicted_rows[0] <= 20
    assert predicted_rows == list(range(predicted_rows[0], ROWS))
    assert path.read_bytes() == whole.read_bytes()


def test_a_full_disk_names_the_file_and_the_row_and_the_same_command_resumes(
    tmp_path, options, command, predicted_rows
):
    whole, path = tmp_path / "whole.jsonl", tmp_path / "predictions.jsonl"
    assert main(["predict", *options, f"--run.predictions={whole}"]) == 0
    command = [*command, f"--run.predictions={path}"]
    limit = 10_000  # bytes of any file
    set_limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=set_limit, check=False, timeout=120)
    part = tmp_path / "predictions.jsonl.part"
    assert result.returncode == 2
    assert part.stat().st_size == limit
    done = count_lines(part)
    error = result.stderr.splitlines()[-2]
    assert error == (
        f"error: {part} cannot be written (File too large): it has rows 0 to {done - 1}. Solve this problem, then "
        "run the same command again to continue from there"
    )
    predicted_rows.clear()
    assert main(["predict", *options, f"--run.predictions={path}"]) == 0
    assert predicted_rows[0] == done - done % 2
    assert path.read_bytes() == whole.read_bytes()


def read_from_stdin(command):
    return [word for word in command if not word.startswith("--data.predict")] + ["--data.predict=-"]


def test_standard_output_has_the_lines_and_nothing_else(command, tmp_path):
    text = b"the movie was great\n\nthat dog is one dog\n"
    result = subprocess.run(read_from_stdin(command), input=text, capture_output=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr.decode()
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [record["input"] for record in records] == ["the movie was great it is", "that dog is one dog it is"]
    assert list(tmp_path.rglob("predictions*")) == []


def test_a_reader_that_closes_the_pipe_ends_the_run_quietly(command):
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(read_from_stdin(command), **pipes, env=os.environ)
    process.stdin.write(b"a warm film\n" * 5000)
    process.stdin.close()
    assert json.loads(process.stdout.readline())["row"] == 0
    process.stdout.close()
    output = process.stderr.read().decode()
    assert process.wait(timeout=60) == 0, output
    assert "Traceback" not in output
    assert "error" not in output.lower()
    process.stderr.close()


def test_standard_output_on_a_full_disk_is_a_clear_error(command):
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            read_from_stdin(command), input=b"dull\n", stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert result.returncode == 2
    lines = result.stderr.decode().splitlines()
    assert "error: standard output cannot be written: No space left on device" in lines
    assert not any("Exception ignored" in line for line in lines)


def test_a_terminated_prediction_stops_at_once_and_the_same_command_continues_it(
    options, tmp_path, monkeypatch, caplog
):
    file, step = tmp_path / "rows.out", SoftPromptModule.predict_step

    def terminate(module, batch, batch_idx):
        if batch_idx == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(module, batch, batch_idx)

    monkeypatch.setattr(SoftPromptModule, "predict_step", terminate)
    with pytest.raises(SystemExit) as stopped:
        main(["predict", *options, f"--run.predictions={file}"])
    assert stopped.value.code == 143
    assert "Stopped by SIGTERM; the same command continues the predictions" in caplog.messages
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert not file.exists()
    monkeypatch.setattr(SoftPromptModule, "predict_step", step)
    assert main(["predict", *options, f"--run.predictions={file}"]) == 0
    assert len(file.read_text().splitlines()) == ROWS
