"""Objectives that learn from preferences: equations as loops, identities at the start, references and their cache."""

import logging
import math
from types import SimpleNamespace

import policies
import pytest
import torch
from policies import change
from preferences import PAIRS, first_batch, make_preferences

from lightning_softprompt.backbones.microbatching import use_microbatches
from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.checkpoints.backbone_identity import backbone_identity
from lightning_softprompt.checkpoints.frozen_role import empty_prompt
from lightning_softprompt.checkpoints.prompt_file import SavedPrompt, write_prompt
from lightning_softprompt.core.types import IGNORE
from lightning_softprompt.methods import DePT, LoRA, PrefixTuning, PromptTuning
from lightning_softprompt.objectives.preference import kto, losses
from lightning_softprompt.objectives.preference.dpo import DPO
from lightning_softprompt.objectives.preference.ipo import IPO
from lightning_softprompt.objectives.preference.kto import KTO
from lightning_softprompt.objectives.preference.orpo import ORPO
from lightning_softprompt.objectives.preference.reference import ReferencedObjective
from lightning_softprompt.objectives.preference.simpo import SimPO
from lightning_softprompt.readouts.reward_head import RewardHead

OBJECTIVES = {"DPO": DPO, "IPO": IPO, "KTO": KTO, "ORPO": ORPO, "SimPO": SimPO}
REFERENCED = {"DPO": DPO, "IPO": IPO, "KTO": KTO}
METHODS = {
    "PromptTuning": (PromptTuning, {"length": 3}),
    "PrefixTuning": (PrefixTuning, {"length": 2}),
    "DePT": (DePT, {"length": 3, "rank": 2, "max_tokens": 48}),
    "LoRA": (LoRA, {"rank": 2}),
}


@pytest.fixture
def batch(tiny_folder):
    return first_batch(make_preferences(tiny_folder("llama")))


def make_method(load, objective, name="PromptTuning", family="llama", **common):
    cls, arguments = METHODS[name]
    return policies.make_method(cls, load(family), objective, **arguments | common)


def sums_of(method, batch):
    return method.lm().logprobs(batch).sum(1)


# --- identities at the start of a run


