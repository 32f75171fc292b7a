import pickle

import pytest
from batch_samplers import batches_in_epoch, flatten
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader

from lightning_softprompt.data.sampling.bucketing import BucketBatchSampler, ResumableLoader

ROWS = 103
BATCHES = 26


def make_sampler():
    return BucketBatchSampler([1 + 7 * row % 100 for row in range(ROWS)], 4, order="shuffled")


def make_loader(num_workers=0, dataset=range(ROWS)):
    return ResumableLoader(dataset, make_sampler(), collate_fn=list, num_workers=num_workers)


class RecordingDataset:
    """Row numbers, with a record of which rows were read."""

    def __init__(self):
        self.rows_read = []

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        self.rows_read.append(index)
        return index


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_batches", [1, 10, 25])
def test_a_loader_resumes_after_the_last_batch_that_it_returned(num_workers, num_batches):
    loader = make_loader(num_workers)
    loader.batch_sampler.set_epoch(3)
    batches = iter(loader)
    for _ in range(num_batches):
        next(batches)
    state = pickle.loads(pickle.dumps(loader.state_dict()))
    resumed = make_loader(num_workers)
    resumed.load_state_dict(state)
    assert list(resumed) == batches_in_epoch(make_sampler(), 3)[num_batches:]
    assert len(resumed) == BATCHES  # Lightning counts batches from the start of the epoch


@pytest.mark.parametrize("num_batches", [0, 1, 2, 3, 7])
def test_a_repeated_loader_returns_each_batch_in_sequence_and_resumes(num_batches):
    loader = make_loader().repeated(3)
    loader.batch_sampler.set_epoch(2)
    expected = [batch for batch in batches_in_epoch(make_sampler(), 2) for _ in range(3)]
    assert len(loader) == 3 * BATCHES
    batches = iter(loader)
    assert [next(batches) for _ in range(num_batches)] == expected[:num_batches]
    resumed = make_loader().repeated(3)
    resumed.load_state_dict(loader.state_dict())
    assert list(resumed) == expected[num_batches:]
    with pytest.raises(ValueError, match="steps per batch was 3 and is 2"):
        make_loader().repeated(2).load_state_dict(loader.state_dict())


def test_a_resumed_loader_does_not_read_the_rows_that_it_skips():
    dataset = RecordingDataset()
    loader = make_loader(dataset=dataset)
    loader.load_state_dict({**loader.state_dict(), "done": 20})
    list(loader)
    assert dataset.rows_read == flatten(batches_in_epoch(make_sampler(), 0)[20:])


def test_the_state_after_an_epoch_is_the_start_of_the_next():
    loader = make_loader()
    list(loader)
    state = loader.state_dict()
    assert (state["epoch"], state["done"]) == (1, 0)
    resumed = make_loader()
    resumed.load_state_dict(state)
    assert list(resumed) == batches_in_epoch(make_sampler(), 1)


def test_only_the_first_pass_after_loading_starts_in_the_middle_of_an_epoch():
    loader = make_loader()
    loader.load_state_dict({**loader.state_dict(), "done": 20})
    assert len(list(loader)) == BATCHES - 20
    assert len(list(loader)) == BATCHES


def test_an_interrupted_pass_does_not_shorten_the_next():
    loader = make_loader()
    next(iter(loader))
    assert len(list(loader)) == BATCHES


@pytest.mark.parametrize(
    ("epoch", "start"), [(2, 20), (3, 0)], ids=["saved epoch", "next epoch, as the saved one ended early"]
)
def test_the_epoch_can_be_set_after_the_iterator_is_created(epoch, start):
    loader = make_loader()
    loader.load_state_dict({**loader.state_dict(), "epoch": 2, "done": 20})
    batches = iter(loader)
    loader.batch_sampler.set_epoch(epoch)
    assert list(batches) == batches_in_epoch(make_sampler(), epoch)[start:]


@pytest.mark.parametrize("options", [{"batch_size": 4}, {"max_tokens": 30}], ids=lambda options: next(iter(options)))
def test_a_pass_can_start_with_the_batch_of_a_row_and_the_next_pass_is_complete(options):
    sampler = BucketBatchSampler([1 + 7 * row % 10 for row in range(23)], order="given", **options)
    batches = list(sampler)
    batch_of_row = {row: number for number, batch in enumerate(batches) for row in batch}
    loader = ResumableLoader(range(23), sampler, list)
    for row in range(23):
        assert loader.skip_to(row) == batch_of_row[row]
        assert list(loader) == batches[batch_of_row[row] :]
        assert list(loader) == batches
    assert loader.skip_to(23) == len(batches)  # a row that no batch contains
    assert list(loader) == []


# What Lightning relies on


def test_lightning_sets_the_epoch_of_the_sampler():
    plain = DataLoader(range(ROWS), batch_sampler=make_sampler(), collate_fn=list)
    for loader in (make_loader(), plain):
        _set_sampler_epoch(loader, 5)
        assert list(loader) == batches_in_epoch(make_sampler(), 5)


def test_lightning_can_stop_the_workers():
    loader = make_loader(num_workers=1)
    combined = CombinedLoader(loader)
    next(iter(combined))
    workers = loader._iterator._workers
    assert workers[0].is_alive()
    combined.reset()
    assert not workers[0].is_alive()
    assert list(loader) == batches_in_epoch(make_sampler(), 0)
