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
def isolated_user(monkeypatch, tmp_path):
    """Removes the W&B account of the user, and resets W&B to its state at the start of a process."""
    wandb.teardown()  # removes the variable of its process, which must not be restored
    variables = [name for name in os.environ if name.startswith("WANDB_")]
    for name in variables:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    yield
    wandb.teardown()


@pytest.fixture
def messages(monkeypatch):
    """The information lines that the loggers print."""
    lines = []
    monkeypatch.setattr(loggers, "rank_zero_info", lines.append)
    return lines


def log_and_finish(logger, values=()):
    for step, metrics in values:
        logger.log_metrics(metrics, step=step)
    logger.experiment.finish()


def read_csv(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_hyperparameters_are_only_in_the_config_of_a_run(tmp_path):
    logger = MetricsFile(tmp_path)
    logger.log_hyperparams({"length": 5})
    logger.log_metrics({"train/loss": 2.5}, step=1)
    logger.save()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_resumed_run_appends_to_its_metrics_file(tmp_path, recwarn):
    for step, metrics in [(1, {"train/loss": 2.5}), (2, {"val/loss": 3.0})]:
        logger = MetricsFile(tmp_path)
        logger.log_metrics(metrics, step=step)
        logger.save()
    assert read_csv(tmp_path) == [
        {"step": "1", "train/loss": "2.5", "val/loss": ""},
        {"step": "2", "train/loss": "", "val/loss": "3.0"},
    ]
    assert [str(warning.message) for warning in recwarn if "deleted" in str(warning.message)] == []


def write_metrics(folder, *steps, name="train/loss"):
    logger = MetricsFile(folder)
    for step in steps:
        logger.log_metrics({name: step / 7}, step=step)
        logger.save()
    return logger


def test_truncation_drops_later_rows_and_an_incomplete_row(tmp_path):
    write_metrics(tmp_path, 0, 1, 2, 3)
    complete = (tmp_path / "metrics.csv").read_bytes()
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("4,0.5")  # the run was killed while it wrote this row
    MetricsFile(tmp_path).truncate(2)
    write_metrics(tmp_path, 2, 3)
    assert (tmp_path / "metrics.csv").read_bytes() == complete
    MetricsFile(tmp_path).truncate(0)
    assert not (tmp_path / "metrics.csv").exists()
    MetricsFile(tmp_path).truncate(3)
    write_metrics(tmp_path, 0, 1, 2, 3)
    assert (tmp_path / "metrics.csv").read_bytes() == complete


def test_an_incomplete_row_is_removed_before_the_next_row(tmp_path):
    write_metrics(tmp_path, 0, 1)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("2,0.2")
    write_metrics(tmp_path, 5)
    assert [row["step"] for row in read_csv(tmp_path)] == ["0", "1", "5"]


def test_a_new_column_loses_no_row_if_the_disk_is_full(tmp_path, monkeypatch):
    logger = write_metrics(tmp_path, 0, 1)
    before = (tmp_path / "metrics.csv").read_bytes()

    def raise_disk_full(path, content):
        raise OSError("no space left")

    logger.log_metrics({"val/loss": 1.0}, step=1)
    with monkeypatch.context() as patched:
        patched.setattr(loggers, "write_file", raise_disk_full)
        with pytest.raises(OSError, match="no space left"):
            logger.save()
    assert (tmp_path / "metrics.csv").read_bytes() == before


def test_training_continues_after_wandb_fails(tmp_path, monkeypatch, caplog):
    """If the W&B process is killed, `log` raises ConnectionResetError (wandb 0.31)."""

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
    (message,) = [record.getMessage() for record in caplog.records]
    assert "Connection lost" in message
    assert "metrics.csv has all" in message


def test_an_offline_run_records_the_best_values_and_the_global_step(tmp_path, messages):
    _, logger = make_loggers(tmp_path, "fast run", "prompts", "offline", [("val/accuracy", "max"), ("val/loss", "min")])
    logger.log_hyperparams({"length": 20})
    rows = [(10, {"val/accuracy": 0.9, "val/loss": 0.5}), (20, {"val/accuracy": 0.6, "val/loss": 0.7})]
    log_and_finish(logger, rows)
    run = read_run(tmp_path)
    assert (run.name, run.project, run.config["length"]) == ("fast run", "prompts", 20)
    assert run.summary["val/accuracy"] == {"max": 0.9}
    assert run.summary["val/loss"] == {"min": 0.5}
    for name in ("*", "val/accuracy", "val/loss"):
        assert run.metrics[name].step_metric == "trainer/global_step"
    losses = [(row["trainer/global_step"], row["val/loss"]) for row in run.rows("val/loss")]
    assert losses == [(10, 0.5), (20, 0.7)]
    assert len(messages) == 1
    assert messages[0].endswith(f"wandb sync {run.folder}")


def test_the_reader_joins_a_record_longer_than_a_block(tmp_path, messages):
    _, logger = make_loggers(tmp_path, "n", "p", "offline")
    text = "".join(map(str, range(20_000)))
    assert len(text) > 2 * 32 * 1024
    logger.log_hyperparams({"text": text})
    log_and_finish(logger)
    assert read_run(tmp_path).config["text"] == text


def test_the_reader_rejects_other_files():
    with pytest.raises(AssertionError, match="not a W&B file"):
        list(log_records(b"step,loss\n"))


def test_without_a_key_a_terminal_shows_one_line_and_no_question(tmp_path):
    script = (
        "import sys\nfrom pathlib import Path\nfrom lightning_softprompt.runs.loggers import make_loggers\n"
        "from lightning_softprompt.cli.errors import configure_output\nconfigure_output()\n"
        "csv, wandb = make_loggers(Path(sys.argv[1]), 'n', 'p')\nwandb.log_metrics({'val/loss': 1.0}, step=1)\n"
    )
    parent_end, child_end = pty.openpty()
    streams = {"stdin": child_end, "stdout": child_end, "stderr": child_end}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=120, check=True, **streams)
    os.close(child_end)
    output = os.read(parent_end, 100_000).decode()
    lines = [line for line in output.splitlines() if line.strip()]
    os.close(parent_end)
    assert len(lines) == 1, lines
    assert lines[0].endswith(f"wandb sync {read_run(tmp_path).folder}")
    assert read_run(tmp_path).summary["val/loss"] == {"min": 1.0}


