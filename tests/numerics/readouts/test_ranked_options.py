"""Scores of options that differ from row to row, against fixed choices and against one option at a time."""

from dataclasses import replace

import pytest
import torch
from tiny import TARGETS, TEXTS, batch_of
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from lightning_softprompt.core.types import Classes, OptionExample
from lightning_softprompt.evaluation.options import OptionEvaluation
from lightning_softprompt.methods import IDPG, PrefixTuning, PromptTuning
from lightning_softprompt.objectives.classification import Classification
from lightning_softprompt.readouts.ranked import RankedChoices
from lightning_softprompt.readouts.ranked_options import RankedOptions

TEMPLATE = "{soft}{text} it was {target}"
RAGGED = [
    ("good", "a sad dog"),
    ("good", "dull", "bad it was"),
    ("a funny dog", "good"),
    ("bad", "good", "dull", "dog"),
]
LABELS = [1, 2, 0, 3]
METHODS = {
    "tokens": lambda spec: PromptTuning(length=3, backbone=spec),
    "prefix": lambda spec: PrefixTuning(length=2, width=8, backbone=spec),
    "by row": lambda spec: IDPG(length=2, bottleneck=4, backbone=spec),
}


def add_options(batch, options):
    examples = [OptionExample({"text": text}, "", options=of_row) for text, of_row in zip(TEXTS, options, strict=True)]
    return replace(batch, examples=tuple(examples))


@pytest.fixture(params=list(METHODS))
def module(backbone, request):
    module = METHODS[request.param](backbone.spec)
    module.attach(backbone)
    return module


@pytest.mark.parametrize("normalize", ["none", "tokens", "characters"])
def test_equal_options_in_all_rows_have_the_loss_and_gradients_of_fixed_choices(module, normalize):
    codec = module.loaded.codec
    words = ("a sad dog", "good", "bad it was")
    batch = batch_of(codec, TEMPLATE, labels=[0, 1, 2, 0])
    choices = Classes({str(i): [" " + word] for i, word in enumerate(words)}, TEMPLATE)
    readouts = RankedChoices(codec, choices, normalize), RankedOptions(codec, Classes({}, TEMPLATE), normalize)
    rows = batch, add_options(batch, [words] * len(TEXTS))
    results = []
    for readout, of_readout in zip(readouts, rows, strict=True):
        module.readout = readout
        module.zero_grad()
        scores = module.lm().scores(of_readout)
        Classification()(module.lm(), of_readout).loss.backward()
        gradients = [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]
        results.append((scores.detach(), gradients))
    if normalize == "characters":  # label words include the space before them
        sizes = [[(len(word) + 1) / len(word) for word in words]]
        assert_close(results[0][0] * torch.tensor(sizes), results[1][0], atol=1e-5, rtol=1e-5)
        return
    assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)
    assert results[0][1]


def test_scores_are_those_of_one_option_at_a_time(module):
    """The loop also ranks rows with different numbers of options, and training on them has finite gradients."""
    codec, backbone = module.loaded.codec, module.loaded
    module.readout = RankedOptions(codec, Classes({}, TEMPLATE))
    batch = add_options(batch_of(codec, TEMPLATE, labels=LABELS), RAGGED)
    scores = module.lm().scores(batch)
    assert scores.shape == (4, 4)
    losses = []
    for b, (options, label) in enumerate(zip(RAGGED, LABELS, strict=True)):
        row_scores = []
        for option in options:
            row = batch_of(codec, TEMPLATE, TEXTS[b : b + 1], [option])
            row_scores.append(-backbone.cross_entropy(row, module.prompt(row)).sum())
        assert_close(scores[b, : len(options)], torch.stack(row_scores), atol=1e-5, rtol=1e-5)
        assert scores[b, len(options) :].eq(float("-inf")).all()
        losses.append(cross_entropy(torch.stack(row_scores)[None], torch.tensor([label])))
    loss = Classification()(module.lm(), batch).loss
    assert_close(loss, torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters() if parameter.grad is not None)


def test_metrics_are_means_over_rows(load):
    backbone = load("llama")
    module = METHODS["tokens"](backbone.spec)
    module.attach(backbone)
    module.readout = RankedOptions(backbone.codec, Classes({}, TEMPLATE))
    batch = add_options(batch_of(backbone.codec, TEMPLATE, labels=LABELS), RAGGED)
    evaluation = OptionEvaluation()
    evaluation.begin("test", 0)
    with torch.no_grad():
        records = evaluation.update(module.lm(), batch)
        scores = module.lm().scores(batch)
    correct = [record["prediction"] == RAGGED[b][LABELS[b]] for b, record in enumerate(records)]
    results = {name: float(value) for name, value in evaluation.compute().items()}
    assert results["accuracy"] == sum(correct) / 4
    assert results["chance"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 2 + 1 / 4) / 4)
    assert results["num_options"] == 11 / 4
    assert results["cross_entropy"] == pytest.approx(float(cross_entropy(scores, torch.tensor(LABELS))))
    assert results["accuracy_low"] < results["accuracy"] + 1e-9 < results["accuracy_high"] + 2e-9
    for record, options in zip(records, RAGGED, strict=True):
        assert list(record["scores"]) == list(options)
        assert sum(record["scores"].values()) == pytest.approx(1)


def test_rows_without_options_are_refused(load):
    backbone = load("llama")
    module = METHODS["tokens"](backbone.spec)
    module.attach(backbone)
    module.readout = RankedOptions(backbone.codec, Classes({}, TEMPLATE))
    with pytest.raises(ValueError, match="rows require options, as MultipleChoiceDataModule reads them"):
        module.lm().scores(batch_of(backbone.codec, TEMPLATE, targets=TARGETS))
