"""PPO and objectives with several steps for a rollout: equations as loops, identities, clipping and early stop."""

from functools import partial

import pytest
import torch
from policies import FirstTokens, change, make_method, make_questions
from preferences import first_batch
from torch.testing import assert_close

from lightning_softprompt.methods import DePT, LoRA, PrefixTuning, PromptTuning
from lightning_softprompt.methods.optimizers import trainable_parameters
from lightning_softprompt.objectives.policy.grpo import GRPO
from lightning_softprompt.objectives.policy.ppo import PPO
from lightning_softprompt.objectives.policy.rloo import RLOO
from lightning_softprompt.readouts.value_head import ValueHead
from lightning_softprompt.rewards.length import Length

METHODS = {
    "PromptTuning": (PromptTuning, {"length": 3}),
    "PrefixTuning": (PrefixTuning, {"length": 2}),
    "DePT": (DePT, {"length": 3, "rank": 2, "max_tokens": 48}),
    "LoRA": (LoRA, {"rank": 2}),
}
COMMON = {"reward": Length(4), "max_new_tokens": 6, "answers": 2}


@pytest.fixture
def questions(tiny_folder):
    return first_batch(make_questions(tiny_folder("llama")))


def make_ppo(backbone, cls=PromptTuning, head=ValueHead, options=None, **arguments):
    """Returns a method with a changed prompt and value head, so that neither values nor divergences are 0."""
    method = make_method(cls, backbone, PPO(**COMMON | arguments), readout=head, **(options or {"length": 3}))
    change(method, 0.1)
    return method


def begin(method, questions, seed=0):
    torch.manual_seed(seed)
    return method.objective.begin(method.lm(), questions)


def gradients_of(method, loss):
    parameters = trainable_parameters(method)
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, gradients, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_methods_train_prompt_and_value_head(load, questions, name):
    cls, options = METHODS[name]
    method = make_ppo(load("llama"), cls, options=options)
    values = method.step(method.prepare_step(questions))
    gradients = gradients_of(method, values["loss"])
    assert {"readout.linear.weight", "readout.linear.bias"} < set(gradients)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients.values())


def test_loss_and_gradients_are_those_of_a_loop(load, questions):
    method = make_ppo(load("llama"), kl=0.3, value_clip=0.05)
    objective = method.objective
    experience = begin(method, questions)
    with method.lm().at_start() as (lm, _):
        reference = lm.logprobs(experience).detach()
    change(method, 0.05, seed=3)
    outcome = objective.learn(method.lm(), experience)
    lm = method.lm()
    logprobs, values = lm.logprobs(experience), lm.values(experience)
    old_values, old = experience.values, experience.old_logprobs
    advantages, returns = {}, {}
    for b in range(6):
        last = int(experience.answer_mask[b].sum()) - 1
        next_value = next_advantage = 0.0
        for u in reversed(range(last + 1)):
            reward = -0.3 * float(old[b, u] - reference[b, u])
            if u == last:
                reward += float(experience.rewards[b])
            delta = reward + next_value - float(old_values[b, u])
            next_advantage = delta + 0.95 * next_advantage
            next_value = float(old_values[b, u])
            advantages[b, u], returns[b, u] = next_advantage, next_advantage + next_value
    numbers = torch.tensor(list(advantages.values()))
    mean, deviation = float(numbers.mean()), float(numbers.std(unbiased=False))
    expected = 0.0
    for (b, u), advantage in advantages.items():
        whitened = (advantage - mean) / deviation
        ratio = (logprobs[b, u] - old[b, u]).exp()
        expected += torch.maximum(-ratio * whitened, -ratio.clamp(0.8, 1.2) * whitened)
        moved = old_values[b, u] + (values[b, u] - old_values[b, u]).clamp(-0.05, 0.05)
        errors = (values[b, u] - returns[b, u]) ** 2, (moved - returns[b, u]) ** 2
        expected += 0.1 * 0.5 * torch.maximum(*errors)
    expected = expected / len(advantages)
    assert 0 < float(outcome.logs["clip_share"]) < 1
    assert_close(outcome.loss, expected, atol=1e-5, rtol=1e-5)
    ours, by_loop = gradients_of(method, outcome.loss), gradients_of(method, expected)
    for name, gradient in ours.items():
        assert_close(gradient, by_loop[name], atol=1e-5, rtol=1e-4)


