"""Files that version 0.1.0 wrote, before modules moved, load and give the results that it gave.

`moved/` holds a config, a prompt and three checkpoints, trained for three steps on the backbone of `save_exact`, and
`expected.json` with what that version then predicted from them.
"""

import importlib
import json
import shutil
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from transformers.utils.logging import disable_progress_bar

import lightning_softprompt as sp
from lightning_softprompt.cli.app import main
from lightning_softprompt.cli.commands import fold
from lightning_softprompt.moved import MOVED, _warn, current_names, current_path
from lightning_softprompt.runs.run_spec import last_folder

FILES = Path(__file__).with_name("moved")
EXPECTED = json.loads((FILES / "expected.json").read_text())
PACKAGE = "lightning_softprompt"
ROWS = {
    "a warm and funny film": "positive",
    "dull": "negative",
    "it is a sad story about a dog that never ends well": "negative",
    "this film , good ?": "neutral",
}
LABELS = {"negative": "bad", "neutral": "one", "positive": "good"}
TEMPLATE = "{soft}{text} it is{target}"


def save_exact(folder):
    """Writes a Llama whose weights follow a formula, so that they and their fingerprint are equal on every machine."""
    disable_progress_bar()
    model = tiny.model("llama")
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            steps = torch.arange(parameter.numel(), dtype=torch.int64) * 7919 + 104729 * number
            values = (steps % 1009 - 504).to(torch.float32) / 1009
            parameter.copy_(values.reshape(parameter.shape) + (1.0 if parameter.dim() == 1 else 0.0))
    model.save_pretrained(folder)
    tiny.tokenizer("llama").save_pretrained(folder)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder like the one in which version 0.1.0 ran the commands, with the same names."""
    monkeypatch.chdir(tmp_path)
    save_exact(tmp_path / "backbone")
    (tmp_path / "data").mkdir()
    lines = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in ROWS.items())
    for split in ("train", "validation", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text(lines)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ROWS))
    for path in FILES.iterdir():
        shutil.copy(path, tmp_path)
    return tmp_path


def run(command, *options):
    common = ["--backbone.name=backbone", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    assert main([command, *options, *common, "--run.folder=runs"]) == 0
    return last_folder()


def read_predictions(folder):
    return [json.loads(line) for line in next(folder.glob("predictions*.jsonl")).read_text().splitlines()]


def predictions(*options):
    data = [
        "--data=ClassificationDataModule", f"--data.template={TEMPLATE}", f"--data.labels={json.dumps(LABELS)}",
        "--data.batch_size=2", "--data.predict=rows.jsonl",
    ]  # fmt: skip
    return read_predictions(run("predict", *options, *data))


def assert_same(rows, expected):
    assert len(rows) == len(expected)
    for row, right in zip(rows, expected, strict=True):
        assert row.keys() == right.keys()
        for name, value in right.items():  # scores are written with six decimals
            assert row[name] == (pytest.approx(value, abs=2e-6) if name == "scores" else value)


def test_checkpoint_of_keys_and_values_with_a_class_head(folder):
    method = ["--model=PTuningV2", "--model.length=2", "--model.init=NormalKeysValues", "--model.init.std=0.5"]
    rows = predictions(*method, "--model.readout=ClassHead", "--ckpt_path=p_tuning_v2.ckpt")
    assert_same(rows, EXPECTED["p_tuning_v2"])


def test_checkpoint_of_replicas(folder):
    options = ["--model=PromptTuning", "--model.length=2", "--replicas=2", "--ckpt_path=replicas.ckpt"]
    rows = predictions(*options, "--model.penalties=[{class_path: UniformNorm}]")
    assert_same(rows, EXPECTED["replicas"])


def test_prompt_and_config(folder, caplog):
    options = ["--config=xprompt.yaml", "--init_from=xprompt.safetensors", "--data.predict=rows.jsonl"]
    written = run("predict", *options)
    assert_same(read_predictions(written), EXPECTED["xprompt"])
    warnings = [record.message for record in caplog.records if "is now" in record.message]
    assert any("callbacks.pruning.Pruning is now lightning_softprompt.callbacks.algorithms" in one for one in warnings)
    assert len(warnings) == len(set(warnings))


def test_a_prompt_can_be_folded_and_its_checkpoint_loaded_in_python(folder):
    assert fold.main(["xprompt.safetensors", "--out", "folded.safetensors"]) == 0
    names = dict.fromkeys(("xprompt.safetensors", "folded.safetensors", "p_tuning_v2.ckpt"))
    for name in names:
        rows = sp.load_prompt(name).predict([{"text": text} for text in ROWS])
        names[name] = [row["prediction"] for row in rows]
    assert names["xprompt.safetensors"] == names["folded.safetensors"]
    assert names["p_tuning_v2.ckpt"] == [row["prediction"] for row in EXPECTED["p_tuning_v2"]]


def test_checkpoint_of_several_tasks(folder):
    task = {
        "class_path": "ClassificationDataModule",
        "init_args": {"path": "data", "batch_size": 2, "cache": False, "template": TEMPLATE, "labels": LABELS},
    }
    for name in ("one", "two"):
        (folder / f"{name}.yaml").write_text(json.dumps(task))
    written = run(
        "validate", "--model=MPT", "--model.length=2", "--model.start=NormalFactors", "--data=MultitaskDataModule",
        '--data.tasks={"one": "one.yaml", "two": "two.yaml"}', "--data.sampling=Uniform", "--ckpt_path=mpt.ckpt",
    )  # fmt: skip
    metrics = json.loads((written / "metrics.json").read_text())["val"]
    assert {name: metrics[name] for name in EXPECTED["mpt"]} == pytest.approx(EXPECTED["mpt"], rel=1e-5)


def test_old_module_names_import_the_new_modules():
    modules = {old: new for old, new in MOVED.items() if old.islower()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for old, new in modules.items():
            assert importlib.import_module(f"{PACKAGE}.{old}") is importlib.import_module(f"{PACKAGE}.{new}")


def test_old_short_names_of_classes(folder, caplog):
    _warn.cache_clear()
    options = ["--model=Bare", "--model.readout=Suited"]
    assert predictions(*options) == predictions("--model=NoPrompt", "--model.readout=AutoReadout")
    warnings = [record.message for record in caplog.records if "is now" in record.message]
    assert [warning.partition(";")[0] for warning in warnings] == ["Bare is now NoPrompt", "Suited is now AutoReadout"]


def test_module_and_class_names_are_both_replaced():
    assert current_path(f"{PACKAGE}.readouts.suited.Suited") == f"{PACKAGE}.readouts.auto.AutoReadout"
    assert current_path(f"{PACKAGE}.methods.bare.Bare") == f"{PACKAGE}.methods.baselines.no_prompt.NoPrompt"
    with pytest.warns(FutureWarning, match=r"methods\.Bare is now"):
        old = importlib.import_module(f"{PACKAGE}.methods.Bare")
    assert old is importlib.import_module(f"{PACKAGE}.methods").NoPrompt


def test_moved_classes_exist():
    classes = {old: new for old, new in MOVED.items() if not old.islower()}
    for new in classes.values():
        module, _, name = new.rpartition(".")
        assert isinstance(getattr(importlib.import_module(f"{PACKAGE}.{module}"), name), type)


def test_only_names_of_this_package_are_translated():
    value = {"a": ["strategy.ShardedStrategy", 1, None], "b": "lightning_softprompt.strategyx"}
    assert current_names(value) == value
    assert current_path("lightning_softprompt.strategy.A") == "lightning_softprompt.distributed.strategy.A"
