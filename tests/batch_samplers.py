"""Reads the batches of samplers, and checks what holds for each of them: a reproducible order that can be resumed."""

from itertools import chain, combinations


def batches_in_epoch(sampler, epoch):
    """Returns the batches of an epoch."""
    sampler.set_epoch(epoch)
    return list(sampler)


def flatten(batches):
    """Returns the rows of batches."""
    return list(chain.from_iterable(batches))


def state_after(sampler, epoch, num_batches):
    """Returns the state of a sampler after some batches of an epoch were used."""
    sampler.set_epoch(epoch)
    batches = iter(sampler)
    for _ in range(num_batches):
        next(batches)
        sampler.count()
    return sampler.state_dict()


def check_resumes(make_sampler, epoch, num_batches):
    """Checks that a new sampler continues an epoch after some batches were used."""
    expected = batches_in_epoch(make_sampler(), epoch)
    resumed = make_sampler()
    resumed.load_state_dict(state_after(make_sampler(), epoch, num_batches))
    assert list(resumed) == expected[num_batches:]


def check_order_depends_on_seed_and_epoch_only(make_sampler):
    """Checks that seeds and epochs have different orders, which do not depend on earlier epochs.

    Args:
        make_sampler: Returns a sampler with the given `seed`.
    """
    sampler = make_sampler(seed=1)
    first, second = batches_in_epoch(sampler, 0), batches_in_epoch(sampler, 1)
    # The sum of seed and epoch is the same as that of `first` or `second`.
    others = [batches_in_epoch(make_sampler(seed=0), 1), batches_in_epoch(make_sampler(seed=2), 0)]
    assert all(a != b for a, b in combinations([first, second, *others], 2))
    assert batches_in_epoch(sampler, 0) == first
    assert batches_in_epoch(make_sampler(seed=1), 0) == first
    assert batches_in_epoch(make_sampler(seed=1), 1) == second


def check_rows_repeat_only_after_all_others(rows, size):
    """Checks that each group of `size` consecutive rows of a task, which has `size` rows, contains every row."""
    assert len(rows) > 2 * size
    for start in range(0, len(rows) - size, size):
        assert len(set(rows[start : start + size])) == size