def test_the_first_step_has_ratio_1_and_the_gradient_of_reinforce(load, questions):
    method = make_ppo(load("llama"))
    experience = begin(method, questions)
    outcome = method.objective.learn(method.lm(), experience)
    mask, advantages = experience.answer_mask, experience.advantages
    assert float(outcome.logs["ratio_deviation"]) == float(outcome.logs["clip_share"]) == 0
    assert abs(float(outcome.logs["policy_loss"])) < 1e-6  # the mean of whitened advantages
    reinforce = -(advantages * method.lm().logprobs(experience)).sum() / mask.sum()
    ours, expected = gradients_of(method, outcome.loss), gradients_of(method, reinforce)
    assert_close(ours["tokens"], expected["tokens"], atol=1e-6, rtol=1e-5)


def test_values_equal_to_returns_have_no_loss(load, questions):
    method = make_ppo(load("llama"))
    experience = begin(method, questions)
    experience.returns = experience.values
    assert float(method.objective.learn(method.lm(), experience).logs["value_loss"]) == 0


def test_value_tokens_are_trained_apart_from_the_policy(load, questions):
    method = make_ppo(load("llama"), head=partial(ValueHead, own_tokens=2))
    experience = begin(method, questions)
    outcome = method.objective.learn(method.lm(), experience)
    lm = method.lm()
    value_loss = (lm.values(experience) * experience.answer_mask).sum()
    gradients = gradients_of(method, value_loss)
    assert gradients["tokens"] is None
    assert float(gradients["readout.tokens"].abs().max()) > 0
    assert float(gradients_of(method, outcome.loss)["readout.tokens"].abs().max()) > 0


def test_values_of_a_row_do_not_depend_on_other_rows(load, questions):
    method = make_ppo(load("llama"))
    experience = begin(method, questions)
    for b in range(len(experience)):
        alone = method.lm().values(experience.only([b]))
        mask = experience.answer_mask[b]
        assert_close(alone[0][mask], experience.values[b][mask], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("objective", [GRPO, RLOO])
def test_clipped_losses_after_a_step_are_those_of_a_loop(load, questions, objective):
    objective = objective(Length(4), 4, 6, epochs=2, clip_low=0.1, clip_high=0.15)
    method = make_method(PromptTuning, load("llama"), objective, length=3)
    experience = begin(method, questions)
    change(method, 0.03)
    outcome = objective.learn(method.lm(), experience)
    differences = (method.lm().logprobs(experience) - experience.old_logprobs) * experience.answer_mask
    losses = []
    for b in range(12):
        advantage = float(experience.advantages[b, 0])
        tokens = differences[b][experience.answer_mask[b]]
        for difference in tokens if isinstance(objective, GRPO) else [tokens.sum()]:
            ratio = difference.exp()
            losses.append(-torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.15) * advantage))
    expected = torch.stack(losses).mean()
    assert 0 < float(outcome.logs["clip_share"]) < 1
    assert_close(outcome.loss, expected, atol=1e-6, rtol=1e-5)
    assert_close(gradients_of(method, outcome.loss), gradients_of(method, expected), atol=1e-6, rtol=1e-4)


def test_a_temperature_applies_to_sampling_and_all_log_probabilities(load, questions):
    objective = RLOO(Length(4), 4, 6, temperature=0.7, epochs=2, kl=0.1)
    method = make_method(PromptTuning, load("llama"), objective, length=3)
    experience = begin(method, questions)
    outcome = objective.learn(method.lm(), experience)
    assert float(outcome.logs["kl"]) == float(outcome.logs["ratio_deviation"]) == 0  # the policy is its reference
    log_p = (method.lm()(experience) / 0.7).log_softmax(-1)
    targets = experience.targets.clamp(min=0)
    expected = log_p.gather(2, targets[..., None]).squeeze(2)
    mask = experience.answer_mask
    assert_close(experience.old_logprobs[mask], expected[mask])
    entropy = -(log_p.exp() * log_p).sum(-1)[mask].mean()
    assert_close(outcome.logs["entropy"], entropy, check_dtype=False)


def test_unfinished_answers_that_are_left_out_change_neither_sum_nor_count(load, questions):
    whole = GRPO(Length(4), 4, 3)
    method = make_method(PromptTuning, load("llama"), whole, length=3)
    experience = begin(method, questions)
    finished = experience.answer_mask.sum(1) < 3
    assert 0 < int(finished.sum()) < 12
    left_out = GRPO(Length(4), 4, 3, learn_unfinished=False)
    part = begin(make_method(PromptTuning, load("llama"), left_out, length=3), questions)
    mask = part.answer_mask.any(1)
    assert bool((mask >= finished).all())
    logprobs = method.lm().logprobs(experience)
    expected = -(part.advantages[mask].detach() * (logprobs - logprobs.detach()).exp()[mask])
    expected = expected.sum() / part.answer_mask.sum()
    assert_close(left_out.learn(method.lm(), part).loss, expected, atol=1e-6, rtol=1e-5)
    assert left_out.count(part) == part.answer_mask.sum() < whole.count(experience)
    assert float(method.step(part)["answer_tokens"]) == float(method.step(experience)["answer_tokens"])


