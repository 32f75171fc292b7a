import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_softprompt import __version__
from lightning_softprompt.cli.commands import LIGHT_COMMANDS, RUN_COMMANDS

ROOT = Path(__file__).parents[2]
TRAINING = {"torch", "lightning", "pytorch_lightning", "transformers", "torchmetrics", "jsonargparse"}
HEAVY = TRAINING | {"numpy", "scipy", "pandas", "matplotlib", "wandb", "datasets", "pyarrow", "optuna"}


def softprompt(*words, python=(), **environment):
    return subprocess.run(
        [sys.executable, *python, "-m", "lightning_softprompt", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=120,
        check=False,
    )


def imported_packages(stderr):
    """Returns the packages in the report of `python -X importtime`."""
    lines = [line for line in stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--help"],
        ["--version"],
        ["methods"],
        ["configs"],
        *([command, "--help"] for command in LIGHT_COMMANDS),
        ["trian"],
    ],
    ids=" ".join,
)
def test_light_commands_import_nothing_heavy(words):
    result = softprompt(*words, python=["-X", "importtime"])
    packages = imported_packages(result.stderr)
    assert "lightning_softprompt" in packages
    assert not packages & HEAVY
    assert result.returncode == (2 if words == ["trian"] else 0)


def test_a_list_of_runs_imports_nothing_heavy(tmp_path):
    config = {"model": {"class_path": "x.Method"}, "data": {"class_path": "x.Data"}, "backbone": {"name": "tiny"}}
    test = {"test/accuracy": 0.75, "test/accuracy_low": 0.5, "test/accuracy_high": 1.0}
    (tmp_path / "config.yaml").write_text(json.dumps(config))  # JSON is YAML, too
    (tmp_path / "metrics.json").write_text(json.dumps({"test": test}))
    result = softprompt("runs", str(tmp_path), python=["-X", "importtime"], COLUMNS="200")
    assert "accuracy 0.75 [0.5, 1]" in result.stdout
    assert not imported_packages(result.stderr) & HEAVY


def test_help_names_every_command_and_the_configs():
    text = softprompt("--help").stdout
    assert text == softprompt().stdout == softprompt("-h").stdout
    for word in [*RUN_COMMANDS, *LIGHT_COMMANDS]:
        assert f"  {word} " in text
    assert text.count("  softprompt ") == 3
    assert "configs" in text
    assert "\nTrain and evaluate:\n" in text
    assert "\nOther commands:\n" in text


def test_version():
    assert softprompt("--version").stdout == f"softprompt {__version__}\n"


@pytest.mark.parametrize(
    ("word", "suggestion"), [("fti", "fit"), ("method", "methods"), ("docter", "doctor"), ("zzz", "fit")]
)
def test_an_unknown_command_is_reported_in_two_lines_with_a_suggestion(word, suggestion):
    result = softprompt(word)
    assert result.returncode == 2
    assert result.stdout == ""
    first, second = result.stderr.splitlines()
    assert repr(word) in first
    assert suggestion in second


def test_a_wrong_option_of_a_light_command_causes_no_traceback():
    result = softprompt("configs", "--cpoy", "x")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def test_a_method_file_without_labels_is_a_clear_error(tmp_path):
    (tmp_path / "mine.py").write_text('class Mine(SoftPromptModule):\n    """Mine."""\n')
    result = softprompt("methods", "--folder", str(tmp_path))
    assert result.returncode == 2
    assert f"{tmp_path / 'mine.py'}: Mine lacks a line 'Paper: ...'" in result.stderr
    assert result.stderr.count("\n") == 1


def test_configs_are_copied_once(tmp_path):
    assert softprompt("configs", "--copy", str(tmp_path)).returncode == 0
    (tmp_path / "mine.yaml").write_text("mine")
    again = softprompt("configs", "--copy", str(tmp_path))
    shipped = [file for file in (ROOT / "configs").rglob("*") if file.is_file()]
    assert again.returncode == (2 if shipped else 0)
    assert (tmp_path / "mine.yaml").read_text() == "mine"


def test_doctor_prints_before_it_imports_torch():
    program = "import sys; from lightning_softprompt.cli.commands import doctor\nfor finding in doctor.findings():\n"
    program += "    print(finding.name, sorted({'torch', 'transformers', 'lightning'} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True, timeout=120
    )
    *others, devices = result.stdout.splitlines()
    assert all(line.endswith(" []") for line in others)
    assert devices == "devices ['torch']"


def test_doctor_prints_json():
    result = softprompt("doctor", "--json", HF_HUB_OFFLINE="1", WANDB_MODE="offline")
    report = json.loads(result.stdout)
    assert result.returncode == (0 if report["ok"] else 1)
    assert report["ok"] == (not report["missing"])
    assert {"python", "torch", "cache", "hub", "wandb key", "backbone", "devices"} <= set(report["found"])


def test_a_reader_that_closes_the_pipe_causes_no_traceback():
    command = f"{sys.executable} -u -m lightning_softprompt doctor | head -1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT, check=False, timeout=120)
    assert result.stdout.startswith("python")
    assert result.stderr == ""


def test_every_plug_in_is_known_by_its_short_name():
    package = ROOT / "lightning_softprompt"
    folders = ("readouts", "objectives", "callbacks", "prompts", "methods")
    files = [file for folder in folders for file in (package / folder).rglob("[!_]*.py")]
    files = [file for file in files if "\nclass " in file.read_text()]
    plug_ins = {".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files}
    code = (
        "import sys; from lightning_softprompt.cli.plugins import import_plugins; import_plugins(); print(*sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert plug_ins <= set(result.stdout.split())
