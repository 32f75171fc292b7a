"""Extra metrics of torchmetrics from the command line, and in the config of a checkpoint's run."""

import json

import pytest
import torch
import yaml
from row_files import read_rows, write_splits
from runs import read_column, read_metrics
from torchmetrics.classification import MulticlassCalibrationError
from torchmetrics.text import CharErrorRate

from lightning_softprompt.cli.app import main
from lightning_softprompt.cli.run_config import read_run_config
from lightning_softprompt.runs.run_spec import last_folder

NAME = "multiclass_calibration_error"
CLASS = "torchmetrics.classification.MulticlassCalibrationError"


@pytest.fixture
def folder(tmp_path, rows, tiny_folder):
    """The folder of a training that selects the best checkpoint by an extra metric."""
    data = write_splits(tmp_path / "data", train=rows * 2, validation=rows, test=rows[:5])
    metrics = [{"class_path": CLASS, "init_args": {"num_classes": 3}}]
    options = [
        "--model=PromptTuning",
        "--model.length=3",
        f"--backbone.name={tiny_folder('llama')}",
        "--data=ClassificationDataModule",
        f"--data.path={data}",
        "--data.template={soft}{text} it is{target}",
        '--data.labels={"negative": "bad", "neutral": "one", "positive": "good"}',
        f"--data.extra_metrics={json.dumps(metrics)}",
        "--trainer.accelerator=cpu",
        "--trainer.max_steps=2",
        "--trainer.val_check_interval=1",
        f"--run.folder={tmp_path / 'runs'}",
        f"--run.monitor={NAME}",
        "--run.wandb=disabled",
    ]
    assert main(["fit", *options]) == 0
    return last_folder()


def change_config(folder, class_path, **arguments):
    """Replaces the extra metric in the config of a run."""
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["data"]["init_args"]["extra_metrics"] = [{"class_path": class_path, "init_args": arguments}]
    path.write_text(yaml.safe_dump(config))
    return path


def test_a_checkpoint_is_selected_and_tested_by_an_extra_metric(folder, caplog):
    best = read_metrics(folder)["best"]
    values = [float(value) for value in read_column(folder, f"val/{NAME}")]
    assert best["metric"] == f"val/{NAME}"
    assert best["value"] == pytest.approx(min(values))
    assert len(set(values)) == 2
    assert main(["test", f"--ckpt_path={folder / 'checkpoints' / 'best.ckpt'}"]) == 0
    assert f"{NAME}  " in caplog.text
    records = read_rows(last_folder() / "test_predictions.jsonl")
    names = list(records[0]["scores"])
    probabilities = torch.tensor([[record["scores"][name] for name in names] for record in records])
    labels = torch.tensor([names.index(record["target"]) for record in records])
    expected = float(MulticlassCalibrationError(3)(probabilities, labels))
    assert read_metrics(last_folder())["test"][f"test/{NAME}"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("class_path", "arguments", "message"),
    [
        ("os.system", {"command": "true"}, "os.system', which is not a plug-in"),
        ("torchmetrics.text.BERTScore", {"model_name_or_path": "other"}, "torchmetrics.text.BERTScore"),
        (CLASS, {"num_classes": 10**6}, "num_classes: expected at most 1000"),
        (CLASS, {"num_classes": 3, "dist_sync_fn": "os.system"}, "dist_sync_fn: expected None"),
    ],
)
def test_the_config_of_a_run_names_only_registered_metrics(folder, class_path, arguments, message):
    path = change_config(folder, class_path, **arguments)
    with pytest.raises(ValueError, match=message):
        read_run_config(path)


def test_a_test_of_generated_text_has_the_text_metrics_of_the_training(tmp_path, tiny_folder):
    rows = [{"document": f"a {word} film of a dog", "summary": f"a {word} dog"} for word in ("good", "bad")] * 2
    data = write_splits(tmp_path / "data", train=rows, validation=rows, test=rows)
    options = [
        "--model=PromptTuning", "--model.length=2", f"--backbone.name={tiny_folder('llama')}",
        "--data=SummarizationDataModule", f"--data.path={data}", "--data.max_target_tokens=4", "--run.wandb=disabled",
        "--data.extra_metrics=[torchmetrics.text.CharErrorRate]", "--run.monitor=char_error_rate",
        "--trainer.accelerator=cpu", "--trainer.max_steps=1", f"--run.folder={tmp_path / 'runs'}",
    ]  # fmt: skip
    assert main(["fit", *options]) == 0
    assert read_metrics(last_folder())["best"]["metric"] == "val/char_error_rate"
    assert main(["test", f"--ckpt_path={last_folder() / 'checkpoints' / 'best.ckpt'}"]) == 0
    records = read_rows(last_folder() / "test_predictions.jsonl")
    pairs = [record["prediction"] for record in records], [record["target"] for record in records]
    assert read_metrics(last_folder())["test"]["test/char_error_rate"] == pytest.approx(float(CharErrorRate()(*pairs)))


MODULE = """
from lightning_softprompt import Evaluation
from torchmetrics import MeanMetric


class MeanRank(Evaluation):
    monitor = ("mean_rank", "min")
    logged = ("mean_rank",)

    def __init__(self):
        super().__init__()
        self.rank = MeanMetric()

    def predict(self, lm, batch):
        return [{} for _ in range(len(batch))]

    def update(self, lm, batch):
        scores = lm.scores(batch)
        self.rank.update((scores > scores.gather(1, batch.labels[:, None])).sum(-1) + 1)
        return self.predict(lm, batch)

    def compute(self):
        return {"mean_rank": self.rank.compute()}

    def reset(self):
        self.rank.reset()
"""


def test_an_evaluation_of_the_user_selects_a_checkpoint_and_is_tested(tmp_path, monkeypatch, rows, tiny_folder, capsys):
    (tmp_path / "mean_rank_of_user.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    data = write_splits(tmp_path / "data", train=rows * 2, validation=rows, test=rows[:5])
    options = [
        "--model=PromptTuning", "--model.length=3", f"--backbone.name={tiny_folder('llama')}",
        "--data=ClassificationDataModule", f"--data.path={data}", "--data.template={soft}{text} it is{target}",
        '--data.labels={"negative": "bad", "neutral": "one", "positive": "good"}',
        "--data.extra_metrics=mean_rank_of_user.MeanRank", "--run.monitor=mean_rank", "--run.wandb=disabled",
        "--trainer.accelerator=cpu", "--trainer.max_steps=2", "--trainer.val_check_interval=1",
        f"--run.folder={tmp_path / 'runs'}",
    ]  # fmt: skip
    assert main(["fit", *options]) == 0
    best, checkpoint = read_metrics(last_folder())["best"], last_folder() / "checkpoints" / "best.ckpt"
    values = [float(value) for value in read_column(last_folder(), "val/mean_rank")]
    assert (best["metric"], best["value"]) == ("val/mean_rank", pytest.approx(min(values)))
    assert main(["test", f"--ckpt_path={checkpoint}"]) != 0
    error = capsys.readouterr().err
    assert "extra_metrics: it names 'mean_rank_of_user.MeanRank'" in error
    assert "--trust mean_rank_of_user" in error
    assert main(["test", f"--ckpt_path={checkpoint}", "--trust=mean_rank_of_user"]) == 0
    records = read_rows(last_folder() / "test_predictions.jsonl")
    ranks = []
    for record in records:
        scores = record["scores"]
        ranks.append(1 + sum(score > scores[record["target"]] for score in scores.values()))
    assert read_metrics(last_folder())["test"]["test/mean_rank"] == pytest.approx(sum(ranks) / len(ranks))