@pytest.mark.parametrize(
    ("objective", "name", "expected"),
    [
        *((DPO(), name, math.log(2)) for name in METHODS),
        (DPO(label_smoothing=0.2), "PromptTuning", math.log(2)),
        (DPO(label_smoothing=0.2, robust=True), "PromptTuning", math.log(2)),
        (IPO(), "PrefixTuning", 25.0),
        (IPO(average="sums"), "PromptTuning", 25.0),
        (KTO(), "DePT", 0.5),
    ],
)
def test_losses_where_policy_and_reference_are_equal(load, batch, objective, name, expected):
    loss = make_method(load, objective, name).step(batch)["loss"]
    assert float(loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_the_first_gradient_of_dpo_is_that_of_the_log_ratio(load, batch, name):
    """It is -b / 2 times the gradient of log p(y_w) - log p(y_l), averaged over pairs."""
    module = make_method(load, DPO(beta=0.3), name)
    parameters = [p for p in module.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(module.step(batch)["loss"], parameters, allow_unused=True)
    sums = sums_of(module, batch)
    target = -0.15 * (sums[0::2] - sums[1::2]).mean()
    for gradient, expected in zip(gradients, torch.autograd.grad(target, parameters, allow_unused=True), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_simpo_where_the_means_are_equal(batch):
    lm = SimpleNamespace(logprobs=lambda rows: torch.where(rows.targets != IGNORE, -1.5, 0.0))
    assert float(SimPO()(lm, batch).loss) == pytest.approx(math.log1p(math.e))


# --- equations as loops


def logprobs_of(batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return -torch.rand(batch.targets.shape, generator=generator) * (batch.targets != IGNORE)


def fixed(monkeypatch, batch, policy_seed=0, reference_seed=1):
    """A language model with fixed log-probabilities of the policy and of the reference."""
    policy, reference = logprobs_of(batch, policy_seed), logprobs_of(batch, reference_seed)
    monkeypatch.setattr(ReferencedObjective, "reference_logprobs", lambda self, lm, rows: reference)
    return SimpleNamespace(logprobs=lambda rows: policy), policy, reference


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def log_sigmoid(x):
    return math.log(sigmoid(x))


def mean(values):
    return sum(values) / len(values)


def pair_loop(batch, policy, reference, loss_of_pair):
    """Averages a loss of two answers (log-probabilities of the policy, of the reference) over the pairs of a batch."""
    rows = []
    for b in range(len(batch)):
        count = int((batch.targets[b] != IGNORE).sum())  # without padding
        rows.append((policy[b, :count].tolist(), reference[b, :count].tolist()))
    return mean([loss_of_pair(rows[b], rows[b + 1]) for b in range(0, len(batch), 2)])


def dpo_logit(better, worse, beta, reduce=sum):
    better_ratio = reduce(better[0]) - reduce(better[1])
    worse_ratio = reduce(worse[0]) - reduce(worse[1])
    return beta * (better_ratio - worse_ratio)


def log_odds(values):
    return mean(values) - math.log(1 - math.exp(mean(values)))


def dpo(better, worse):
    return -log_sigmoid(dpo_logit(better, worse, 0.5))


def smoothed(better, worse):
    logit = dpo_logit(better, worse, 0.1)
    return -0.8 * log_sigmoid(logit) - 0.2 * log_sigmoid(-logit)


def robust(better, worse):
    logit = dpo_logit(better, worse, 0.1)
    return (-0.8 * log_sigmoid(logit) + 0.2 * log_sigmoid(-logit)) / (1 - 2 * 0.2)


def with_sft(better, worse):
    return -log_sigmoid(dpo_logit(better, worse, 0.1)) - 0.5 * mean(better[0])


def ipo(better, worse):
    return (dpo_logit(better, worse, 1, mean) - 1 / (2 * 0.4)) ** 2


def ipo_of_sums(better, worse):
    return (dpo_logit(better, worse, 1) - 1 / (2 * 0.4)) ** 2


def orpo(better, worse):
    return -mean(better[0]) - 0.3 * log_sigmoid(log_odds(better[0]) - log_odds(worse[0]))


def simpo(better, worse):
    return -log_sigmoid(2.5 * (mean(better[0]) - mean(worse[0])) - 2.5 * 0.4)


EQUATIONS = {
    "dpo": (DPO(beta=0.5), dpo),
    "smoothed": (DPO(label_smoothing=0.2), smoothed),
    "robust": (DPO(label_smoothing=0.2, robust=True), robust),
    "with sft": (DPO(sft_weight=0.5), with_sft),
    "ipo": (IPO(beta=0.4), ipo),
    "ipo of sums": (IPO(beta=0.4, average="sums"), ipo_of_sums),
    "orpo": (ORPO(weight=0.3), orpo),
    "simpo": (SimPO(beta=2.5, gamma_ratio=0.4), simpo),
}


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_loss_is_the_equation_of_the_paper(monkeypatch, batch, name):
    objective, loss_of_pair = EQUATIONS[name]
    lm, policy, reference = fixed(monkeypatch, batch)
    expected = pair_loop(batch, policy, reference, loss_of_pair)
    assert float(objective(lm, batch).loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_kto_compares_with_answers_to_other_questions(load, tiny_folder, count):
    """With any number of questions, z is the mean log-ratio of the answers to the next question; with one, it is 0."""
    batch = first_batch(make_preferences(tiny_folder("llama"), train=PAIRS[:count], batch_size=count))
    objective = KTO(beta=0.5, desirable=1.2, undesirable=0.8)
    method = make_method(load, objective)
    change(method)
    start = make_method(load, objective)
    codec = method.loaded.codec
    ratios = (sums_of(method, batch) - sums_of(start, batch)).tolist()
    mismatched = []
    for b in range(len(batch)):
        other = batch.encoded[(b + 2) % len(batch)]
        assert count == 1 or batch.row_ids[b] != batch.row_ids[(b + 2) % len(batch)]
        row = codec.collate([codec.with_answer(batch.encoded[b], other.targets)])
        mismatched.append(float(sums_of(method, row) - sums_of(start, row)))
    z = max(0.0, mean(mismatched)) if count > 1 else 0.0
    expected = []
    for b, ratio in enumerate(ratios):
        if b % 2 == 0:
            expected.append(1.2 * (1 - sigmoid(0.5 * (ratio - z))))
        else:
            expected.append(0.8 * (1 - sigmoid(0.5 * (z - ratio))))
    outcome = objective(method.lm(), batch)
    assert float(outcome.loss) == pytest.approx(mean(expected), rel=1e-4)
    assert float(outcome.logs["kl"]) == pytest.approx(z, abs=1e-4)


def test_kto_estimates_the_divergence_over_all_processes(load, tiny_folder, monkeypatch):
    batch = first_batch(make_preferences(tiny_folder("llama"), train=PAIRS[:3], batch_size=3))
    objective = KTO(beta=0.5)
    method = make_method(load, objective)
    change(method)
    local = float(objective.begin(method.lm(), batch).divergence[0])
    assert local == float(objective(method.lm(), batch).logs["kl"])
    others = torch.tensor([30.0, 4.0])  # the sum and number of log-ratios of another process
    monkeypatch.setattr(kto, "sum_over_processes", lambda value, backbone: value + others)
    judged = objective.begin(method.lm(), batch)
    assert float(judged.divergence[0]) == pytest.approx((local * 6 + 30) / 10, rel=1e-5)
    values = method.step(judged.only([2, 3]))
    assert float(values["kl"]) == float(judged.divergence[0])
    single = objective.begin(method.lm(), batch.only([0, 1]))
    assert float(single.divergence[0]) == 7.5


def test_log_odds_are_exact_for_small_and_large_probabilities():
    p = torch.tensor([1e-6, 0.3, 0.5, 0.9, 1 - 1e-6], dtype=torch.float64)
    torch.testing.assert_close(losses.log_odds(p.log()), (p / (1 - p)).log(), rtol=1e-9, atol=1e-12)
    means = torch.tensor([0.0, -1e-9, -90.0], requires_grad=True)
    losses.log_odds(means).sum().backward()
    assert means.grad.isfinite().all()


# --- log-probabilities and references


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bart"])
def test_log_probabilities_do_not_depend_on_other_rows_or_padding(load, tiny_folder, family):
    right, left = (first_batch(make_preferences(tiny_folder(family), padding_side=side)) for side in ("right", "left"))
    method = make_method(load, DPO(), family=family)
    together = sums_of(method, right)
    torch.testing.assert_close(sums_of(method, left), together, rtol=0, atol=1e-4)
    alone = torch.cat([sums_of(method, method.loaded.codec.collate([row])) for row in right.encoded])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-4)
    is_target = right.targets != IGNORE
    tokens = right.targets.where(is_target, 0)[..., None]
    logprobs = method(right).log_softmax(-1).gather(-1, tokens)[..., 0]
    torch.testing.assert_close((logprobs * is_target).sum(1), together, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_the_start_remains_the_reference(load, batch, name):
    method, start = (make_method(load, DPO(), name) for _ in range(2))
    change(method)
    torch.testing.assert_close(method.objective.reference_logprobs(method.lm(), batch).sum(1), sums_of(start, batch))
    with method.lm().at_start() as (lm, _):
        assert lm.logprobs(batch).grad_fn is None
    assert not torch.equal(sums_of(method, batch), sums_of(start, batch))  # the trained values are back
    assert method.training


def save_prompt(method, path):
    tensors = {name: p.detach() for name, p in method.state_dict().items()}
    write_prompt(path, SavedPrompt(tensors, backbone_identity(method.loaded), dict(method.hparams)))
    return path


def test_a_saved_prompt_and_the_bare_backbone_are_references(load, batch, tmp_path):
    trained = make_method(load, DPO())
    change(trained)
    path = save_prompt(trained, tmp_path / "prompt.safetensors")
    for reference, expected in (
        (str(path), sums_of(trained, batch)),
        ("bare", -load("llama").cross_entropy(batch).sum(1)),
    ):
        method = make_method(load, DPO(reference=reference))
        torch.testing.assert_close(method.objective.reference_logprobs(method.lm(), batch).sum(1), expected)


def test_cached_log_probabilities_are_those_that_would_be_computed(load, batch, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    passes = []

    def count(objective, rows=batch):
        method = make_method(load, objective)
        run = method.loaded.states
        monkeypatch.setattr(method.loaded, "states", lambda *args: (passes.append(1), run(*args))[1])
        change(method)
        return objective, method, objective.reference_logprobs(method.lm(), rows)

    objective, method, first = count(DPO(disk=8))
    assert len(passes) == 4  # questions
    again = objective.reference_logprobs(method.lm(), batch)
    shuffled = batch.only([6, 7, 2, 3])
    of_part = objective.reference_logprobs(method.lm(), shuffled)
    assert len(passes) == 4
    assert torch.equal(again, first)
    assert torch.equal(of_part, first[[6, 7, 2, 3]])
    *_, read = count(DPO(disk=8))  # another run reads the file
    assert len(passes) == 4
    assert torch.equal(read, first)
    *_, computed = count(DPO(), shuffled)  # computed in another batch
    assert len(passes) == 6
    assert torch.equal(computed, first[[6, 7, 2, 3]])


def test_another_reference_has_other_entries(load, batch, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    results = []
    for seed in (2, 3):
        trained = make_method(load, DPO())
        change(trained, seed=seed)
        path = save_prompt(trained, tmp_path / "prompt.safetensors")
        method = make_method(load, DPO(reference=str(path), disk=8))
        results.append(method.objective.reference_logprobs(method.lm(), batch))
        torch.testing.assert_close(results[-1].sum(1), sums_of(trained, batch))
    assert not torch.equal(*results)


def test_evaluations_use_the_implicit_reward(load, batch):
    method = make_method(load, DPO(beta=0.5))
    change(method)
    lm = method.objective.with_reward(method.lm())
    start = make_method(load, DPO())
    torch.testing.assert_close(lm.answer_scores(batch), 0.5 * (sums_of(method, batch) - sums_of(start, batch)))
    for objective in (ORPO(), SimPO()):
        means = losses.token_means(method.lm().logprobs(batch), batch)
        scores = objective.with_reward(method.lm()).answer_scores(batch)
        assert torch.equal(scores.argsort(), means.argsort())


def test_a_policy_that_differs_from_its_reference_is_reported_once(load, batch, caplog):
    caplog.set_level(logging.INFO)
    method = make_method(load, DPO(reference="bare"))
    for _ in range(2):
        method.step(batch)
    assert caplog.text.count("The policy differs from its reference (bare) by") == 1
    make_method(load, DPO()).step(batch)
    assert caplog.text.count("The policy differs from its reference") == 1


# --- every objective with every kind of method


@pytest.mark.parametrize(("family", "name"), [*(("llama", name) for name in METHODS), ("t5", "PromptTuning")])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives_train_every_kind_of_method(load, tiny_folder, objective, name, family):
    """One step lowers the loss, and the parts of a batch that is too large give the same gradients."""
    batch = first_batch(make_preferences(tiny_folder(family)))
    method = make_method(load, OBJECTIVES[objective](), name, family)
    parameters = [p for p in method.parameters() if p.requires_grad]
    loss = method.step(batch)["loss"]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    with use_microbatches(method.loaded, 3):
        in_parts = torch.autograd.grad(method.step(batch)["loss"], parameters, allow_unused=True)
    for gradient, of_parts in zip(gradients, in_parts, strict=True):
        torch.testing.assert_close(gradient, of_parts, rtol=1e-3, atol=1e-4)
    norm = torch.stack([g.norm() for g in gradients if g is not None]).norm()
    assert norm > 0
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.data -= 0 if gradient is None else 1e-2 * gradient / norm
    assert method.step(batch)["loss"] < loss


def test_head_and_reward_of_the_objective_do_not_mix(load, batch):
    """A readout that scores answers does not replace the implicit reward."""
    method = make_method(load, DPO(), readout=RewardHead)
    lm = method.objective.with_reward(method.lm())
    assert lm.answer_scores(batch).abs().max() < 1e-4


# --- bad input


@pytest.mark.parametrize("objective", REFERENCED)
def test_noise_on_the_policy_alone_is_refused(load, objective):
    with pytest.raises(
        ValueError, match=f"{objective} compares the policy with a reference without noise; set prompt_dropout to 0"
    ):
        make_method(load, REFERENCED[objective](), prompt_dropout=0.1)
    with pytest.raises(ValueError, match="set embedding_noise to 0"):
        make_method(load, REFERENCED[objective](), embedding_noise=5)
    make_method(load, SimPO(), prompt_dropout=0.1)


def test_references_that_cannot_be_used_are_refused(load, batch, tmp_path):
    with pytest.raises(
        ValueError, match="must be start, bare, or the file of a trained prompt, and there is no file no"
    ):
        make_method(load, DPO(reference="no.safetensors"))
    with pytest.raises(ValueError, match="LoRA changes the backbone, which the reference bare of DPO would share"):
        make_method(load, DPO(reference="bare"), "LoRA")
    other = PromptTuning(length=2)
    other.attach(load("llama", seed=5), seed=1)
    path = save_prompt(other, tmp_path / "other.safetensors")
    method = make_method(load, DPO(reference=str(path)))
    with pytest.raises(ValueError, match=r"other\.safetensors"):
        method.step(batch)
    forgotten = PromptTuning(length=2, objective=DPO())
    forgotten.attach(load("llama"), seed=1)
    with pytest.raises(ValueError, match="compares with the start of the run, which only checkpoints contain"):
        forgotten.step(batch)
    with pytest.raises(ValueError, match="the start of the run is known for a method only"):
        DPO()(PromptedLM(load("llama"), empty_prompt), batch)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_rows_without_preferences_are_refused(load, batch, objective):
    batch.groups = batch.grades = None
    with pytest.raises(ValueError, match="use PreferenceDataModule"):
        make_method(load, OBJECTIVES[objective]()).step(batch)


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (DPO, {"beta": 0}, "beta must be a finite number above 0, got 0"),
        (DPO, {"label_smoothing": 0.5}, "label_smoothing must be at least 0 and below"),
        (DPO, {"robust": True}, "robust requires label_smoothing"),
        (KTO, {"desirable": -1}, "desirable must be a finite number above 0"),
        (ORPO, {"weight": 0}, "weight must be a finite number above 0"),
        (SimPO, {"gamma_ratio": -1}, "gamma_ratio must be at least 0"),
    ],
)
def test_arguments_out_of_range_are_refused(cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        cls(**arguments)
