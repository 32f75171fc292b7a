"""How often each task comes up, and that the order of batches can be gone on with."""

from collections import Counter
from itertools import accumulate

import numpy as np
import pytest

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
def test_rates_of_tasks(sampling, expected):
    assert sampling.rates(SIZES) == pytest.approx(expected)


def test_rates_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="must name the tasks"):
        FixedRates({"large": 1}).rates(SIZES)
    with pytest.raises(ValueError, match="must be above 0"):
        FixedRates({"large": 0})
    with pytest.raises(ValueError, match="must be above 0"):
        Temperature(0)


def test_quotas_are_whole_add_up_and_leave_nobody_out():
    draw = np.random.default_rng(0)
    for _ in range(300):
        weights = draw.exponential(size=draw.integers(1, 7)) ** 3
        total = int(draw.integers(len(weights), 50))
        counts = quotas(total, weights)
        assert sum(counts) == total
        assert min(counts) >= 1
        exact = weights / weights.sum() * total
        if exact.min() >= 1:
            assert np.abs(counts - exact).max() < 1
    with pytest.raises(ValueError, match="an epoch of 2 batches cannot have one of each of 3 tasks"):
        quotas(2, [1, 1, 1])


LENGTHS = [np.random.default_rng(n).integers(1, 30, rows).tolist() for n, rows in enumerate((23, 7, 40))]


def made(counts=(4, 3, 6), seed=0, rank=0, world=1, batch=4):
    own = [
        BucketBatchSampler(lengths, batch, order="shuffled", seed=n, rank=rank, world_size=world)
        for n, lengths in enumerate(LENGTHS)
    ]
    return MixedBatchSampler(own, counts, seed)


def epoch_of(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


def task_of(row):
    return 0 if row < 23 else 1 if row < 30 else 2


def test_a_batch_is_of_one_task_and_each_task_has_its_number_of_them():
    for epoch in range(3):
        batches = epoch_of(made(), epoch)
        tasks = [{task_of(row) for row in batch} for batch in batches]
        assert all(len(of) == 1 for of in tasks)
        assert Counter(of.pop() for of in tasks) == {0: 4, 1: 3, 2: 6}


def test_no_row_comes_again_before_all_others_of_its_task_have():
    sampler = made()
    drawn = {task: [] for task in range(3)}
    for epoch in range(12):
        for batch in epoch_of(sampler, epoch):
            drawn[task_of(batch[0])] += batch
    for task, rows in drawn.items():
        own = len(LENGTHS[task])
        for start in range(0, len(rows) - own, own):
            assert len(set(rows[start : start + own])) == own, task


def test_the_order_is_a_function_of_seed_and_epoch_alone():
    used = made(seed=1)
    orders = [epoch_of(used, 0), epoch_of(used, 1), epoch_of(made(seed=2), 0)]
    assert all(a != b for n, a in enumerate(orders) for b in orders[:n])
    assert epoch_of(used, 0) == orders[0] == epoch_of(made(seed=1), 0)
    assert epoch_of(made(seed=1), 1) == orders[1]
    turns = [[task_of(batch[0]) for batch in order] for order in orders]
    assert turns[0] != turns[1] != turns[2]


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("done", [0, 1, 7, 12])
def test_it_goes_on_where_it_was_left(epoch, done):
    whole = epoch_of(made(), epoch)
    left = made()
    left.set_epoch(epoch)
    passing = iter(left)
    for _ in range(done):
        next(passing)
        left.count()
    resumed = made()
    resumed.load_state_dict(left.state_dict())
    assert list(resumed) == whole[done:]


@pytest.mark.parametrize(
    ("other", "named"),
    [(made(counts=(4, 3, 5)), "batches of each task"), (made(seed=3), "seed was 0 and is 3"), (made(batch=5), "tasks")],
)
def test_another_order_is_not_gone_on_with(other, named):
    with pytest.raises(ValueError, match=named):
        other.load_state_dict(made().state_dict())


def test_processes_share_each_batch_and_take_the_same_turns():
    alone = made(batch=4)
    shares = [made(rank=rank, world=2, batch=2) for rank in range(2)]
    for sampler in (alone, *shares):
        assert len(sampler) == 13
    for batch, *parts in zip(*(epoch_of(sampler, 1) for sampler in (alone, *shares)), strict=True):
        tasks = {task_of(row) for part in (batch, *parts) for row in part}
        assert len(tasks) == 1
    assert sum(len(part) for sampler in shares for part in epoch_of(sampler, 0)) > 0


def test_without_counts_each_task_has_all_it_has_task_after_task():
    own = [BucketBatchSampler(lengths, 4, order="longest_first") for lengths in LENGTHS]
    batches = list(MixedBatchSampler(own))
    assert sorted(row for batch in batches for row in batch) == list(range(70))
    assert [task_of(batch[0]) for batch in batches] == [0] * 6 + [1] * 2 + [2] * 10


@pytest.mark.parametrize(("batches", "turns"), [(4, [0, 1, 2, 2]), (2, [0, 1])])
def test_a_limited_evaluation_scores_rows_of_each_task_while_there_are_as_many_batches(batches, turns):
    own = [BucketBatchSampler(lengths, 4, order="longest_first") for lengths in LENGTHS]
    sampler = MixedBatchSampler(own)
    sampler.draw(batches)
    passed = list(sampler)[:batches]
    assert [task_of(batch[0]) for batch in passed] == turns
    offsets = [0, *accumulate(map(len, LENGTHS))]
    rows = sorted(offsets[task] + row for task, drawn in enumerate(sampler.drawn) for row in drawn)
    assert sorted(row for batch in passed for row in batch) == rows
