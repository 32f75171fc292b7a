import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_softprompt.data.sampling.bucketing import WINDOW, BucketBatchSampler, ResumableLoader

LENGTHS = np.random.default_rng(0).integers(1, 100, 103).tolist()


def shuffled(lengths=LENGTHS, batch_size=4, **options):
    return BucketBatchSampler(lengths, batch_size, order="shuffled", **options)


def epoch_of(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


def loader_of(sampler, num_workers=0, seen=None):
    return ResumableLoader(Recorded(len(sampler.lengths), seen), sampler, collate_fn=list, num_workers=num_workers)


class Recorded:
    """Numbers that tell when they are read."""

    def __init__(self, rows, seen=None):
        self.rows, self.seen = rows, [] if seen is None else seen

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        self.seen.append(index)
        return index


def flat(batches):
    return [row for batch in batches for row in batch]


# Order


@pytest.mark.parametrize("order", ["shuffled", "longest_first", "given"])
@pytest.mark.parametrize(("rows", "world_size"), [(1, 1), (2, 1), (7, 1), (40, 1), (103, 1), (40, 3), (103, 3)])
def test_a_budget_of_tokens_holds_in_every_batch_of_every_epoch(order, world_size, rows):
    lengths, most = LENGTHS[:rows], 3 * max(LENGTHS[:rows])
    samplers = [
        BucketBatchSampler(lengths, order=order, max_tokens=most, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for epoch in range(3):
        batches = [epoch_of(sampler, epoch) for sampler in samplers]
        every = [batch for of_rank in batches for batch in of_rank]
        assert sorted(flat(every)) == list(range(rows))
        assert all(batch and sum(lengths[row] for row in batch) <= most for batch in every)
        assert [len(of_rank) for of_rank in batches] == [len(sampler) for sampler in samplers]
        assert len({len(of_rank) for of_rank in batches}) == 1


def test_a_budget_of_tokens_fills_batches_with_like_rows_and_mixes_epochs():
    sampler = BucketBatchSampler(LENGTHS, order="shuffled", max_tokens=400)
    batches = epoch_of(sampler, 0)
    assert min(sum(LENGTHS[row] for row in batch) for batch in batches) > 400 - 3 * max(LENGTHS)
    assert batches != epoch_of(sampler, 1)
    assert epoch_of(sampler, 0) == batches
    sampler.set_epoch(0)
    resumed = BucketBatchSampler(LENGTHS, order="shuffled", max_tokens=400)
    passing = iter(sampler)
    next(passing), sampler.count()
    resumed.load_state_dict(sampler.state_dict())
    assert list(resumed) == batches[1:]


def test_a_budget_that_a_row_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="a third of that at most, got one of 50"):
        BucketBatchSampler([10, 50], order="given", max_tokens=140)
    with pytest.raises(ValueError, match="too few rows"):
        BucketBatchSampler([10, 50], order="shuffled", max_tokens=400, rank=1, world_size=4)
    with pytest.raises(ValueError, match="neither drop_last nor weights"):
        BucketBatchSampler([10, 50], order="shuffled", max_tokens=400, drop_last=True)


def test_each_epoch_has_every_row_once_in_full_batches_and_a_last_one():
    for epoch in range(3):
        batches = epoch_of(shuffled(), epoch)
        assert sorted(flat(batches)) == list(range(103))
        assert sorted(map(len, batches)) == [3] + [4] * 25
        assert len(batches) == len(shuffled())


def test_the_order_is_a_function_of_seed_and_epoch_alone():
    used = shuffled(seed=1)
    first = epoch_of(used, 0)
    second = epoch_of(used, 1)
    assert epoch_of(used, 0) == first == epoch_of(shuffled(seed=1), 0)
    assert epoch_of(shuffled(seed=1), 1) == second
    orders = [first, second, epoch_of(shuffled(seed=2), 0), epoch_of(shuffled(seed=0), 1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_making_an_order_leaves_the_global_random_numbers_alone():
    np.random.seed(0)
    torch.manual_seed(0)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    list(loader_of(shuffled()))
    assert np.array_equal(before[0], np.random.get_state()[1])
    assert torch.equal(before[1], torch.get_rng_state())


def test_batches_hold_rows_of_like_length_without_being_sorted_by_it():
    lengths = np.random.default_rng(1).permutation(4 * WINDOW).tolist()
    batches = [[lengths[row] for row in batch] for batch in shuffled(lengths)]
    assert all(max(batch) - min(batch) == 3 for batch in batches)  # one window: neighbours in the order of lengths
    firsts = [batch[0] for batch in batches]
    assert firsts != sorted(firsts)
    assert firsts != sorted(firsts, reverse=True)


def test_windows_mix_rows_between_epochs():
    sampler = shuffled(list(range(40 * WINDOW)))
    together = [{frozenset(batch) for batch in epoch_of(sampler, epoch)} for epoch in range(2)]
    assert not together[0] & together[1]


def test_longest_first_begins_with_the_longest_and_given_keeps_the_order():
    lengths = [LENGTHS[row] for row in flat(BucketBatchSampler(LENGTHS, 4, order="longest_first"))]
    assert lengths == sorted(LENGTHS, reverse=True)
    assert flat(BucketBatchSampler(LENGTHS, 4, order="given")) == list(range(103))


@pytest.mark.parametrize("batches", [1, 2, 5])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", [{"batch_size": 4}, {"max_tokens": 60}])
def test_a_limited_evaluation_scores_rows_of_all_lengths_the_same_in_each_pass(batches, world_size, kind):
    lengths = [20 if row % 2 else 2 for row in range(80)]  # as with a file whose rows alternate

    def drawn():
        ranks = [
            BucketBatchSampler(lengths, order="longest_first", rank=rank, world_size=world_size, **kind)
            for rank in range(world_size)
        ]
        for sampler in ranks:
            sampler.draw(batches)
        return ranks, [list(sampler)[:batches] for sampler in ranks]

    ranks, passes = drawn()
    rows = flat(flat(passes))
    assert rows == flat(flat(drawn()[1]))
    assert sorted(rows) == ranks[0].drawn[0] == ranks[-1].drawn[0]
    tokens = Counter(lengths[row] for row in rows)
    assert abs(tokens[20] - tokens[2]) <= (1 if "batch_size" in kind else 4 + len(rows) // 4)
    assert sorted(flat(list(ranks[0]) + (list(ranks[1]) if world_size == 2 else []))) == list(range(80))


def test_a_limited_evaluation_of_rows_of_one_length_follows_no_pattern_of_the_file():
    sampler = BucketBatchSampler([5] * 60, 10, order="longest_first")
    sampler.draw(2)
    assert {row % 3 for row in sampler.drawn[0]} == {0, 1, 2}


def test_an_order_that_repeats_has_the_first_epoch_each_time_and_goes_on_only_as_such():
    sampler, plain = shuffled(), shuffled()
    sampler.repeats = True
    assert epoch_of(sampler, 3) == epoch_of(plain, 0) != epoch_of(plain, 3)
    assert sampler.state_dict()["epoch"] == 3 + 1 - (sampler.done < len(sampler))
    with pytest.raises(ValueError, match="repeats the first epoch"):
        sampler.load_state_dict(plain.state_dict())


def test_drop_last_leaves_full_batches_and_drops_others_each_epoch():
    sampler = shuffled(drop_last=True)
    dropped = []
    for epoch in range(3):
        batches = epoch_of(sampler, epoch)
        assert {len(batch) for batch in batches} == {4}
        assert len(batches) == len(sampler) == 25
        dropped.append(set(range(103)) - set(flat(batches)))
    assert dropped[0] != dropped[1] != dropped[2]


def test_weights_decide_how_often_rows_are_drawn_and_not_how_long_an_epoch_is():
    weights = [0.0] * 50 + [1.0] * 25 + [3.0] * 28
    sampler = shuffled(weights=weights)
    drawn = Counter(flat(batch for epoch in range(100) for batch in epoch_of(sampler, epoch)))
    assert sum(drawn.values()) == 100 * 103
    assert not any(drawn[row] for row in range(50))
    light, heavy = sum(drawn[row] for row in range(50, 75)) / 25, sum(drawn[row] for row in range(75, 103)) / 28
    assert heavy / light == pytest.approx(3, rel=0.1)
    assert epoch_of(sampler, 7) == epoch_of(shuffled(weights=weights), 7) != epoch_of(sampler, 8)


# Ranks


@pytest.mark.parametrize("rows", [103, 96, 101, 9])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_train_on_different_rows_in_equally_many_batches_of_equal_size(rows, world_size):
    ranks = [shuffled(LENGTHS[:rows], rank=rank, world_size=world_size) for rank in range(world_size)]
    batches = [list(rank) for rank in ranks]
    assert all([len(batch) for batch in rank] == [len(batch) for batch in batches[0]] for rank in batches)
    assert {len(rank) for rank in ranks} == {len(batches[0])}
    seen = Counter(flat(flat(batches)))
    assert max(seen.values()) == 1
    assert rows - len(seen) == rows % world_size


@pytest.mark.parametrize("rows", [96, 102])
def test_ranks_together_train_on_the_batches_of_one_process(rows):
    lengths = LENGTHS[:rows]
    alone = list(shuffled(lengths, batch_size=4))
    ranks = [list(shuffled(lengths, batch_size=2, rank=rank, world_size=2)) for rank in range(2)]
    assert [set(a + b) for a, b in zip(*ranks, strict=True)] == [set(batch) for batch in alone]


@pytest.mark.parametrize("order", ["longest_first", "given"])
@pytest.mark.parametrize("rows", [5, 13, 103])
def test_ranks_evaluate_every_row_exactly_once(order, rows):
    ranks = [BucketBatchSampler(LENGTHS[:rows], 4, order=order, rank=rank, world_size=3) for rank in range(3)]
    batches = [list(rank) for rank in ranks]
    assert Counter(flat(flat(batches))) == Counter(range(rows))
    assert [len(rank) for rank in ranks] == [len(rank) for rank in batches]


def test_given_order_deals_rows_in_turn():
    assert flat(BucketBatchSampler(LENGTHS[:7], 2, order="given", rank=1, world_size=3)) == [1, 4]


# Arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "wanted batch_size > 0"),
        ({"rank": 2, "world_size": 2}, "0 <= rank < world_size"),
        ({"order": "given", "drop_last": True}, "drop_last and weights are for the order 'shuffled', got 'given'"),
        ({"order": "longest_first", "weights": [1, 1, 1]}, "are for the order 'shuffled'"),
        ({"lengths": []}, "0 rows give no batch"),
        ({"world_size": 4}, "3 rows give no batch to each of 4 processes"),
        ({"order": "given", "world_size": 4, "lengths": []}, "0 rows give no batch to each of 4 processes"),
        ({"batch_size": 4, "drop_last": True}, "3 rows give no batch.*drop_last=True"),
        ({"weights": [1, 1]}, "weights must be 3 finite numbers"),
        ({"weights": [1, -1, 1]}, "weights must be 3 finite numbers"),
        ({"weights": [0, 0, 0]}, "weights must be 3 finite numbers"),
        ({"weights": [1, float("nan"), 1]}, "weights must be 3 finite numbers"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BucketBatchSampler(**{"lengths": [1, 2, 3], "batch_size": 2, "order": "shuffled", **options})


# State


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("done", [1, 10, 25])
def test_a_loader_goes_on_after_the_last_batch_that_was_handed_out(num_workers, done):
    loader = loader_of(shuffled(), num_workers)
    loader.batch_sampler.set_epoch(3)
    batches = iter(loader)
    for _ in range(done):
        next(batches)
    state = pickle.loads(pickle.dumps(loader.state_dict()))
    resumed = loader_of(shuffled(), num_workers)
    resumed.load_state_dict(state)
    assert list(resumed) == epoch_of(shuffled(), 3)[done:]
    assert len(resumed) == 26  # the whole epoch: Lightning counts from its beginning


def test_skipped_rows_are_not_loaded():
    first = loader_of(shuffled())
    batches = iter(first)
    [next(batches) for _ in range(20)]
    seen = []
    resumed = loader_of(shuffled(), seen=seen)
    resumed.load_state_dict(first.state_dict())
    list(resumed)
    assert seen == flat(epoch_of(shuffled(), 0)[20:])


def test_the_end_of_an_epoch_is_the_start_of_the_next():
    loader = loader_of(shuffled())
    list(loader)
    state = loader.state_dict()
    assert (state["epoch"], state["done"]) == (1, 0)
    resumed = loader_of(shuffled())
    resumed.load_state_dict(state)
    assert list(resumed) == epoch_of(shuffled(), 1)


def test_only_the_first_pass_after_loading_begins_in_the_middle():
    loader = loader_of(shuffled())
    loader.load_state_dict({**loader.state_dict(), "done": 20})
    assert (len(list(loader)), len(list(loader))) == (6, 26)


def test_a_pass_that_was_broken_off_does_not_shorten_the_next():
    loader = loader_of(shuffled())
    next(iter(loader))
    assert len(list(loader)) == 26


@pytest.mark.parametrize(("told", "first"), [(2, 20), (3, 0)], ids=["the saved epoch", "the next: it was ended early"])
def test_the_epoch_may_be_told_after_the_iterator_was_made(told, first):
    loader = loader_of(shuffled())
    loader.load_state_dict({**loader.state_dict(), "epoch": 2, "done": 20})
    batches = iter(loader)
    loader.batch_sampler.set_epoch(told)
    assert list(batches) == epoch_of(shuffled(), told)[first:]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"batch_size": 5}, r"batch_size \* world_size was 4 and is 5"),
        ({"world_size": 2}, r"batch_size \* world_size was 4 and is 8"),
        ({"lengths": LENGTHS[:100]}, "rows was 103 and is 100"),
        ({"lengths": [*LENGTHS[:-1], 1000]}, "checksum of lengths and weights was"),
        ({"weights": [1.0] * 103}, "checksum of lengths and weights was"),
        ({"drop_last": True}, "batches per epoch was 26 and is 25"),
    ],
)
def test_the_state_of_another_order_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        shuffled(**changed).load_state_dict(shuffled().state_dict())


def test_a_run_may_go_on_with_other_ranks_of_the_same_batch_in_all():
    lengths = LENGTHS[:102]
    one = shuffled(lengths, batch_size=4)
    batches = iter(one)
    for _ in range(10):
        next(batches)
        one.count()
    rest = []
    for rank in range(2):
        sampler = shuffled(lengths, batch_size=2, rank=rank, world_size=2)
        sampler.load_state_dict(one.state_dict())
        rest.append(list(sampler))
    assert [set(a + b) for a, b in zip(*rest, strict=True)] == [set(batch) for batch in batches]


# What Lightning relies on


def test_lightning_tells_the_epoch_to_the_sampler():
    from lightning.fabric.utilities.data import _set_sampler_epoch

    resumable, plain = loader_of(shuffled()), DataLoader(range(103), batch_sampler=shuffled(), collate_fn=list)
    for loader in (resumable, plain):
        _set_sampler_epoch(loader, 5)
        assert list(loader) == epoch_of(shuffled(), 5)


def test_lightning_can_end_the_workers():
    from lightning.pytorch.utilities.combined_loader import CombinedLoader

    loader = loader_of(shuffled(), num_workers=1)
    combined = CombinedLoader(loader)
    next(iter(combined))
    workers = loader._iterator._workers
    assert workers[0].is_alive()
    combined.reset()
    assert not workers[0].is_alive()
    assert list(loader) == epoch_of(shuffled(), 0)


@pytest.mark.parametrize("options", [{"batch_size": 4}, {"max_tokens": 30}], ids=lambda options: next(iter(options)))
def test_a_pass_may_begin_with_the_batch_of_any_row_and_the_next_is_whole(options):
    lengths = [1 + i * 7 % 10 for i in range(23)]
    sampler = BucketBatchSampler(lengths, order="given", **options)
    whole = list(sampler)
    loader = ResumableLoader(range(23), sampler, list)
    for row in range(24):
        skipped = loader.skip_to(row)
        assert skipped == next((n for n, batch in enumerate(whole) if row in batch), len(whole))
        assert list(loader) == whole[skipped:]
        if row < 23:
            assert list(loader) == whole
