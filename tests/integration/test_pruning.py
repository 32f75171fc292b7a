"""Pruning drops the least important parts and rewinds the rest; the probe counts the effect of corruption."""

import json

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from tiny import CLASSES, batch_of
from torch.utils.data import DataLoader

from lightning_softprompt.callbacks.algorithms.corruption_probe import CorruptionProbe
from lightning_softprompt.callbacks.algorithms.pruning import Pruning
from lightning_softprompt.evaluation.classification import ClassificationEvaluation
from lightning_softprompt.methods import PromptTuning, XPrompt

FAMILIES = ("llama",)
LABELS = (0, 1, 1, 0)
QUIET = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False,
}  # fmt: skip


class Watch(Callback):
    """Records the gradients and soft tokens before every step."""

    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps.append((pl_module.tokens.grad.clone(), pl_module.tokens.detach().clone()))


@pytest.fixture
def fit(backbone):
    def fit(pruning, steps):
        module = XPrompt(
            length=4, pieces=4, backbone=backbone.spec, classes=CLASSES,
            evaluation=ClassificationEvaluation(CLASSES.names),
        )  # fmt: skip
        module.attach(backbone)
        watch = Watch()
        loader = DataLoader([batch_of(backbone.codec, labels=LABELS)] * 2, batch_size=None)
        Trainer(max_steps=steps, max_epochs=-1, callbacks=[pruning, watch], **QUIET).fit(module, loader)
        return module, watch.steps

    return fit


def test_tokens_then_pieces_are_pruned_by_their_gates_and_the_rest_is_rewound(fit, backbone):
    module, steps = fit(Pruning(after=6, tokens=0.5, pieces=0.5, measured=3), 9)
    token_gates = sum((grad * tokens).sum(1).abs() for grad, tokens in steps[3:6])
    largest = token_gates.topk(2).indices.tolist()
    assert module.kept_tokens.nonzero()[:, 0].tolist() == sorted(largest)
    pieces = [(grad * tokens).unflatten(1, (4, -1)) for grad, tokens in steps[6:9]]
    piece_gates = sum(piece.sum(-1).abs() for piece in pieces)
    alive = piece_gates[module.kept_tokens].flatten()
    is_kept = module.kept_pieces[module.kept_tokens].flatten()
    assert is_kept.sum() == 4
    assert alive[is_kept].min() > alive[~is_kept].max()
    assert torch.equal(module.tokens, steps[6][1])  # the values of step 6
    prompt = module.prompt(batch_of(backbone.codec)).tokens
    assert prompt.shape[1] == 2
    assert (prompt == 0).sum() == 4 * backbone.hidden_size // 4


@pytest.mark.parametrize("keep", ["best", "worst", "random"])
def test_controls_keep_the_same_number_of_tokens(fit, keep):
    torch.manual_seed(3)
    module, _ = fit(Pruning(after=4, tokens=0.75, pieces=1.0, measured=2, keep=keep, rewind=False), 8)
    assert module.kept_tokens.sum() == 3
    assert module.kept_pieces.all()


def test_the_worst_tokens_are_the_complement_of_the_best(fit):
    torch.manual_seed(3)
    best, _ = fit(Pruning(after=4, tokens=0.5, measured=2), 5)
    worst, _ = fit(Pruning(after=4, tokens=0.5, measured=2, keep="worst"), 5)
    assert torch.equal(best.kept_tokens, ~worst.kept_tokens)


def test_shares_and_methods_that_cannot_be_pruned_are_refused(backbone):
    with pytest.raises(ValueError, match="must be shares above 0"):
        Pruning(tokens=0.0)
    with pytest.raises(ValueError, match="measured must be from 1 to after=5"):
        Pruning(after=5, measured=6)
    module = PromptTuning(2, backbone=backbone.spec)
    module.attach(backbone)
    with pytest.raises(ValueError, match="is for the method XPrompt, not for PromptTuning"):
        Trainer(max_steps=1, callbacks=[Pruning()], **QUIET).fit(module, DataLoader([batch_of(backbone.codec)]))


@pytest.mark.parametrize("corruption", ["rescale", "replace"])
def test_the_probe_measures_accuracy_with_each_token_corrupted(backbone, corruption, tmp_path, monkeypatch):
    monkeypatch.setenv("SOFTPROMPT_RUN_FOLDER", str(tmp_path))
    module = PromptTuning(
        3, backbone=backbone.spec, classes=CLASSES, evaluation=ClassificationEvaluation(CLASSES.names)
    )
    module.attach(backbone)
    batch = batch_of(backbone.codec, labels=LABELS)
    batch.labels = torch.tensor(LABELS)
    probe = CorruptionProbe(corruption, strengths=[0.0, 0.5])
    for _ in range(2):  # the second test starts again
        Trainer(callbacks=[probe], **QUIET).test(module, DataLoader([batch, batch], batch_size=None), verbose=False)
    report = json.loads((tmp_path / "low_norm.json").read_text())
    assert (report["rows"], report["positions"]) == (8, 3)
    accuracy = float((module.lm().scores(batch).argmax(-1) == batch.labels).float().mean())
    assert report["accuracy"] == accuracy
    for p in range(3):
        with torch.no_grad():
            original = module.tokens[p].clone()
            module.tokens[p] = 0
            expected = float((module.lm().scores(batch).argmax(-1) == batch.labels).float().mean())
            module.tokens[p] = original
        assert report["by_strength"]["0.0"][p] == expected
    assert (tmp_path / "plots" / "low_norm.png").read_bytes().startswith(b"\x89PNG")
