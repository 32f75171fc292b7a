"""Batches that several tasks share."""

from collections import Counter
from itertools import combinations

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
from lightning_softprompt.data.sampling.shared_batches import SharedBatches, SharedBatchSampler

SIZES = (23, 7, 40, 11)
STARTS = np.cumsum((0, *SIZES))
LENGTHS = [np.random.default_rng(task).integers(1, 30, size).tolist() for task, size in enumerate(SIZES)]


def make_sampler(rows=12, tasks=None, rates=SIZES, count=None, seed=0, rank=0, world_size=1):
    task_samplers = [BucketBatchSampler(lengths, 4, order="shuffled", seed=n) for n, lengths in enumerate(LENGTHS)]
    return SharedBatchSampler(task_samplers, SharedBatches(rows, tasks), rates, count, seed, (rank, world_size))


def task_of(row):
    return int(np.searchsorted(STARTS, row, side="right")) - 1


def rows_per_task(batch):
    return Counter(map(task_of, batch))


@pytest.mark.parametrize("tasks", [1, 3, 4, None])
def test_the_requested_number_of_tasks_shares_a_batch_evenly(tasks):
    batches = flatten(batches_in_epoch(make_sampler(rows=13, tasks=tasks), epoch) for epoch in range(20))
    assert {len(batch) for batch in batches} == {13}
    counts = [rows_per_task(batch) for batch in batches]
    assert all(max(count.values()) - min(count.values()) <= 1 for count in counts)
    num_tasks = Counter(len(count) for count in counts)
    if tasks is not None:
        assert set(num_tasks) == {tasks}
    else:
        assert set(num_tasks) == {2, 3, 4}
        assert min(num_tasks.values()) > 0.7 * len(batches) / 3


def test_the_tasks_of_a_batch_are_drawn_by_their_rates_without_replacement():
    rates = (8.0, 4.0, 2.0, 1.0)
    sampler = make_sampler(tasks=2, rates=rates, count=500)
    is_drawn = np.concatenate([sampler.shares(epoch) > 0 for epoch in range(40)])
    pairs = Counter(tuple(np.flatnonzero(tasks)) for tasks in is_drawn)
    total = sum(rates)
    for a, b in combinations(range(4), 2):
        a_before_b = rates[a] / total * rates[b] / (total - rates[a])
        b_before_a = rates[b] / total * rates[a] / (total - rates[b])
        assert pairs[a, b] / len(is_drawn) == pytest.approx(a_before_b + b_before_a, abs=0.01)


def test_a_row_repeats_only_after_all_other_rows_of_its_task():
    sampler = make_sampler()
    rows = flatten(flatten(batches_in_epoch(sampler, epoch) for epoch in range(12)))
    for task, size in enumerate(SIZES):
        check_rows_repeat_only_after_all_others([row for row in rows if task_of(row) == task], size)


def test_the_order_depends_on_seed_and_epoch_only():
    check_order_depends_on_seed_and_epoch_only(make_sampler)


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("num_batches", [0, 1, 5, 6])
def test_an_epoch_of_seven_batches_is_resumed_after_the_last_one_used(epoch, num_batches):
    assert len(make_sampler()) == 7
    check_resumes(make_sampler, epoch, num_batches)


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (make_sampler(tasks=2), "tasks of a batch was None and is 2"),
        (make_sampler(rows=8), "rows of a batch"),
        (make_sampler(seed=3), "seed was 0 and is 3"),
        (make_sampler(rates=(1, 1, 1, 1)), "rates"),
        (make_sampler(count=3), "batches per epoch was 7 and is 3"),
    ],
)
def test_the_state_of_a_sampler_with_another_order_is_rejected(sampler, message):
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict(make_sampler().state_dict())


def test_processes_share_the_rows_of_each_task_in_the_batches_of_one_process():
    single = make_sampler(rows=12)
    ranks = [make_sampler(rows=4, rank=rank, world_size=3) for rank in range(3)]
    batches_by_rank = [batches_in_epoch(sampler, 1) for sampler in ranks]
    for batch, *parts in zip(batches_in_epoch(single, 1), *batches_by_rank, strict=True):
        assert sorted(flatten(parts)) == sorted(batch)
        assert {len(part) for part in parts} == {4}
        for task in rows_per_task(batch):
            counts = [rows_per_task(part)[task] for part in parts]
            assert min(counts) > 0
            assert max(counts) - min(counts) <= 1
    ranks[0].load_state_dict(single.state_dict())


def test_too_small_batches_and_too_many_tasks_are_rejected():
    with pytest.raises(ValueError, match="a batch of 3 rows cannot have one of each of 4 tasks"):
        make_sampler(rows=3)
    with pytest.raises(ValueError, match=r"together\.tasks is 5, but there are only 4 tasks"):
        make_sampler(tasks=5)
    with pytest.raises(ValueError, match="at least 1, got 0 and None"):
        SharedBatches(0)
