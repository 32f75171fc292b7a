import csv
import os
import pty
import re
import socket
import subprocess
import sys

import pytest
import wandb
from wandb_file import log_records, read_run

from lightning_softprompt.runs import loggers
from lightning_softprompt.runs.loggers import MetricsFile, WandbRun, make_loggers, no_credentials

KEY = "0" * 40


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    """A user without an account, and W&B as it is at the start of a process."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(loggers, "rank_zero_info", lines.append)
    return lines


def finished(logger, values=()):
    for step, metrics in values:
        logger.log_metrics(metrics, step=step)
    logger.experiment.finish()


def read_csv(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_file_goes_on_where_a_resumed_run_stopped(tmp_path, recwarn):
    for step, metrics in [(1, {"train/loss": 2.5}), (2, {"val/loss": 3.0})]:
        logger = MetricsFile(tmp_path)
        logger.log_metrics(metrics, step=step)
        logger.save()
    assert read_csv(tmp_path) == [
        {"step": "1", "train/loss": "2.5", "val/loss": ""},
        {"step": "2", "train/loss": "", "val/loss": "3.0"},
    ]
    assert [str(warning.message) for warning in recwarn if "deleted" in str(warning.message)] == []


def logged(folder, *steps, name="train/loss"):
    logger = MetricsFile(folder)
    for step in steps:
        logger.log_metrics({name: step / 7}, step=step)
        logger.save()
    return logger


def test_rows_that_come_again_and_one_that_broke_off_are_dropped(tmp_path):
    logged(tmp_path, 0, 1, 2, 3)
    whole = (tmp_path / "metrics.csv").read_bytes()
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("4,0.5")  # a run that was killed as it wrote
    MetricsFile(tmp_path).truncate(2)
    logged(tmp_path, 2, 3)
    assert (tmp_path / "metrics.csv").read_bytes() == whole
    MetricsFile(tmp_path).truncate(0)
    assert not (tmp_path / "metrics.csv").exists()
    MetricsFile(tmp_path).truncate(3)
    logged(tmp_path, 0, 1, 2, 3)
    assert (tmp_path / "metrics.csv").read_bytes() == whole


def test_half_a_row_is_not_gone_on_with(tmp_path):
    logged(tmp_path, 0, 1)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("2,0.2")
    logged(tmp_path, 5)
    assert [row["step"] for row in read_csv(tmp_path)] == ["0", "1", "5"]


def test_a_new_column_loses_no_row_even_where_the_disk_is_full(tmp_path, monkeypatch):
    logger = logged(tmp_path, 0, 1)
    before = (tmp_path / "metrics.csv").read_bytes()

    def full(path, content):
        raise OSError("no space left")

    logger.log_metrics({"val/loss": 1.0}, step=1)
    with monkeypatch.context() as patched:
        patched.setattr(loggers, "write_file", full)
        with pytest.raises(OSError, match="no space left"):
            logger.save()
    assert (tmp_path / "metrics.csv").read_bytes() == before


def test_a_training_goes_on_where_wandb_breaks(tmp_path, monkeypatch, caplog):
    """As when its own process is killed: `log` raises ConnectionResetError then, with wandb 0.31."""

    class Broken:
        def log(self, metrics):
            raise ConnectionResetError("Connection lost")

    csv_file, logger = make_loggers(tmp_path, "n", "p", "offline")
    monkeypatch.setattr(logger, "_start", Broken)
    monkeypatch.setattr(logger, "_define_metrics", lambda run: None)
    for step in range(3):
        for each in (csv_file, logger):
            each.log_metrics({"train/loss": 1.0}, step=step)
            each.save()
    assert len(read_csv(tmp_path)) == 3
    (said,) = [record.getMessage() for record in caplog.records]
    assert "Connection lost" in said
    assert "metrics.csv has all" in said


def test_offline_run_shows_best_values_over_the_global_step(tmp_path, said):
    _, logger = make_loggers(tmp_path, "fast run", "prompts", "offline", [("val/accuracy", "max"), ("val/loss", "min")])
    logger.log_hyperparams({"length": 20})
    rows = [(10, {"val/accuracy": 0.9, "val/loss": 0.5}), (20, {"val/accuracy": 0.6, "val/loss": 0.7})]
    finished(logger, rows)
    run = read_run(tmp_path)
    assert (run.name, run.project, run.config["length"]) == ("fast run", "prompts", 20)
    assert run.summary["val/accuracy"] == {"max": 0.9}
    assert run.summary["val/loss"] == {"min": 0.5}
    assert {run.metrics[name].step_metric for name in ("*", "val/accuracy", "val/loss")} == {"trainer/global_step"}
    assert [(row["trainer/global_step"], row["val/loss"]) for row in run.rows("val/loss")] == [(10, 0.5), (20, 0.7)]
    assert len(said) == 1
    assert said[0].endswith(f"wandb sync {run.folder}")


def test_reader_puts_together_a_record_longer_than_a_block(tmp_path, said):
    _, logger = make_loggers(tmp_path, "n", "p", "offline")
    text = "".join(map(str, range(20_000)))
    assert len(text) > 2 * 32 * 1024
    logger.log_hyperparams({"text": text})
    finished(logger)
    assert read_run(tmp_path).config["text"] == text


def test_reader_refuses_other_files():
    with pytest.raises(AssertionError, match="not a W&B file"):
        list(log_records(b"step,loss\n"))


def test_without_a_key_one_line_is_said_and_nothing_asked_even_on_a_terminal(tmp_path):
    script = (
        "import sys\nfrom pathlib import Path\nfrom lightning_softprompt.runs.loggers import make_loggers\n"
        "from lightning_softprompt.cli.errors import configure_output\nconfigure_output()\n"
        "csv, wandb = make_loggers(Path(sys.argv[1]), 'n', 'p')\nwandb.log_metrics({'val/loss': 1.0}, step=1)\n"
    )
    ours, theirs = pty.openpty()
    ends = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=120, check=True, **ends)
    os.close(theirs)
    lines = [line for line in os.read(ours, 100_000).decode().splitlines() if line.strip()]
    os.close(ours)
    assert len(lines) == 1, lines
    assert lines[0].endswith(f"wandb sync {read_run(tmp_path).folder}")
    assert read_run(tmp_path).summary["val/loss"] == {"min": 1.0}


def test_key_without_network_goes_on_offline(tmp_path, said, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setattr(loggers, "PATIENCE", 1.0)
    finished(make_loggers(tmp_path, "n", "p")[1], [(1, {"val/loss": 2.0})])
    assert read_run(tmp_path).summary["val/loss"] == {"min": 2.0}
    assert len(said) == 1
    assert re.search(r"offline \((.*not reachable|.*refused|.*deadline exceeded|.*[Tt]imed out).*\)", said[0])
    assert said[0].endswith(f"wandb sync {read_run(tmp_path).folder}")


def test_malformed_key_is_named_as_the_reason(tmp_path, said, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    finished(make_loggers(tmp_path, "n", "p")[1])
    assert len(said) == 1
    assert "40+ characters" in said[0]


def test_online_demands_a_key(tmp_path):
    with pytest.raises(ValueError, match=r"no API key is configured; run `wandb login`"):
        make_loggers(tmp_path, "n", "p", "online")
    assert list(tmp_path.iterdir()) == []


def test_an_offline_run_with_a_table_is_kept_where_the_home_folder_cannot_be_written(tmp_path, said, monkeypatch):
    (tmp_path / "home").write_text("no folder can be made in it")
    for variable in loggers.CACHES:
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)  # what the logger sets is taken back at the end
    logger = make_loggers(tmp_path / "run", "n", "p", "offline")[1]
    logger.log_table("rows", columns=["row"], data=[["a"]])
    finished(logger, [(1, {"val/loss": 2.0})])
    assert read_run(tmp_path / "run").summary["val/loss"] == {"min": 2.0}
    assert [*(tmp_path / "run").rglob("*.table.json")]


@pytest.mark.parametrize("source", ["environment", "netrc"])
def test_keys_are_found_without_network(tmp_path, monkeypatch, source):
    def refuse(*args):
        raise AssertionError("a key was looked up over the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert no_credentials() == "no API key is configured"
    if source == "environment":
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    else:
        (tmp_path / "netrc").write_text(f"machine wandb.example.org\n  login user\n  password {KEY}\n")
    assert no_credentials() is None


def test_disabled_leaves_the_file(tmp_path, monkeypatch):
    assert [type(logger) for logger in make_loggers(tmp_path, "n", "p", "disabled")] == [MetricsFile]
    assert [type(logger) for logger in make_loggers(tmp_path, "n", "p", "auto")] == [MetricsFile, WandbRun]
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert [type(logger) for logger in make_loggers(tmp_path, "n", "p", "auto")] == [MetricsFile]
    assert list(tmp_path.iterdir()) == []


def test_wandb_mode_is_heeded(tmp_path, said, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", "offline")
    finished(make_loggers(tmp_path, "n", "p")[1])
    assert read_run(tmp_path).name == "n"
    assert "as requested" in said[0]


def test_second_run_of_a_process_has_a_file_of_its_own(tmp_path, said):
    for name in ("first", "second"):
        make_loggers(tmp_path / name, name, "p", "offline")[1].log_metrics({"val/loss": 1.0}, step=1)
    wandb.finish()
    assert [read_run(tmp_path / name).name for name in ("first", "second")] == ["first", "second"]
    assert [len(read_run(tmp_path / name).rows("val/loss")) for name in ("first", "second")] == [1, 1]
