"""What `sp.Trainer` prints, and what a notebook shows of it."""

import logging
import re
import sys
import warnings
from types import SimpleNamespace

import pytest
import rich
from lightning import seed_everything
from rich.console import Console

import lightning_softprompt as sp
from lightning_softprompt.callbacks.reporting.progress_bar import StepProgressBar
from lightning_softprompt.training.notices import LOGGERS

LABELS = {"positive": "good", "negative": "bad"}
UNWANTED = ("💡", "GPU available", "TPU available", "weights_only", "eval mode", "many workers", "LeafSpec")


@pytest.fixture
def data(tiny_folder, rows):
    two_classes = [row for row in rows if row["label"] in LABELS] * 4
    return sp.ClassificationDataModule(
        backbone=sp.BackboneSpec(name=str(tiny_folder("llama"))), train=two_classes, validation=two_classes,
        test=two_classes, template="{soft}{text} it was {target}", labels=LABELS, batch_size=4, cache=False,
    )  # fmt: skip


@pytest.fixture
def model(data):
    seed_everything(1)
    return sp.PromptTuning(length=3, data=data)


def test_notices_of_lightning_are_hidden_and_metrics_have_intervals(data, model, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    filters = [list(logger.filters) for logger in LOGGERS]  # commands of other tests leave some
    caplog.set_level(logging.INFO)
    caplog.set_level(logging.INFO, logger="lightning.pytorch")  # other tests raise it
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = sp.Trainer(max_steps=2, val_check_interval=1, accelerator="cpu", enable_progress_bar=False)
        trainer.fit(model, data)
        trainer.validate(model, data)
        (metrics,) = trainer.test(model, data, ckpt_path="best")
        quiet = {"accelerator": "cpu", "enable_progress_bar": False}
        sp.Trainer(run=None, **quiet).predict(model, data.test_dataloader())
    printed = capsys.readouterr().out
    shown = caplog.text + printed + "".join(str(warning.message) for warning in caught)
    assert [text for text in UNWANTED if text in shown] == []
    assert "96 trainable and" in shown  # the filter is narrow: other lines of the same log are there
    assert [list(logger.filters) for logger in LOGGERS] == filters
    accuracy = f"{metrics['test/accuracy']:.4f}"
    assert re.search(rf"Test\naccuracy +{accuracy} \[\S+, \S+\]\n", printed)
    assert printed.startswith("Validation\naccuracy ")
    assert "Test metric" not in printed  # Lightning's table of 17 digits
    assert "checkpoint at runs/default/" in caplog.text
    assert trainer.learning_curve._repr_png_().startswith(b"\x89PNG")


def test_nothing_is_printed_on_request(data, model, capsys):
    trainer = sp.Trainer(run=None, accelerator="cpu", enable_progress_bar=False)
    (metrics,) = trainer.test(model, data, verbose=False)
    assert 0 <= metrics["test/accuracy"] <= 1
    assert capsys.readouterr().out == ""
    assert trainer.learning_curve is None


def test_a_notebook_shows_one_bar_that_is_replaced(data, model, monkeypatch):
    shown = []  # the outputs of the cell: each is a list of its states

    def display(progress, display_id):
        shown.append([])
        handle = SimpleNamespace(update=lambda progress: shown[-1].append(progress._repr_mimebundle_([], [])))
        handle.update(progress)
        return handle

    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    options = {"force_jupyter": True, "width": 160}
    monkeypatch.setattr(rich, "_console", Console(**options))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # rich asks for ipywidgets
        bar = StepProgressBar("val/accuracy", options)
        trainer = sp.Trainer(max_steps=4, val_check_interval=2, run=None, accelerator="cpu", callbacks=bar)
        trainer.fit(model, data)
        trainer.test(model, data, verbose=False)
    training, testing = (states[-1] for states in shown)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", training["text/plain"])
    assert re.search(r"^Training ━+ 4/4 .*it/s epoch: \d+ loss: \d\.\d{3} lr: \S+ val/accuracy: [01]\.\d{3}", plain)
    assert len(plain.strip().splitlines()) == 1  # no bar of a validation is left
    assert "Testing" in testing["text/html"]
