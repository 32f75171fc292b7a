from collections import Counter

import numpy as np
import pytest
import torch
from batch_samplers import (
    batches_in_epoch,
    check_order_depends_on_seed_and_epoch_only,
    check_resumes,
    flatten,
    state_after,
)

from lightning_softprompt.data.sampling.bucketing import WINDOW, BucketBatchSampler, ResumableLoader

LENGTHS = np.random.default_rng(0).integers(1, 100, 103).tolist()


def shuffled_sampler(lengths=LENGTHS, batch_size=4, **options):
    return BucketBatchSampler(lengths, batch_size, order="shuffled", **options)


def samplers_by_rank(lengths, world_size, **options):
    return [BucketBatchSampler(lengths, rank=rank, world_size=world_size, **options) for rank in range(world_size)]


# Limit of tokens per batch


@pytest.mark.parametrize("order", ["shuffled", "longest_first", "given"])
@pytest.mark.parametrize(
    ("rows", "world_size"),
    [(1, 1), (2, 1), (7, 1), (40, 1), (103, 1), (40, 3), (103, 3)],
)
def test_no_batch_of_any_epoch_exceeds_the_limit_of_tokens(order, world_size, rows):
    lengths = LENGTHS[:rows]
    max_tokens = 3 * max(lengths)
    samplers = samplers_by_rank(lengths, world_size, order=order, max_tokens=max_tokens)
    for epoch in range(3):
        batches_by_rank = [batches_in_epoch(sampler, epoch) for sampler in samplers]
        batches = flatten(batches_by_rank)
        assert sorted(flatten(batches)) == list(range(rows))
        assert all(batches)
        assert max(sum(lengths[row] for row in batch) for batch in batches) <= max_tokens
        num_batches = [len(batches) for batches in batches_by_rank]
        assert num_batches == [len(sampler) for sampler in samplers]
        assert len(set(num_batches)) == 1


def test_batches_of_limited_tokens_are_nearly_full_reproducible_and_resumable():
    def make_sampler():
        return BucketBatchSampler(LENGTHS, order="shuffled", max_tokens=400)

    sampler = make_sampler()
    batches = batches_in_epoch(sampler, 0)
    tokens = [sum(LENGTHS[row] for row in batch) for batch in batches]
    assert min(tokens) > 400 - 3 * max(LENGTHS)
    assert batches != batches_in_epoch(sampler, 1)
    assert batches_in_epoch(sampler, 0) == batches
    check_resumes(make_sampler, epoch=0, num_batches=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 140}, "rows of at most a third of it, but one has 50"),
        ({"max_tokens": 400, "rank": 1, "world_size": 4}, "too few rows"),
        ({"max_tokens": 400, "drop_last": True}, "max_tokens excludes drop_last and weights"),
    ],
)
def test_unsuitable_limits_of_tokens_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        BucketBatchSampler([10, 50], order="shuffled", **options)


# Order


def test_each_epoch_has_every_row_once_in_full_batches_and_a_shorter_one():
    for epoch in range(3):
        batches = batches_in_epoch(shuffled_sampler(), epoch)
        assert sorted(flatten(batches)) == list(range(103))
        assert sorted(map(len, batches)) == [3] + [4] * 25
        assert len(batches) == len(shuffled_sampler())


def test_the_order_depends_on_seed_and_epoch_only():
    check_order_depends_on_seed_and_epoch_only(shuffled_sampler)


def test_a_pass_does_not_change_the_global_random_generators():
    np.random.seed(0)
    torch.manual_seed(0)
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    list(ResumableLoader(range(103), shuffled_sampler(), collate_fn=list))
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_batches_contain_rows_of_similar_length_but_are_not_sorted_by_it():
    lengths = np.random.default_rng(1).permutation(4 * WINDOW).tolist()
    batches = [[lengths[row] for row in batch] for batch in shuffled_sampler(lengths)]
    assert all(max(batch) - min(batch) == 3 for batch in batches)  # one window: lengths in a batch are consecutive
    first_lengths = [batch[0] for batch in batches]
    assert first_lengths != sorted(first_lengths)
    assert first_lengths != sorted(first_lengths, reverse=True)


def test_the_rows_of_a_batch_differ_between_epochs():
    sampler = shuffled_sampler(list(range(40 * WINDOW)))
    first = {frozenset(batch) for batch in batches_in_epoch(sampler, 0)}
    second = {frozenset(batch) for batch in batches_in_epoch(sampler, 1)}
    assert not first & second


def test_evaluation_starts_with_the_longest_rows_and_prediction_uses_the_given_order():
    lengths = [LENGTHS[row] for row in flatten(BucketBatchSampler(LENGTHS, 4, order="longest_first"))]
    assert lengths == sorted(LENGTHS, reverse=True)
    assert flatten(BucketBatchSampler(LENGTHS, 4, order="given")) == list(range(103))


@pytest.mark.parametrize("num_batches", [1, 2, 5])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("options", [{"batch_size": 4}, {"max_tokens": 60}])
def test_a_limited_evaluation_scores_the_same_rows_of_all_lengths_in_each_pass(num_batches, world_size, options):
    lengths = [2, 20] * 40

    def draw_samplers():
        samplers = samplers_by_rank(lengths, world_size, order="longest_first", **options)
        for sampler in samplers:
            sampler.draw(num_batches)
        return samplers

    def first_rows(samplers):
        return flatten(flatten(list(sampler)[:num_batches] for sampler in samplers))

    samplers = draw_samplers()
    rows = first_rows(samplers)
    assert rows == first_rows(draw_samplers())
    assert sorted(rows) == samplers[0].drawn[0] == samplers[-1].drawn[0]
    count = Counter(lengths[row] for row in rows)
    tolerance = 1 if "batch_size" in options else 4 + len(rows) // 4
    assert abs(count[20] - count[2]) <= tolerance
    assert sorted(flatten(flatten(samplers))) == list(range(80))


