"""Precisions that convert the whole model, from Python."""

import pytest
import torch

import lightning_softprompt as sp

QUIET = {"run": None, "enable_progress_bar": False, "accelerator": "cpu"}


@pytest.fixture
def data(tiny_folder, rows):
    spec = sp.BackboneSpec(name=str(tiny_folder("llama")))
    labels = {"positive": "good", "negative": "bad"}
    known = [row for row in rows if row["label"] in labels] * 2
    return sp.ClassificationDataModule(
        "{soft}{text} it was {target}", labels, backbone=spec, train=known, validation=known, predict=known,
        batch_size=4, cache=False,
    )  # fmt: skip


def test_a_prompt_is_trained_and_used_in_double_precision(data):
    torch.manual_seed(1)
    single, double = sp.PromptTuning(length=3, data=data), sp.PromptTuning(length=3, data=data)
    single.configure_model()
    double.configure_model()
    double.load_state_dict(single.state_dict())
    options = {"max_steps": 2, **QUIET}
    sp.Trainer(**options).fit(single, data)
    trainer = sp.Trainer(precision="64-true", **options)
    trainer.fit(double, data)
    assert double.tokens.dtype == torch.float64
    assert double.loaded.word_embeddings.dtype == torch.float64
    assert torch.allclose(double.tokens.float(), single.tokens, atol=1e-5)
    (metrics,) = trainer.validate(double, data, verbose=False)
    assert 0 <= metrics["val/accuracy"] <= 1


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_rows_are_predicted_in_a_precision_of_the_whole_model(precision, data):
    model = sp.PromptTuning(length=3, data=data)
    predictions = sp.Trainer(precision=precision, **QUIET).predict(model, data)
    records = [record for batch in predictions for record in batch]
    assert len(records) == len(data.split("predict"))
    assert {record["prediction"] for record in records} <= {"positive", "negative"}