def test_a_run_with_a_key_but_no_network_is_recorded_offline(tmp_path, messages, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # no server listens on this port
    monkeypatch.setattr(loggers, "PATIENCE", 1.0)
    log_and_finish(make_loggers(tmp_path, "n", "p")[1], [(1, {"val/loss": 2.0})])
    assert read_run(tmp_path).summary["val/loss"] == {"min": 2.0}
    assert len(messages) == 1
    assert re.search(r"offline \((.*not reachable|.*refused|.*deadline exceeded|.*[Tt]imed out).*\)", messages[0])
    assert messages[0].endswith(f"wandb sync {read_run(tmp_path).folder}")


def test_the_message_names_a_malformed_key_as_the_reason(tmp_path, messages, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    log_and_finish(make_loggers(tmp_path, "n", "p")[1])
    assert len(messages) == 1
    assert "40+ characters" in messages[0]


def test_online_mode_requires_a_key(tmp_path):
    with pytest.raises(ValueError, match=r"no API key is configured; run `wandb login`"):
        make_loggers(tmp_path, "n", "p", "online")
    assert list(tmp_path.iterdir()) == []


def test_an_offline_run_logs_a_table_if_the_home_folder_is_not_writable(tmp_path, messages, monkeypatch):
    (tmp_path / "home").write_text("a file, so that no folder can be created in it")
    for variable in loggers.CACHES:
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)  # monkeypatch then removes what the logger sets
    logger = make_loggers(tmp_path / "run", "n", "p", "offline")[1]
    logger.log_table("rows", columns=["row"], data=[["a"]])
    log_and_finish(logger, [(1, {"val/loss": 2.0})])
    assert read_run(tmp_path / "run").summary["val/loss"] == {"min": 2.0}
    assert [*(tmp_path / "run").rglob("*.table.json")]


@pytest.mark.parametrize("source", ["environment", "netrc"])
def test_keys_are_found_without_network_access(tmp_path, monkeypatch, source):
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


def test_disabled_mode_writes_only_the_metrics_file(tmp_path, monkeypatch):
    assert [type(logger) for logger in make_loggers(tmp_path, "n", "p", "disabled")] == [MetricsFile]
    assert [type(logger) for logger in make_loggers(tmp_path, "n", "p", "auto")] == [MetricsFile, WandbRun]
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert [type(logger) for logger in make_loggers(tmp_path, "n", "p", "auto")] == [MetricsFile]
    assert list(tmp_path.iterdir()) == []


def test_the_variable_wandb_mode_is_respected(tmp_path, messages, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", "offline")
    log_and_finish(make_loggers(tmp_path, "n", "p")[1])
    assert read_run(tmp_path).name == "n"
    assert "as requested" in messages[0]


def test_a_second_run_in_the_process_writes_a_separate_file(tmp_path, messages):
    for name in ("first", "second"):
        _, logger = make_loggers(tmp_path / name, name, "p", "offline")
        logger.log_metrics({"val/loss": 1.0}, step=1)
    wandb.finish()
    for name in ("first", "second"):
        run = read_run(tmp_path / name)
        assert run.name == name
        assert len(run.rows("val/loss")) == 1