def test_minibatches_are_whole_questions_in_an_order_of_seed_rollout_and_epoch(load, tiny_folder):
    rows = [{"prompt": f"the story {word}"} for word in ("is", "was", "ends", "never")]
    questions = first_batch(make_questions(tiny_folder("llama"), rows, batch_size=4))
    objective = GRPO(FirstTokens(), 3, 4, epochs=3, minibatches=2)
    method = make_method(PromptTuning, load("llama"), objective, length=3)
    experience = begin(method, questions)
    orders = []
    for number in range(2):
        parts = [objective.select(experience, number, turn) for turn in range(6)]
        for first, second in zip(parts[::2], parts[1::2], strict=True):
            assert sorted([*first.groups.tolist(), *second.groups.tolist()]) == experience.groups.tolist()
            assert [len(unit) for unit in first.units()] == [3, 3]
        orders.append([part.groups.tolist() for part in parts])
    assert orders[0] != orders[1]
    assert [objective.select(experience, 1, turn).groups.tolist() for turn in range(6)] == orders[1]
    single = begin(method, questions.only([2]))
    assert [len(objective.select(single, 0, turn)) for turn in range(2)] == [3, 3]


def test_the_batches_of_a_rollout_must_be_the_same(load, questions):
    method = make_method(PromptTuning, load("llama"), GRPO(FirstTokens(), 2, 3, epochs=2), length=3)
    first = method.prepare_step(questions)
    assert method.prepare_step(questions) is first
    assert method.prepare_step(questions.only([0, 1])) is not first
    with pytest.raises(ValueError, match="in 2 steps, but the loader returned another batch"):
        method.prepare_step(questions)


def test_the_weight_of_the_divergence_is_adapted_and_restored(load, questions):
    objective = RLOO(Length(4), 4, 6, kl=0.1, kl_target=0.5, kl_horizon=100)
    method = make_method(PromptTuning, load("llama"), objective, length=3)
    begin(method, questions)
    assert objective.kl_weight == pytest.approx(0.1 * (1 - 0.2 * 12 / 100))  # no divergence yet
    change(method, 1.0)
    before = objective.kl_weight
    begin(method, questions)
    assert objective.kl_weight == pytest.approx(before * (1 + 0.2 * 12 / 100))
    other = RLOO(Length(4), 4, 6, kl=0.1, kl_target=0.5)
    other.load_state(objective.state())
    assert other.kl_weight == objective.kl_weight


def test_normalized_rewards_have_moments_of_all_answers_so_far(load, questions):
    method = make_ppo(load("llama"), normalize_rewards=True, kl=0.0)
    first, second = begin(method, questions, 0), begin(method, questions, 1)
    rewards = torch.cat([first.rewards, second.rewards])
    last = second.answer_mask.sum(1) - 1
    scaled = (second.rewards - rewards.mean()) / rewards.std(unbiased=False)
    returns = second.returns.gather(1, last[:, None]).squeeze(1)
    assert_close(returns, scaled, atol=1e-5, rtol=1e-5)
    other = PPO(**COMMON, normalize_rewards=True)
    other.load_state(method.objective.state())
    assert other.state() == method.objective.state()


def test_errors(load):
    with pytest.raises(ValueError, match=r"PPO requires a value of each token; set --model.readout to ValueHead"):
        make_method(PromptTuning, load("llama"), PPO(**COMMON), length=3)
    zeros = dict.fromkeys(("clip", "value_clip", "value_weight", "temperature", "epochs", "max_kl"), 0)
    arguments = {**zeros, "discount": 2, "decay": -1}
    for name, value in arguments.items():
        with pytest.raises(ValueError, match=f"{name} of PPO must be"):
            PPO(**COMMON, **{name: value})
    with pytest.raises(ValueError, match="kl_target adapts the weight kl"):
        GRPO(**COMMON, kl_target=1.0)
    with pytest.raises(ValueError, match="own_tokens must be at least 0"):
        make_ppo(load("llama"), head=partial(ValueHead, own_tokens=-1))
