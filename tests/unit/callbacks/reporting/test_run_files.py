"""The callbacks of a run, with a tiny module and a real Trainer."""

import csv
import json
import os
import time
import warnings

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from wandb_file import read_run

from lightning_softprompt.callbacks.reporting import predictions
from lightning_softprompt.callbacks.reporting.prompt_watch import PromptWatch
from lightning_softprompt.callbacks.reporting.run_files import RunFiles, learning_curve
from lightning_softprompt.callbacks.reporting.throughput import Throughput
from lightning_softprompt.core.types import Batch, Classes
from lightning_softprompt.runs.loggers import make_loggers

ROWS = 10
SPLITS = {"train": 16, "validation": ROWS, "test": ROWS, "predict": ROWS}


class Rows(LightningDataModule):
    """Padded rows of row + 1 tokens; validation is in the order of the data, test and predict are not."""

    classes = Classes({"good": ["good"], "bad": ["bad"]})

    def __init__(self, order=(0, 1, 2, 3, 4, 5, 6, 7, 8, 9)):
        super().__init__()
        self.order = list(order)

    def loader(self, rows):
        return DataLoader(rows, batch_size=4, collate_fn=batch)

    def train_dataloader(self):
        return self.loader(range(SPLITS["train"]))

    def val_dataloader(self):
        return self.loader(range(ROWS))

    def test_dataloader(self):
        return self.loader(self.order)

    def predict_dataloader(self):
        return self.loader(self.order)

    def row_image(self, split, row):
        return None

    def describe_row(self, split, row):
        assert row < SPLITS[split]
        return {"input": f"{split} text {row}", "target": None}


def batch(rows):
    mask = torch.arange(max(rows) + 1) <= torch.tensor(rows)[:, None]
    zeros = torch.zeros(len(rows), 1)
    return Batch(mask.long(), mask, mask, zeros, zeros, row_ids=tuple(rows))


class Evaluation(nn.Module):
    def figures(self):
        figure = Figure(figsize=(2, 2))
        figure.subplots().imshow([[1, 0], [0, 1]])
        return {"confusion": figure}


