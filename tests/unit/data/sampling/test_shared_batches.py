"""Batches that several tasks share: how many rows of each, and that their order can be gone on with."""

from collections import Counter

import numpy as np
import pytest

from lightning_softprompt.data.sampling.bucketing import BucketBatchSampler
from lightning_softprompt.data.sampling.shared_batches import SharedBatches, SharedBatchSampler

SIZES = (23, 7, 40, 11)
STARTS = np.cumsum((0, *SIZES))
LENGTHS = [np.random.default_rng(n).integers(1, 30, rows).tolist() for n, rows in enumerate(SIZES)]


def made(rows=12, tasks=None, rates=SIZES, count=None, seed=0, rank=0, world=1):
    own = [BucketBatchSampler(lengths, 4, order="shuffled", seed=n) for n, lengths in enumerate(LENGTHS)]
    return SharedBatchSampler(own, SharedBatches(rows, tasks), rates, count, seed, (rank, world))


def epoch_of(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


def task_of(row):
    return int(np.searchsorted(STARTS, row, side="right")) - 1


def tasks_of(batch):
    return Counter(map(task_of, batch))


@pytest.mark.parametrize("tasks", [1, 3, 4, None])
def test_rows_of_a_batch_are_shared_evenly_by_as_many_tasks_as_asked_for(tasks):
    batches = [batch for epoch in range(20) for batch in epoch_of(made(rows=13, tasks=tasks), epoch)]
    shares = [tasks_of(batch) for batch in batches]
    assert {len(batch) for batch in batches} == {13}
    assert all(max(of.values()) - min(of.values()) <= 1 for of in shares)
    many = Counter(len(of) for of in shares)
    assert set(many) == ({2, 3, 4} if tasks is None else {tasks})
    if tasks is None:
        assert min(many.values()) > 0.7 * len(batches) / 3


def test_tasks_are_drawn_by_their_rates_without_putting_back():
    rates = (8.0, 4.0, 2.0, 1.0)
    share = np.concatenate([made(tasks=2, rates=rates, count=500).shares(epoch) > 0 for epoch in range(40)])
    pairs = Counter(tuple(np.flatnonzero(row)) for row in share)
    total = sum(rates)
    for a in range(4):
        for b in range(a + 1, 4):
            one, other = rates[a] / total, rates[b] / total
            expected = one * rates[b] / (total - rates[a]) + other * rates[a] / (total - rates[b])
            assert pairs[a, b] / len(share) == pytest.approx(expected, abs=0.01)


def test_no_row_comes_again_before_all_others_of_its_task_have():
    sampler = made()
    drawn = {task: [] for task in range(4)}
    for epoch in range(12):
        for row in (row for batch in epoch_of(sampler, epoch) for row in batch):
            drawn[task_of(row)].append(row)
    for task, rows in drawn.items():
        own = SIZES[task]
        assert len(rows) > 2 * own
        for start in range(0, len(rows) - own, own):
            assert len(set(rows[start : start + own])) == own, task


def test_the_order_is_a_function_of_seed_and_epoch_alone():
    used = made(seed=1)
    orders = [epoch_of(used, 0), epoch_of(used, 3), epoch_of(made(seed=2), 0)]
    assert all(a != b for n, a in enumerate(orders) for b in orders[:n])
    assert epoch_of(used, 0) == orders[0] == epoch_of(made(seed=1), 0)
    assert epoch_of(made(seed=1), 3) == orders[1]


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("done", [0, 1, 5, 6])
def test_it_goes_on_where_it_was_left(epoch, done):
    whole = epoch_of(made(), epoch)
    assert len(whole) == 7
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
    [
        (made(tasks=2), "tasks of a batch was None and is 2"),
        (made(rows=8), "rows of a batch"),
        (made(seed=3), "seed was 0 and is 3"),
        (made(rates=(1, 1, 1, 1)), "rates"),
        (made(count=3), "batches per epoch was 7 and is 3"),
    ],
)
def test_another_order_is_not_gone_on_with(other, named):
    with pytest.raises(ValueError, match=named):
        other.load_state_dict(made().state_dict())


def test_processes_share_every_tasks_rows_of_each_batch_and_together_see_what_one_would():
    alone, *shares = made(rows=12), *(made(rows=4, rank=rank, world=3) for rank in range(3))
    for batch, *parts in zip(*(epoch_of(sampler, 1) for sampler in (alone, *shares)), strict=True):
        assert sorted(row for part in parts for row in part) == sorted(batch)
        assert {len(part) for part in parts} == {4}
        for task in tasks_of(batch):
            of = [tasks_of(part)[task] for part in parts]
            assert min(of) > 0
            assert max(of) - min(of) <= 1
    shares[0].load_state_dict(alone.state_dict())


def test_batches_too_small_for_their_tasks_and_tasks_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="a batch of 3 rows cannot have one of each of 4 tasks"):
        made(rows=3)
    with pytest.raises(ValueError, match=r"together\.tasks is 5, but there are only 4 tasks"):
        made(tasks=5)
    with pytest.raises(ValueError, match="at least 1, got 0 and None"):
        SharedBatches(0)
