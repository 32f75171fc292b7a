"""What online runs send to W&B, and what `wandb sync` uploads of offline runs, received by a local server."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import wandb
from row_files import write_splits
from wandb_file import read_run
from wandb_server import KEY, run_wandb_server

from lightning_softprompt.cli.app import main
from lightning_softprompt.runs import loggers
from lightning_softprompt.runs.run_spec import last_folder

pytestmark = pytest.mark.wandb
LABELS = {"negative": "bad", "neutral": "one", "positive": "good"}


@contextmanager
def connect(folder):
    """Run a local server and connect W&B to it."""
    with run_wandb_server() as server, pytest.MonkeyPatch.context() as patches:
        patches.delenv("WANDB_MODE", raising=False)
        patches.setenv("WANDB_BASE_URL", server.url)
        patches.setenv("WANDB_API_KEY", KEY)
        for variable in loggers.CACHES:
            patches.setenv(variable, str(folder / variable))
        yield server


@pytest.fixture
def server(tmp_path):
    """A local server to which W&B is connected."""
    with connect(tmp_path) as server:
        yield server


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The folder of the data and the runs."""
    root = tmp_path_factory.mktemp("online")
    labels = ("positive", "negative", "negative", "positive")
    rows = [{"text": text, "label": label} for text, label in zip(tiny.TEXTS, labels, strict=True)]
    write_splits(root / "moods", train=rows, validation=rows, test=rows)
    return root


@pytest.fixture(scope="module")
def run_command(root, tiny_folder):
    """Runs a command and returns its run folder."""
    training = [
        f"--backbone.name={tiny_folder('llama')}",
        "--model=PromptTuning",
        "--model.length=3",
        "--data=ClassificationDataModule",
        f"--data.path={root / 'moods'}",
        "--data.template={soft}{text} it is{target}",
        f"--data.labels={json.dumps(LABELS)}",
        "--data.batch_size=2",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.max_epochs=-1",
        "--trainer.max_steps=2",
        "--trainer.val_check_interval=1",
        "--trainer.log_every_n_steps=1",
        f"--run.folder={root / 'runs'}",
        "--run.experiment=words",
    ]

    def run_command(command, *options):
        assert main([command, *(training if command == "fit" else []), *options]) == 0
        wandb.teardown()  # `finish` returns before all is sent
        return last_folder()

    return run_command


def read_id(folder):
    return json.loads((folder / "run.json").read_text())["wandb_id"]


def read_best(folder):
    return json.loads((folder / "metrics.json").read_text())["best"]


@pytest.fixture(scope="module")
def online(root, run_command):
    """A training, a test of its prompt, another training from it and predictions with it, and what W&B received."""
    with connect(root) as server:
        trained = run_command("fit", "--run.wandb=online", "--run.notes=a note")
        best = trained / "checkpoints" / "best.ckpt"
        summary = server.summary(read_id(trained))
        run_command("test", f"--ckpt_path={best}")
        started = run_command("fit", "--run.wandb=online", f"--init_from={trained / 'prompt.safetensors'}")
        run_command("predict", f"--ckpt_path={best}", f"--data.predict={root / 'moods' / 'test.jsonl'}")
        yield SimpleNamespace(server=server, trained=trained, id=read_id(trained), started=started, summary=summary)


def test_an_online_training_sends_its_description_metrics_and_files(online):
    server, identity, folder = online.server, online.id, online.trained
    created = server.variables("UpsertBucket")[0]
    assert (created["name"], created["displayName"], created["groupName"]) == (identity, folder.name, "words")
    assert (created["project"], created["jobType"], created["notes"]) == ("lightning-softprompt", "fit", "a note")
    assert created["tags"][:2] == ["PromptTuning", "ClassificationDataModule"]
    config = server.config(identity)
    assert (config["method"], config["model"]["init_args"]["length"], config["rows_train"]) == ("PromptTuning", 3, 4)
    losses = [row for row in server.history(identity) if "val/loss" in row]
    assert [row["trainer/global_step"] for row in losses] == [0, 1]
    assert online.summary["best_value"] == read_best(folder)["value"]
    assert {f"/{identity}/{name}" for name in ("wandb-summary.json", "config.yaml", "output.log")} <= set(
        server.uploads
    )
    images = [path for path in server.uploads if path.startswith(f"/{identity}/media/images/plots/val_confusion")]
    assert images
    assert all(server.uploads[path].startswith(b"\x89PNG") for path in images)