class NumberedEvaluation(Evaluation):
    """Its figure shows the number of the validation."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def figures(self):
        self.number += 1
        figure = Figure(figsize=(2, 2))
        figure.text(0.5, 0.5, str(self.number))
        return {"confusion": figure}


class Tiny(LightningModule):
    """Pulls its prompt towards ones."""

    def __init__(self, lr=1e-3, groups=1, val_seconds=0.0):
        super().__init__()
        self.prompt = nn.Parameter(torch.arange(12.0).reshape(4, 3))
        self.scale = nn.Parameter(torch.ones(1))
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.evaluations = {"val": Evaluation(), "test": Evaluation()}
        self.lr, self.groups, self.val_seconds = lr, groups, val_seconds
        self.losses = []  # of each validation
        self.gradients = []  # norms after each backward pass

    def loss(self):
        return ((self.scale * self.prompt - 1) ** 2).mean()

    def training_step(self, batch, batch_idx):
        loss = self.loss()
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            self.log("train/loss", loss.detach(), batch_size=len(batch))
        return loss

    def on_after_backward(self):
        self.gradients.append(torch.cat([self.prompt.grad.flatten(), self.scale.grad]).norm().item())

    def records(self, batch, target):
        scores = [{"good": 2 / 3 + row, "bad": 1 / 3} for row in batch.row_ids]
        return [
            {"row": row, "prediction": "good", "target": target, "scores": scores[i] if row else None}
            for i, row in enumerate(batch.row_ids)
        ]

    def validation_step(self, batch, batch_idx):
        time.sleep(self.val_seconds)
        return self.records(batch, "bad")

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.records(batch, None)

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.losses.append(self.loss().item())
        self.log_dict({"val/loss": self.loss(), "val/accuracy": 1 / (1 + len(self.losses))})

    def on_test_epoch_end(self):
        self.log("test/loss", self.loss())

    def configure_optimizers(self):
        parameters = [self.prompt, self.scale] if self.groups == 1 else [self.prompt]
        groups = [{"params": parameters}]
        if self.groups == 2:
            groups.append({"params": [self.scale], "lr": 0.5, "name": "scale"})
        return torch.optim.SGD(groups, lr=self.lr)


def trainer(folder, callbacks=(), logger=False, **options):
    options = {"max_epochs": 2, "log_every_n_steps": 2, "enable_checkpointing": False} | options
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(default_root_dir=folder, callbacks=list(callbacks), logger=logger, **quiet, **options)


def read_csv(folder, key):
    with (folder / "metrics.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row.get(key)]


def read_json(folder):
    return json.loads((folder / "metrics.json").read_text())


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run: 2 epochs of 4 steps with clipping, then a test."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    seed_everything(0, verbose=False)
    module = Tiny(groups=2)
    loggers = make_loggers(folder, "n", "p", "offline", [("val/accuracy", "max"), ("val/loss", "min")])
    callbacks = [
        Throughput(),
        PromptWatch(),
        predictions.PredictionTable(rows=5),
        RunFiles(folder, "val/accuracy", "max"),
    ]
    run_trainer = trainer(folder, callbacks, loggers, gradient_clip_val=0.01)
    run_trainer.fit(module, Rows())
    run_trainer.test(module, Rows(), verbose=False)
    return folder, module, read_run(folder)


def test_the_csv_file_has_the_losses_of_the_module(run):
    folder, module, _ = run
    assert len(module.losses) == 2
    losses = [float(row["val/loss"]) for row in read_csv(folder, "val/loss")]
    assert losses == pytest.approx(module.losses, rel=1e-6)


def test_wandb_has_the_losses_of_the_module(run):
    _, module, file = run
    rows = file.rows("val/loss")
    assert [row["val/loss"] for row in rows] == pytest.approx(module.losses, rel=1e-6)
    assert file.summary["val/loss"]["min"] == pytest.approx(min(module.losses), rel=1e-6)
    assert file.summary["val/accuracy"] == {"max": 0.5}


def test_callbacks_log_in_the_row_of_the_loss_and_only_on_logging_steps(run):
    folder, _, _ = run
    rows = read_csv(folder, "train/loss")
    assert [int(row["step"]) for row in rows] == [1, 3, 5, 7]
    names = [
        "speed/tokens_per_s",
        "speed/step_ms",
        "speed/memory_mb",
        "prompt/norm",
        "prompt/grad_norm",
        "prompt/moved",
    ]
    for name in [*names, "lr/0", "lr/scale"]:
        assert read_csv(folder, name) == rows, name


def test_the_gradient_norm_is_measured_before_clipping(run):
    folder, module, _ = run
    logged = [float(row["prompt/grad_norm"]) for row in read_csv(folder, "prompt/grad_norm")]
    assert logged == pytest.approx(module.gradients[1::2], rel=1e-5)
    assert min(logged) > 0.01


def test_norm_and_distance_cover_all_trainable_parameters(run):
    folder, module, _ = run
    end = torch.cat([module.prompt.flatten(), module.scale]).detach()
    start = torch.tensor([*range(12), 1.0])
    last = read_csv(folder, "prompt/norm")[-1]
    assert float(last["prompt/norm"]) == pytest.approx(end.norm().item(), rel=1e-6)
    distance = (end - start).norm() / start.norm()
    assert float(last["prompt/moved"]) == pytest.approx(distance.item(), rel=1e-4)
    assert float(last["lr/0"]) == pytest.approx(1e-3)
    assert float(last["lr/scale"]) == pytest.approx(0.5)


def test_a_histogram_of_row_norms_of_each_parameter_is_logged_after_each_validation(run):
    _, module, file = run
    rows = file.rows("prompt/row_norms/prompt")
    validations = file.rows("val/loss")
    assert [row["trainer/global_step"] for row in rows] == [row["trainer/global_step"] for row in validations]
    last = rows[-1]["prompt/row_norms/prompt"]
    assert sum(last["values"]) == 4
    norms = module.prompt.norm(dim=-1).tolist()
    assert (last["bins"][0], last["bins"][-1]) == pytest.approx((min(norms), max(norms)), rel=1e-4)
    assert sum(rows[-1]["prompt/row_norms/scale"]["values"]) == 1
    assert not file.rows("prompt/row_norms")


def test_a_table_of_the_first_rows_is_logged_after_each_validation(run):
    _, _, file = run
    tables = file.tables("val/predictions")
    assert len(tables) == 2  # no table for the sanity check
    columns = ["step", "row", "input", "target", "prediction", "correct", "score/good", "score/bad"]
    assert tables[0]["columns"] == columns
    texts = [[row, f"validation text {row}", "bad", "good", False] for row in range(5)]
    scores = [[None, None], *([round(2 / 3 + row, 6), 0.333333] for row in range(1, 5))]  # row 0 has no scores
    expected = [[8, *text, *numbers] for text, numbers in zip(texts, scores, strict=True)]
    assert tables[-1]["data"] == expected


def test_metrics_json_summarizes_the_run(run):
    folder, module, _ = run
    report = read_json(folder)
    assert report["val"]["val/loss"] == pytest.approx(module.losses[-1], rel=1e-6)
    assert report["test"]["test/loss"] == pytest.approx(module.loss().item(), rel=1e-6)
    last_row = read_csv(folder, "train/loss")[-1]
    assert report["train"]["train/loss"] == pytest.approx(float(last_row["train/loss"]))
    assert report["best"] == {"metric": "val/accuracy", "value": 0.5, "epoch": 0, "global_step": 4}
    assert (report["global_step"], report["trainable_parameters"]) == (8, 13)
    assert 0 < report["seconds"] < 60


@pytest.mark.parametrize("name", ["learning_curve", "val_confusion", "test_confusion"])
def test_plots_are_complete_images(run, name):
    folder, _, _ = run
    with Image.open(folder / "plots" / f"{name}.png") as image:
        image.load()
        assert min(image.size) >= 300
        assert len(image.getcolors(maxcolors=2**20)) > 2


def test_figures_of_a_training_are_of_the_best_validation(tmp_path):
    path = tmp_path / "plots" / "val_confusion.png"
    images = {}
    for epochs in (1, 2):  # the accuracy falls and the loss falls
        for monitor, mode in (("val/accuracy", "max"), ("val/loss", "min")):
            module = Tiny()
            module.evaluations = {"val": NumberedEvaluation()}
            trainer(tmp_path, [RunFiles(tmp_path, monitor, mode)], max_epochs=epochs).fit(module, Rows())
            images[monitor, epochs] = path.read_bytes()
    assert images["val/accuracy", 1] == images["val/accuracy", 2] == images["val/loss", 1]
    assert images["val/loss", 2] != images["val/loss", 1]


def test_no_partial_file_remains(run):
    folder, _, _ = run
    assert list(folder.rglob("*.part")) == []
    assert sorted(path.name for path in (folder / "plots").iterdir()) == [
        "learning_curve.png",
        "test_confusion.png",
        "val_confusion.png",
    ]


def test_learning_curve_marks_the_best_point_in_the_panel_of_the_monitored_metric():
    val = [
        (4, 0, {"val/loss": 1.0, "val/f1": 0.5}),
        (8, 1, {"val/loss": 0.5, "val/f1": 0.8}),
        (12, 2, {"val/f1": 0.7}),
    ]
    above, below = learning_curve([(2, 3.0), (4, 2.0)], val, "val/f1", "max").axes
    train_line, val_line = above.lines
    assert train_line.get_xydata().tolist() == [[2, 3.0], [4, 2.0]]
    assert val_line.get_xydata().tolist() == [[4, 1.0], [8, 0.5]]
    assert below.lines[-1].get_xydata().tolist() == [[8, 0.8]]
    (only,) = learning_curve([], val, "val/loss", "min").axes
    assert only.lines[-1].get_xydata().tolist() == [[8, 0.5]]


def test_the_history_continues_after_a_restart(tmp_path):
    files = RunFiles(tmp_path)
    first = trainer(tmp_path, [files, PromptWatch()], max_epochs=1)
    first.fit(Tiny(), Rows())
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed, watch, module = RunFiles(tmp_path), PromptWatch(), Tiny()
    second = trainer(tmp_path, [resumed, watch], max_epochs=2)
    second.fit(module, Rows(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    state = resumed.state_dict()
    assert [step for step, _ in state["train"]] == [2, 4, 6, 8]
    assert [step for step, _, _ in state["val"]] == [4, 8]
    assert state["seconds"] > files.state_dict()["seconds"]
    assert watch.state_dict()["start"][0].tolist() == Tiny().prompt.tolist()


def test_a_later_test_adds_to_the_metrics_of_the_run(tmp_path):
    trainer(tmp_path, [RunFiles(tmp_path)]).fit(Tiny(), Rows())
    trained = read_json(tmp_path)
    trainer(tmp_path, [RunFiles(tmp_path)]).test(Tiny(), Rows(), verbose=False)
    assert read_json(tmp_path) == {**trained, "test": {"test/loss": pytest.approx(Tiny().loss().item())}}


def test_metrics_json_is_valid_json_when_the_loss_is_nan(tmp_path):
    module = Tiny(lr=float("nan"))
    with pytest.warns(UserWarning, match="no longer finite"):
        trainer(tmp_path, [RunFiles(tmp_path), PromptWatch()]).fit(module, Rows())
    report = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert report["val"]["val/loss"] is None
    assert report["best"] is None


def test_an_unknown_monitor_is_warned_of_once_with_the_metrics_that_exist(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, [RunFiles(tmp_path, "val/acc", "max")]).fit(Tiny(), Rows())
    messages = [str(warning.message) for warning in caught]
    messages = [message for message in messages if "val/acc " in message]
    assert messages == ["val/acc determines the best validation, but validation computes ['val/accuracy', 'val/loss']"]
    assert read_json(tmp_path)["best"] is None


@pytest.mark.parametrize(("lr", "expected"), [(0.0, 1), (1e-3, 0)])
def test_a_prompt_that_does_not_change_is_warned_of_once(tmp_path, lr, expected):
    assert count_warnings(tmp_path, Tiny(lr=lr), "it is not learning") == expected


def count_warnings(tmp_path, module, part):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, [PromptWatch()], max_epochs=30).fit(module, Rows())
    return sum(part in str(warning.message) for warning in caught)


class Growing(Tiny):
    """Doubles its prompt at each step, whatever the gradient."""

    def on_train_batch_start(self, *_):
        self.prompt.data *= 2


def test_a_prompt_that_explodes_is_warned_of_once(tmp_path):
    assert count_warnings(tmp_path, Growing(lr=0.0), "norm grew more than") == 1


class Routed(Tiny):
    """Sends a share of the rows to its first expert."""

    share = 1.0

    def training_step(self, *batch):
        self.log_dict({"train/usage/expert_0": self.share, "train/usage/expert_1": 1 - self.share}, batch_size=1)
        return super().training_step(*batch)


@pytest.mark.parametrize(("share", "expected"), [(1.0, 1), (0.9, 0)])
def test_a_router_that_collapses_is_warned_of_once(tmp_path, share, expected):
    module = Routed()
    module.share = share
    assert count_warnings(tmp_path, module, "the router has collapsed") == expected


def test_the_speed_counts_tokens_without_padding_and_steps_without_validation(tmp_path):
    module = Tiny(val_seconds=0.4)
    logger = make_loggers(tmp_path, "n", "p", "disabled")
    callbacks = [Throughput()]
    options = {"val_check_interval": 2, "log_every_n_steps": 4, "accumulate_grad_batches": 1}
    trainer(tmp_path, callbacks, logger, max_epochs=1, num_sanity_val_steps=0, **options).fit(module, Rows())
    (row,) = read_csv(tmp_path, "speed/step_ms")
    seconds = 4 * float(row["speed/step_ms"]) / 1000
    assert 0 < seconds < 0.4  # one validation takes three times as long
    assert seconds * float(row["speed/tokens_per_s"]) == pytest.approx(sum(range(1, 17)), rel=1e-3)
    assert 50 < float(row["speed/memory_mb"]) < 50_000


def test_accumulated_batches_are_one_step(tmp_path):
    logger = make_loggers(tmp_path, "n", "p", "disabled")
    options = {"log_every_n_steps": 1, "accumulate_grad_batches": 2, "max_epochs": 1}
    trainer(tmp_path, [Throughput(), PromptWatch()], logger, **options).fit(Tiny(), Rows())
    rows = read_csv(tmp_path, "speed/step_ms")
    tokens = [float(row["speed/step_ms"]) * float(row["speed/tokens_per_s"]) / 1000 for row in rows]
    first_step, second_step = sum(range(1, 9)), sum(range(9, 17))
    assert tokens == pytest.approx([first_step, second_step], rel=1e-3)
    assert [float(row["train/tokens"]) for row in rows] == [first_step, first_step + second_step]
    assert len(read_csv(tmp_path, "prompt/grad_norm")) == 2


def test_nothing_is_logged_if_the_trainer_disables_logging(tmp_path):
    callbacks = [Throughput(), PromptWatch(), RunFiles(tmp_path)]
    module = Tiny()
    module.training_step = lambda batch, batch_idx: module.loss()
    trainer(tmp_path, callbacks, log_every_n_steps=0).fit(module, Rows())
    assert "train" not in read_json(tmp_path)


def test_predictions_are_written_in_the_order_of_the_data(tmp_path):
    path = tmp_path / "out" / "predictions.jsonl"
    data = Rows(order=[9, 1, 0, 4, 2, 3, 5, 8, 7, 6])
    trainer(tmp_path, [predictions.PredictionWriter(path)]).predict(Tiny(), data)
    lines = read_lines(path)
    assert [line["row"] for line in lines] == list(range(ROWS))
    assert lines[0] == {"row": 0, "input": "predict text 0", "prediction": "good", "scores": None}
    assert lines[2]["scores"] == {"good": 2.666667, "bad": 0.333333}
    assert list(path.parent.iterdir()) == [path]


def test_predictions_of_an_interrupted_run_are_in_a_partial_file(tmp_path):
    class OutOfMemory(Tiny):
        def predict_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("out of memory")
            return super().predict_step(batch, batch_idx)

    path = tmp_path / "predictions.jsonl"
    writer = predictions.PredictionWriter(path)
    trainer(tmp_path, [writer]).predict(Tiny(), Rows())
    path.unlink()
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer(tmp_path, [writer]).predict(OutOfMemory(), Rows())
    assert not path.exists()
    assert [line["row"] for line in read_lines(path.with_name("predictions.jsonl.part"))] == list(range(8))


def test_predictions_are_written_to_standard_output(tmp_path, capsys):
    writer = predictions.PredictionWriter("-")
    for _ in range(2):
        trainer(tmp_path, [writer]).predict(Tiny(), Rows())
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
        assert [line["row"] for line in lines] == list(range(ROWS))


def test_lines_are_on_standard_output_before_the_next_batch_runs(tmp_path, monkeypatch):
    read_end, write_end = os.pipe()
    lines_by_batch = []

    class ReadsOutput(Tiny):
        def predict_step(self, batch, batch_idx):
            if batch_idx:
                lines_by_batch.append(os.read(read_end, 10_000).decode().splitlines())
            return super().predict_step(batch, batch_idx)

    with os.fdopen(write_end, "w") as out, monkeypatch.context() as patched:
        patched.setattr("sys.stdout", out)
        trainer(tmp_path, [predictions.PredictionWriter("-")]).predict(ReadsOutput(), Rows())
    os.close(read_end)
    first, second = ([json.loads(line)["row"] for line in lines] for lines in lines_by_batch)
    assert first == [0, 1, 2, 3]
    assert second == [4, 5, 6, 7]


def test_test_predictions_have_the_target(tmp_path):
    path = tmp_path / "test.jsonl"
    trainer(tmp_path, [predictions.TestPredictions(path)]).test(Tiny(), Rows(order=[3, 2, 1, 0]), verbose=False)
    assert [line["row"] for line in read_lines(path)] == [0, 1, 2, 3]
    assert read_lines(path)[1] == {
        "row": 1,
        "input": "test text 1",
        "prediction": "good",
        "scores": {"good": 1.666667, "bad": 0.333333},
        "target": "bad",
    }


class Sampled(Tiny):
    """Generates for odd rows only, in another order than the data's."""

    def validation_step(self, batch, batch_idx):
        scores = {1: None, 3: {"rouge1": 0.1234567, "rougeL": float("nan")}}
        rows = [row for row in batch.row_ids if row % 2]
        return [
            {"row": r, "prediction": f"text {r}", "target": "t", "scores": scores.get(r, {"new": 1})}
            for r in rows[::-1]
        ]


def test_a_table_of_generated_text_has_the_first_predicted_rows_and_all_scores(tmp_path):
    data = Rows()
    data.classes = None
    table = predictions.PredictionTable(rows=3)
    trainer(tmp_path, [table], make_loggers(tmp_path, "n", "p", "offline")).validate(Sampled(), data, verbose=False)
    (logged,) = read_run(tmp_path).tables("val/predictions")
    assert logged["columns"] == ["row", "input", "target", "prediction", "correct", "rouge1", "rougeL", "new"]
    texts = [[row, f"validation text {row}", "t", f"text {row}", False] for row in (1, 3, 5)]
    scores = [[None, None, None], [0.123457, None, None], [None, None, 1.0]]
    assert logged["data"] == [text + numbers for text, numbers in zip(texts, scores, strict=True)]


def test_without_wandb_no_table_is_gathered(tmp_path):
    table = predictions.PredictionTable()
    trainer(tmp_path, [table], make_loggers(tmp_path, "n", "p", "disabled")).validate(Tiny(), Rows(), verbose=False)
    assert table._records == {}
