"""Learning-rate schedules: equal to those of transformers, and their errors."""

import math

import pytest
import torch
from torch.optim import SGD
from transformers.optimization import get_scheduler

from lightning_softprompt.methods.optimizers import OptimizerFactory
from lightning_softprompt.methods.schedules import WarmupSchedule, make_warmup_schedule

STEPS = 20


def parameter():
    return torch.nn.Parameter(torch.zeros(1))


def rates(schedule, optimizer, steps):
    """Returns the learning rate of each step."""
    used = []
    for _ in range(steps):
        used.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return used


@pytest.mark.parametrize(
    ("decay", "warmup", "name", "warmup_steps"),
    [
        ("linear", 0, "linear", 0),
        ("linear", 0.25, "linear", 5),
        ("cosine", 0, "cosine", 0),
        ("cosine", 4, "cosine", 4),
        ("constant", 4, "constant_with_warmup", 4),
        ("constant", 0.1, "constant_with_warmup", 2),
    ],
)
def test_rates_equal_those_of_transformers(decay, warmup, name, warmup_steps):
    optimizer, expected_optimizer = SGD([parameter()], lr=0.3), SGD([parameter()], lr=0.3)
    schedule = WarmupSchedule(decay, warmup).build(optimizer, STEPS)
    expected = get_scheduler(name, expected_optimizer, warmup_steps, STEPS)
    assert rates(schedule, optimizer, STEPS) == pytest.approx(rates(expected, expected_optimizer, STEPS), abs=1e-12)


def test_a_constant_rate_without_warmup_needs_no_schedule():
    assert make_warmup_schedule("constant", 0) is None


@pytest.mark.parametrize("steps", [None, math.inf])
@pytest.mark.parametrize(("decay", "warmup"), [("linear", 0), ("cosine", 3), ("constant", 0.1)])
def test_a_schedule_over_the_training_requires_its_length(decay, warmup, steps):
    with pytest.raises(ValueError, match=r"set --trainer\.max_steps"):
        WarmupSchedule(decay, warmup).build(SGD([parameter()], lr=1.0), steps)


def test_warmup_steps_with_a_constant_rate_work_without_a_length():
    optimizer = SGD([parameter()], lr=1.0)
    schedule = WarmupSchedule("constant", 2).build(optimizer, math.inf)
    assert rates(schedule, optimizer, 4) == [0.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("warmup", [-0.1, 1.5, math.nan, math.inf])
def test_warmup_is_a_share_or_a_whole_number_of_steps(warmup):
    with pytest.raises(ValueError, match="warmup must be a whole number of steps"):
        WarmupSchedule("linear", warmup)


def test_warmup_that_takes_the_whole_training_is_an_error():
    with pytest.raises(ValueError, match="warmup takes 20 steps, but the training has 20"):
        WarmupSchedule("linear", 20).build(SGD([parameter()], lr=1.0), STEPS)


def test_the_rate_applies_to_groups_without_one():
    factory = OptimizerFactory(SGD, lr=0.3)
    optimizer = factory.build([{"params": [parameter()]}, {"params": [parameter()], "lr": 0.1}], steps=None)
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.1]
