"""Batches of one task each: how often each task is used, and in which order."""

from collections import Counter

import numpy as np
import pytest
from batch_samplers import (
    batches_in_epoch,
    check_order_depends_on_seed_and_epoch_only,
    check_resumes,
    check_rows_repeat_only_after_all_others,
    flatten,
)

from lightning_softprompt.data.sampling.bucketing import BucketBatchSampler
from lightning_softprompt.data.sampling.task_mixing import (
    FixedRates,
    MixedBatchSampler,
    Proportional,
    Temperature,
    UniformTasks,
    quotas,
)

SIZES = {"small": 10, "large": 1000, "middle": 100}


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Proportional(), [10, 1000, 100]),
        (Proportional(limit=50), [10, 50, 50]),
        (Temperature(1.0), [10, 1000, 100]),
        (Temperature(2.0), [10**0.5, 1000**0.5, 10]),
        (Temperature(2.0, limit=64), [10**0.5, 8, 8]),
        (UniformTasks(), [1, 1, 1]),
        (FixedRates({"large": 3, "small": 1, "middle": 2}), [1, 3, 2]),
    ],
)
def test_each_sampling_gives_its_rates_of_tasks(sampling, expected):
    assert sampling.rates(SIZES) == pytest.approx(expected)


def test_invalid_rates_are_rejected():
    with pytest.raises(ValueError, match="must name the tasks"):
        FixedRates({"large": 1}).rates(SIZES)
    with pytest.raises(ValueError, match="must be above 0"):
        FixedRates({"large": 0})
    with pytest.raises(ValueError, match="must be above 0"):
        Temperature(0)


def test_quotas_are_at_least_one_and_the_rounded_shares_of_a_total():
    generator = np.random.default_rng(0)
    for _ in range(300):
        num_tasks = int(generator.integers(1, 7))
        weights = generator.exponential(size=num_tasks) ** 3
        total = int(generator.integers(num_tasks, 50))
        counts = quotas(total, weights)
        assert sum(counts) == total
        assert min(counts) >= 1
        exact = weights / weights.sum() * total
        if exact.min() >= 1:
            assert np.abs(counts - exact).max() < 1


def test_fewer_batches_than_tasks_are_rejected():
    with pytest.raises(ValueError, match="an epoch of 2 batches cannot have one of each of 3 tasks"):
        quotas(2, [1, 1, 1])


TASK_SIZES = (23, 7, 40)
STARTS = np.cumsum((0, *TASK_SIZES))
LENGTHS = [np.random.default_rng(task).integers(1, 30, size).tolist() for task, size in enumerate(TASK_SIZES)]


def make_sampler(counts=(4, 3, 6), seed=0, rank=0, world_size=1, batch_size=4):
    task_samplers = []
    for task, lengths in enumerate(LENGTHS):
        ranks = {"rank": rank, "world_size": world_size}
        task_samplers.append(BucketBatchSampler(lengths, batch_size, order="shuffled", seed=task, **ranks))
    return MixedBatchSampler(task_samplers, counts, seed)


def make_evaluation_sampler():
    return MixedBatchSampler([BucketBatchSampler(lengths, 4, order="longest_first") for lengths in LENGTHS])


def task_of(batch):
    """Returns the task of a batch, which must be the same for all of its rows."""
    (task,) = set(np.searchsorted(STARTS, batch, side="right") - 1)
    return int(task)


def test_a_batch_has_one_task_and_each_task_its_number_of_batches():
    for epoch in range(3):
        batches = batches_in_epoch(make_sampler(), epoch)
        assert Counter(map(task_of, batches)) == {0: 4, 1: 3, 2: 6}


def test_a_row_repeats_only_after_all_other_rows_of_its_task():
    sampler = make_sampler()
    batches = flatten(batches_in_epoch(sampler, epoch) for epoch in range(12))
    for task, size in enumerate(TASK_SIZES):
        rows = flatten(batch for batch in batches if task_of(batch) == task)
        check_rows_repeat_only_after_all_others(rows, size)


def test_the_order_of_rows_depends_on_seed_and_epoch_only():
    check_order_depends_on_seed_and_epoch_only(make_sampler)


def test_the_order_of_tasks_differs_between_seeds_and_epochs():
    sampler = make_sampler(seed=1)
    first, second = [list(map(task_of, batches_in_epoch(sampler, epoch))) for epoch in range(2)]
    other_seed = list(map(task_of, batches_in_epoch(make_sampler(seed=2), 0)))
    assert first != second != other_seed


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("num_batches", [0, 1, 7, 12])
def test_an_epoch_of_thirteen_batches_is_resumed_after_the_last_one_used(epoch, num_batches):
    assert len(make_sampler()) == 13
    check_resumes(make_sampler, epoch, num_batches)


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (make_sampler(counts=(4, 3, 5)), "batches of each task"),
        (make_sampler(seed=3), "seed was 0 and is 3"),
        (make_sampler(batch_size=5), "tasks"),
    ],
)
def test_the_state_of_a_sampler_with_another_order_is_rejected(sampler, message):
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict(make_sampler().state_dict())


def test_processes_use_the_same_task_in_each_batch():
    single = make_sampler(batch_size=4)
    ranks = [make_sampler(rank=rank, world_size=2, batch_size=2) for rank in range(2)]
    orders = [batches_in_epoch(sampler, 1) for sampler in (single, *ranks)]
    assert {len(batches) for batches in orders} == {13}
    for batches in zip(*orders, strict=True):
        assert len(set(map(task_of, batches))) == 1


def test_without_counts_the_batches_of_each_task_follow_those_of_the_task_before():
    batches = list(make_evaluation_sampler())
    assert sorted(flatten(batches)) == list(range(70))
    assert list(map(task_of, batches)) == [0] * 6 + [1] * 2 + [2] * 10


@pytest.mark.parametrize(("num_batches", "tasks"), [(4, [0, 1, 2, 2]), (2, [0, 1])])
def test_a_limited_evaluation_has_a_batch_of_each_task_while_the_limit_permits_it(num_batches, tasks):
    sampler = make_evaluation_sampler()
    sampler.draw(num_batches)
    batches = list(sampler)[:num_batches]
    assert [task_of(batch) for batch in batches] == tasks
    drawn = [[STARTS[task] + row for row in rows] for task, rows in enumerate(sampler.drawn)]
    assert sorted(flatten(batches)) == sorted(flatten(drawn))