def test_a_limited_evaluation_of_rows_of_equal_length_follows_no_pattern_of_the_file():
    sampler = BucketBatchSampler([5] * 60, 10, order="longest_first")
    sampler.draw(2)
    assert {row % 3 for row in sampler.drawn[0]} == {0, 1, 2}


def test_a_sampler_that_repeats_its_first_epoch_cannot_load_the_state_of_one_that_does_not():
    repeating, plain = shuffled_sampler(), shuffled_sampler()
    repeating.repeats = True
    assert batches_in_epoch(repeating, 3) == batches_in_epoch(plain, 0) != batches_in_epoch(plain, 3)
    assert repeating.state_dict()["epoch"] == 3
    with pytest.raises(ValueError, match="repeats the first epoch"):
        repeating.load_state_dict(plain.state_dict())


def test_drop_last_drops_other_rows_in_each_epoch_and_leaves_full_batches():
    sampler = shuffled_sampler(drop_last=True)
    dropped = []
    for epoch in range(3):
        batches = batches_in_epoch(sampler, epoch)
        assert {len(batch) for batch in batches} == {4}
        assert len(batches) == len(sampler) == 25
        dropped.append(set(range(103)) - set(flatten(batches)))
    assert dropped[0] != dropped[1] != dropped[2]


def test_weights_set_how_often_rows_are_drawn_but_not_the_length_of_an_epoch():
    weights = [0.0] * 50 + [1.0] * 25 + [3.0] * 28
    sampler = shuffled_sampler(weights=weights)
    batches = flatten(batches_in_epoch(sampler, epoch) for epoch in range(100))
    counts = np.bincount(flatten(batches), minlength=103)
    assert counts.sum() == 100 * 103
    assert not counts[:50].any()
    light, heavy = counts[50:75], counts[75:]
    assert heavy.mean() / light.mean() == pytest.approx(3, rel=0.1)
    expected = batches_in_epoch(shuffled_sampler(weights=weights), 7)
    assert batches_in_epoch(sampler, 7) == expected
    assert batches_in_epoch(sampler, 8) != expected


# Ranks


@pytest.mark.parametrize("rows", [103, 96, 101, 9])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_train_on_different_rows_in_the_same_number_of_batches_of_equal_size(rows, world_size):
    samplers = samplers_by_rank(LENGTHS[:rows], world_size, order="shuffled", batch_size=4)
    batches_by_rank = [list(sampler) for sampler in samplers]
    first_sizes, *other_sizes = [list(map(len, batches)) for batches in batches_by_rank]
    assert all(sizes == first_sizes for sizes in other_sizes)
    assert {len(sampler) for sampler in samplers} == {len(first_sizes)}
    counts = Counter(flatten(flatten(batches_by_rank)))
    assert max(counts.values()) == 1
    assert rows - len(counts) == rows % world_size


def join_ranks(samplers):
    """Returns the rows of each batch of two ranks together."""
    return [set(first + second) for first, second in zip(*samplers, strict=True)]


@pytest.mark.parametrize("rows", [96, 102])
def test_two_ranks_together_train_on_the_batches_of_one_process(rows):
    lengths = LENGTHS[:rows]
    samplers = samplers_by_rank(lengths, 2, order="shuffled", batch_size=2)
    assert join_ranks(samplers) == [set(batch) for batch in shuffled_sampler(lengths, batch_size=4)]


def test_two_ranks_can_resume_an_epoch_of_one_process_with_twice_their_batch_size():
    lengths = LENGTHS[:102]
    expected = list(shuffled_sampler(lengths, batch_size=4))[10:]
    state = state_after(shuffled_sampler(lengths, batch_size=4), epoch=0, num_batches=10)
    samplers = samplers_by_rank(lengths, 2, order="shuffled", batch_size=2)
    for sampler in samplers:
        sampler.load_state_dict(state)
    assert join_ranks(samplers) == [set(batch) for batch in expected]


@pytest.mark.parametrize("order", ["longest_first", "given"])
@pytest.mark.parametrize("rows", [5, 13, 103])
def test_ranks_together_evaluate_every_row_once(order, rows):
    samplers = samplers_by_rank(LENGTHS[:rows], 3, order=order, batch_size=4)
    batches_by_rank = [list(sampler) for sampler in samplers]
    assert sorted(flatten(flatten(batches_by_rank))) == list(range(rows))
    assert [len(sampler) for sampler in samplers] == [len(batches) for batches in batches_by_rank]


def test_the_given_order_assigns_rows_to_ranks_in_turn():
    assert flatten(BucketBatchSampler(LENGTHS[:7], 2, order="given", rank=1, world_size=3)) == [1, 4]


# Arguments and state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"rank": 2, "world_size": 2}, "0 <= rank < world_size"),
        ({"order": "given", "drop_last": True}, "drop_last and weights require the order 'shuffled', got 'given'"),
        ({"order": "longest_first", "weights": [1, 1, 1]}, "require the order 'shuffled'"),
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
def test_invalid_arguments_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        BucketBatchSampler(**{"lengths": [1, 2, 3], "batch_size": 2, "order": "shuffled", **options})


@pytest.mark.parametrize(
    ("changes", "message"),
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
def test_the_state_of_a_sampler_with_another_order_is_rejected(changes, message):
    with pytest.raises(ValueError, match=message):
        shuffled_sampler(**changes).load_state_dict(shuffled_sampler().state_dict())
