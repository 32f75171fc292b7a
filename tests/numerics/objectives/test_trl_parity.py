"""Losses and gradients of preferences equal those of TRL on the same weights and tokens, padded on the right."""

import pytest
import torch
from preferences import PAIRS, first_batch, make_preferences
from torch.nn.utils.rnn import pad_sequence

from lightning_softprompt.methods import FullFineTuning
from lightning_softprompt.objectives.preference.dpo import DPO
from lightning_softprompt.objectives.preference.ipo import IPO

trl = pytest.importorskip("trl")


def collate(batch):
    """Returns the rows as TRL collates them: all better answers, then all worse answers."""
    order = [*range(0, len(batch), 2), *range(1, len(batch), 2)]
    rows = [batch.encoded[b] for b in order]
    is_answer = []
    for row in rows:
        flags = torch.zeros(len(row.ids), dtype=torch.long)
        flags[list(row.answers)] = 1
        is_answer.append(flags)
    ids = [torch.tensor(row.ids) for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "completion_mask": pad_sequence(is_answer, batch_first=True),
    }


@pytest.fixture(scope="module")
def trainer(load, tmp_path_factory):
    """TRL's trainer of a policy that differs from its reference."""
    from datasets import Dataset

    policy, reference = load("llama", packed=False), load("llama", packed=False)
    with torch.no_grad():
        for weight in policy.model.parameters():
            generator = torch.Generator().manual_seed(weight.numel())
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    policy.model.requires_grad_(True)
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in PAIRS]
    return trl.DPOTrainer(
        policy.model, reference.model, processing_class=policy.codec.tokenizer, train_dataset=Dataset.from_list(rows),
        args=trl.DPOConfig(str(tmp_path_factory.mktemp("trl")), beta=0.3, use_cpu=True, bf16=False, report_to=[]),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("objective", "loss_type", "label_smoothing"),
    [
        (DPO(beta=0.3), "sigmoid", 0.0),
        (DPO(beta=0.3, label_smoothing=0.2, robust=True), "robust", 0.2),
        (IPO(beta=0.3), "ipo", 0.0),
    ],
)
def test_a_step_equals_that_of_trl(load, tiny_folder, trainer, objective, loss_type, label_smoothing):
    batch = first_batch(make_preferences(tiny_folder("llama"), batch_size=5))
    method = FullFineTuning(objective=objective)
    method.attach(load("llama", packed=False), seed=1)
    method.start_values.remember()
    trained = dict(trainer.model.named_parameters())
    ours = dict(method.loaded.model.named_parameters())
    with torch.no_grad():
        for name, weight in ours.items():
            weight.copy_(trained[name])
    trainer.loss_types, trainer.loss_weights, trainer.label_smoothing = [loss_type], [1.0], label_smoothing
    trainer.model.zero_grad()
    expected = trainer.compute_loss(trainer.model, collate(batch))
    expected.backward()
    loss = method.step(batch)["loss"]
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for name, weight in ours.items():
        if weight.requires_grad:
            torch.testing.assert_close(weight.grad, trained[name].grad, rtol=1e-3, atol=1e-5)
