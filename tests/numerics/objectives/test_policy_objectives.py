"""GRPO and RLOO: equations as loops, identities of sampled answers, references, and a reward that increases."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from policies import FirstTokens, change, make_method, make_questions
from preferences import first_batch
from torch.testing import assert_close

from lightning_softprompt.backbones.generation.answers import answer_texts, are_finished, generate_answers
from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.core.types import IGNORE
from lightning_softprompt.inference.prompt import save_prompt
from lightning_softprompt.methods import DePT, LoRA, PrefixTuning, PromptTuning
from lightning_softprompt.methods.optimizers import trainable_parameters
from lightning_softprompt.objectives.policy.grpo import GRPO
from lightning_softprompt.objectives.policy.ppo import PPO
from lightning_softprompt.objectives.policy.rloo import RLOO
from lightning_softprompt.readouts.value_head import ValueHead
from lightning_softprompt.rewards.base import Reward
from lightning_softprompt.rewards.learned import Learned
from lightning_softprompt.rewards.length import Length

METHODS = {
    "PromptTuning": (PromptTuning, {"length": 3}),
    "PrefixTuning": (PrefixTuning, {"length": 2}),
    "DePT": (DePT, {"length": 3, "rank": 2, "max_tokens": 48}),
    "LoRA": (LoRA, {"rank": 2}),
}
OBJECTIVES = {"GRPO": GRPO, "RLOO": RLOO}
COMMON = {"reward": Length(4), "answers": 4, "max_new_tokens": 6}


@dataclass(frozen=True)
class Constant(Reward):
    """The same reward for every answer."""

    def __call__(self, lm, batch):
        return self.tensor([0.3] * len(batch), batch)


@pytest.fixture
def questions(tiny_folder):
    return first_batch(make_questions(tiny_folder("llama")))


def gradients_of(method, loss):
    names, parameters = zip(*trainable_parameters(method).items(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    return dict(zip(names, gradients, strict=True))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("name", METHODS)
def test_methods_train_with_each_objective(load, tiny_folder, family, name, objective):
    cls, arguments = METHODS[name]
    method = make_method(cls, load(family), OBJECTIVES[objective](**COMMON, kl=0.1), **arguments)
    change(method)
    values = method.step(first_batch(make_questions(tiny_folder(family))))
    assert {"reward", "reward_std", "kl", "kl_k3", "answer_tokens", "finished_share"} < set(values)
    gradients = gradients_of(method, values["loss"])
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) > 1e-6


def sample(objective, method, questions, seed=0):
    torch.manual_seed(seed)
    return objective.begin(method.lm(), questions)


def test_answers_are_the_sampled_tokens_and_end_with_eos(load, questions):
    objective = GRPO(**COMMON)
    method = make_method(PromptTuning, load("llama"), objective, length=3)
    sampled = sample(objective, method, questions)
    codec = method.loaded.codec
    assert sampled.groups.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert sampled.units() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    finished = are_finished(method.lm(), sampled)
    lengths = sampled.answer_mask.sum(1)
    assert 0 < finished.sum() < 12
    for row, is_finished, length in zip(sampled.targets.tolist(), finished.tolist(), lengths.tolist(), strict=True):
        tokens = [token for token in row if token != IGNORE]
        assert len(tokens) == length
        assert (tokens[-1] in codec.stop) == is_finished
        assert not set(tokens[:-1]) & set(codec.stop)
        assert is_finished or length == 6
    again, other = sample(objective, method, questions), sample(objective, method, questions, seed=1)
    assert torch.equal(again.targets, sampled.targets)
    assert not torch.equal(other.input_ids, sampled.input_ids)


def test_losses_of_grpo_are_those_of_a_loop(load, questions):
    objective = GRPO(**COMMON, kl=0.2, average="rows", reference="bare")
    method = make_method(PromptTuning, load("llama"), objective, length=3)
    sampled = sample(objective, method, questions)
    loss = objective.learn(method.lm(), sampled).loss
    logprobs, bare = method.lm().logprobs(sampled), method.lm().logprobs(sampled, prompted=False)
    surrogate = 0.0  # has the gradient of the objective
    value = 0.0
    for b in range(12):
        group = sampled.rewards[4 * (b // 4) : 4 * (b // 4) + 4]
        advantage = (sampled.rewards[b] - group.mean()) / (group.std() + 1e-4)
        tokens = sampled.answer_mask[b].nonzero().flatten().tolist()
        for u in tokens:
            difference = (bare - logprobs)[b, u].detach()
            k3 = difference.exp() - 1 - difference
            weight = 1 / len(tokens) / 12
            value += weight * (-advantage + 0.2 * k3)
            # the gradient of ratio * k3 at ratio 1 is k3 times that of log p, plus that of k3, which is 1 - e^d
            surrogate += weight * (-advantage + 0.2 * (k3 + 1 - difference.exp())) * logprobs[b, u]
    assert_close(loss, value, atol=1e-6, rtol=1e-5)
    ours, expected = gradients_of(method, loss), gradients_of(method, surrogate)
    for name, gradient in ours.items():
        assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4)


def test_gradients_of_rloo_are_those_of_a_loop(load, questions):
    objective = RLOO(**COMMON, kl=0.2)
    method = make_method(PromptTuning, load("llama"), objective, length=3)
    change(method, 0.1)
    sampled = sample(objective, method, questions)
    with method.lm().at_start() as (lm, _):
        start = lm.logprobs(sampled).detach()
    loss = objective.learn(method.lm(), sampled).loss
    logprobs = method.lm().logprobs(sampled)
    rewards = [float((sampled.rewards[b] - 0.2 * (logprobs - start)[b].sum()).detach()) for b in range(12)]
    surrogate = value = 0.0
    for b in range(12):
        others = [rewards[other] for other in range(4 * (b // 4), 4 * (b // 4) + 4) if other != b]
        advantage = rewards[b] - sum(others) / 3
        value -= advantage / 12
        surrogate -= advantage * logprobs[b].sum() / 12
    assert float(loss.detach()) == pytest.approx(value, abs=1e-5)
    ours, by_loop = gradients_of(method, loss), gradients_of(method, surrogate)
    for name, gradient in ours.items():
        assert_close(gradient, by_loop[name], atol=1e-5, rtol=1e-4)
    assert float((logprobs - start).detach().abs().max()) > 0.01


@pytest.mark.parametrize("objective", OBJECTIVES.values())
def test_equal_rewards_have_no_gradient(load, questions, objective):
    method = make_method(PromptTuning, load("llama"), objective(**COMMON | {"reward": Constant()}), length=3)
    values = method.step(questions)
    assert float(values["equal_reward_share"]) == 1
    assert all(float(gradient.abs().max()) < 1e-7 for gradient in gradients_of(method, values["loss"]).values())


def test_rewards_are_equal_although_the_divergence_differs(load, questions):
    objective = RLOO(**COMMON | {"reward": Constant()}, kl=0.5)
    method = make_method(PromptTuning, load("llama"), objective, length=3)
    change(method)
    values = method.step(questions)
    assert float(values["equal_reward_share"]) == 1
    assert max(float(gradient.abs().max()) for gradient in gradients_of(method, values["loss"]).values()) > 1e-5


def test_the_end_of_an_answer_is_learned_although_padding_has_the_same_token(load, questions):
    backbone = load("llama")
    backbone.codec.pad_id = backbone.codec.stop[0]
    objective = GRPO(**COMMON)
    method = make_method(PromptTuning, backbone, objective, length=3)
    sampled = sample(objective, method, questions)
    finished = are_finished(method.lm(), sampled)
    assert 0 < int(finished.sum()) < 12
    for tokens, mask, is_finished in zip(sampled.targets, sampled.answer_mask, finished, strict=True):
        ends = torch.isin(tokens[mask], torch.tensor(backbone.codec.stop))
        assert int(ends.sum()) == int(ends[-1]) == int(is_finished)
    torch.manual_seed(0)
    other = make_method(PromptTuning, load("llama"), objective, length=3)
    assert_close(method.step(sampled)["loss"], other.step(sampled)["loss"], atol=1e-6, rtol=1e-5)


def test_greedy_answers_have_the_most_likely_tokens(load, questions):
    method = make_method(PromptTuning, load("llama"), GRPO(**COMMON), length=3)
    answered = generate_answers(method.lm(), questions, 1, Decoding(max_new_tokens=6))
    predicted = method.lm()(answered).argmax(-1)
    has_target = answered.targets != IGNORE
    assert torch.equal(predicted[has_target], answered.targets[has_target])


@pytest.mark.parametrize("average", ["tokens", "rows"])
def test_the_mean_over_processes_is_the_loss_of_all_answers(load, questions, average):
    objective = GRPO(**COMMON, average=average)
    method = make_method(PromptTuning, load("llama"), objective, length=3)
    whole = sample(objective, method, questions)
    halves = [whole.only([*range(4)]), whole.only([*range(4, 12)])]
    counts = [objective.count(half) for half in halves]
    scaled = [objective.learn(method.lm(), half).loss * 2 * count for half, count in zip(halves, counts, strict=True)]
    combined = sum(scaled) / sum(counts) / 2
    loss = objective.learn(method.lm(), whole).loss
    assert_close(combined, loss, atol=1e-6, rtol=1e-5)
    assert_close(gradients_of(method, combined), gradients_of(method, loss), atol=1e-6, rtol=1e-4)


def train(method, questions, steps, lr, name):
    """Trains a method and returns a logged value of each step."""
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(trainable_parameters(method).values(), lr=lr)
    logged = []
    for _ in range(steps):
        values = method.step(questions)
        logged.append(float(values[name]))
        optimizer.zero_grad()
        values["loss"].backward()
        optimizer.step()
    return logged


@pytest.mark.parametrize(
    ("objective", "readout"),
    [(GRPO, None), (RLOO, None), (partial(PPO, epochs=1), ValueHead)],
    ids=["GRPO", "RLOO", "PPO"],
)
def test_the_divergence_returns_the_policy_to_its_start(load, questions, objective, readout):
    objective = objective(reward=Constant(), answers=8, max_new_tokens=4, kl=1.0)
    method = make_method(PromptTuning, load("llama"), objective, length=3, readout=readout)
    change(method, 0.5)
    divergences = train(method, questions, 25, 0.05, "kl_k3")
    assert sum(divergences[-5:]) < 0.5 * sum(divergences[:5])


@pytest.mark.parametrize("objective", OBJECTIVES.values())
def test_the_reward_increases(load, questions, objective):
    method = make_method(PromptTuning, load("llama"), objective(FirstTokens(), 16, 1), length=3)
    rewards = train(method, questions, 30, 0.1, "reward")
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2


def test_errors(load, questions, tmp_path):
    for arguments in ({"answers": 1}, {"kl": -1.0}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(arguments))} of GRPO must be at least"):
            GRPO(**COMMON | arguments)
    method = make_method(PromptTuning, load("llama"), GRPO(**COMMON | {"reward": FirstTokens(float("nan"))}), length=3)
    with pytest.raises(ValueError, match="FirstTokens is not a finite number for the answer"):
        method.step(questions)
    with pytest.raises(ValueError, match="reference without noise; set prompt_dropout to 0"):
        make_method(PromptTuning, load("llama"), GRPO(**COMMON), prompt_dropout=0.1)
    missing = GRPO(**COMMON, kl=0.1, reference=str(tmp_path / "none.safetensors"))
    with pytest.raises(ValueError, match="there is no file"):
        make_method(PromptTuning, load("llama"), missing)
    path = save_prompt(make_method(PromptTuning, load("llama", seed=1), None, length=2), tmp_path / "other.safetensors")
    for arguments in ({"kl": 0.1, "reference": str(path)}, {"reward": Learned(str(path))}):
        method = make_method(PromptTuning, load("llama"), GRPO(**COMMON | arguments), length=3)
        with pytest.raises(ValueError, match="backbone"):
            method.step(questions)
    method = make_method(PromptTuning, load("llama"), GRPO(**COMMON), length=3)
    assert len(answer_texts(method.lm(), sample(GRPO(**COMMON), method, questions))) == 12