def test_an_online_training_sends_its_prompt(online):
    created = [values["input"] for values in online.server.variables("CreateArtifact")]
    prompt, _ = [artifact for artifact in created if artifact["artifactTypeName"] == "soft-prompt"]
    assert prompt["artifactCollectionName"] == f"prompt-{online.id}"
    assert {alias["alias"] for alias in prompt["aliases"]} == {"best", "latest"}
    assert json.loads(prompt["metadata"])["value"] == read_best(online.trained)["value"]


def test_an_online_test_continues_the_run_of_the_training(online):
    server, identity = online.server, online.id
    history = server.history(identity)
    assert [row for row in history if "test/accuracy" in row]
    assert [row["_step"] for row in history] == list(range(len(history)))
    assert server.summary(identity).items() >= {"best_value": online.summary["best_value"]}.items()
    assert server.config(identity).items() >= {"rows_train": 4, "rows_test": 4}.items()


def test_online_runs_are_linked_to_the_prompt_that_they_start_from(online):
    server = online.server
    (predicted,) = {run["name"] for run in server.variables("UpsertBucket") if run["jobType"] == "predict"}
    uses = [(use["runName"], use["artifactID"]) for use in server.variables("UseArtifact")]
    assert uses == [(run, f"id of prompt-{online.id}:best") for run in (read_id(online.started), predicted)]
    assert server.config(read_id(online.started))["used_prompt"] == f"prompt-{online.id}:best"


def test_wandb_sync_joins_the_parts_of_an_offline_run(server, run_command):
    trained = run_command("fit", "--run.wandb=offline")
    tested = run_command("test", f"--ckpt_path={trained / 'checkpoints' / 'best.ckpt'}")
    again = run_command("validate", f"--ckpt_path={trained / 'checkpoints' / 'best.ckpt'}")
    folders = [read_run(folder).folder for folder in (trained, tested, again)]
    assert server.operations == []
    assert sync(folders[1], folders[0]) == 2
    assert sync(*folders) == 1  # the others have been uploaded
    identity = read_id(trained)
    assert set(server.streams) == {identity}
    history = server.history(identity)
    steps = [row["_step"] for row in history]
    assert steps == list(range(len(history)))
    assert [name for row in history for name in row if name in ("val/loss", "test/loss")] == [
        *["val/loss"] * 2, "test/loss", "val/loss",
    ]  # fmt: skip
    chunks = server.streams[identity]["wandb-history.jsonl"]
    assert chunks[-1][0] + len(chunks[-1][1]) == len(history)  # no part overwrites lines of another one
    summary = server.summary(identity)
    assert summary["best_value"] == read_best(trained)["value"]
    test_report = json.loads((tested / "metrics.json").read_text())
    assert summary["test/accuracy"] == test_report["test"]["test/accuracy"]
    config = server.config(identity)
    assert (config["model"]["init_args"]["length"], config["rows_train"], config["rows_test"]) == (3, 4, 4)


def sync(*folders: Path) -> int:
    """Upload offline runs with the command of W&B, and return their number."""
    command = [str(Path(sys.executable).parent / "wandb"), "sync", *map(str, folders)]
    result = subprocess.run(
        command, env=dict(os.environ), capture_output=True, text=True, timeout=120, cwd=folders[0], check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stderr.count("Finished syncing")


def test_a_training_continues_offline_if_the_server_refuses_its_run(server, run_command, monkeypatch, caplog):
    monkeypatch.setattr(loggers, "PATIENCE", 2.0)
    server.refuses = True
    folder = run_command("fit", "--run.wandb=online")
    run = read_run(folder)
    assert run.id == read_id(folder)
    assert (len(run.rows("val/loss")), run.is_complete) == (2, True)
    assert f"wandb sync {run.folder}" in caplog.text
