"""Several data modules as one."""

from itertools import cycle, islice, product

import numpy as np
import pytest
import torch
from row_files import write_rows

from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.data.classification import ClassificationDataModule
from lightning_softprompt.data.multitask import MultitaskDataModule
from lightning_softprompt.data.sampling.shared_batches import SharedBatches
from lightning_softprompt.data.sampling.task_mixing import FixedRates, Proportional, UniformTasks
from lightning_softprompt.data.summarization import SummarizationDataModule
from lightning_softprompt.data.tagging import TaggingDataModule

MOOD = {"negative": "bad", "positive": ["good", "great"]}
LENGTH = {"short": "never", "long": "long", "other": "one"}
TEXTS = ["a warm film", "dull", "it is a sad story about a dog", "this film , good ?", "funny", "it never ends"]


def make_labelled_rows(labels, count=12):
    pairs = zip(cycle(TEXTS), cycle(labels), strict=False)
    return [{"text": text, "label": label} for text, label in islice(pairs, count)]


def make_summaries(count=7):
    return [{"document": f"{text} that ends well", "summary": text} for text in islice(cycle(TEXTS), count)]


def make_splits(rows):
    return {"train": rows, "validation": rows[:5], "test": rows[:4]}


@pytest.fixture
def spec(tiny_folder):
    return BackboneSpec(name=str(tiny_folder("llama")))


@pytest.fixture
def make_data(spec):
    """Returns a function that creates a data module of three tasks.

    The keyword arguments `mood`, `length` and `summary` are further arguments of the data module of that task.
    """
    mood_defaults = {"template": "{soft}{text} it was {target}", "labels": MOOD, "batch_size": 4, "cache": False}
    length_defaults = {"template": "{text} is{soft} {target}", "labels": LENGTH, "batch_size": 3, "cache": False}
    summary_defaults = {"max_target_tokens": 8, "batch_size": 2, "cache": False}
    mood_defaults |= make_splits(make_labelled_rows(MOOD, 24))
    length_defaults |= make_splits(make_labelled_rows(LENGTH))
    summary_defaults |= make_splits(make_summaries())

    def make_data(mood=None, length=None, summary=None, **arguments):
        tasks = {
            "mood": ClassificationDataModule(**mood_defaults | (mood or {})),
            "length": ClassificationDataModule(**length_defaults | (length or {})),
            "summary": SummarizationDataModule(**summary_defaults | (summary or {})),
        }
        return MultitaskDataModule(tasks, **{"scores": {"summary": "rouge1"}, "backbone": spec, **arguments})

    return make_data


def row_ids_of(batches):
    """Returns the task and the row id of each row."""
    pairs = []
    for batch in batches:
        pairs += zip(batch.task_ids.tolist(), batch.row_ids, strict=True)
    return pairs


def test_an_epoch_of_proportional_sampling_has_each_row_once_in_batches_of_one_task(make_data):
    data = make_data(sampling=Proportional())
    batches = list(data.train_dataloader())
    assert len(batches) == 6 + 4 + 4
    assert all(len(set(batch.task_ids.tolist())) == 1 for batch in batches)
    batch_sizes = {(int(batch.task_ids[0]), len(batch)) for batch in batches}
    assert batch_sizes == {(0, 4), (1, 3), (2, 2), (2, 1)}
    row_ids = sorted(row_ids_of(batches))
    assert row_ids == [(task, row) for task, size in enumerate((24, 12, 7)) for row in range(size)]


def test_uniform_sampling_draws_equally_many_rows_of_each_task(make_data):
    data = make_data(sampling=UniformTasks(), epoch_batches=130)
    rows = [task for task, _ in row_ids_of(data.train_dataloader())]
    shares = [rows.count(task) / len(rows) for task in range(3)]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.05)


@pytest.mark.parametrize("loader", ["val_dataloader", "test_dataloader"])
def test_evaluations_contain_each_row_once_with_its_row_id_and_its_global_row_id(make_data, loader):
    batches = list(getattr(make_data(), loader)())
    count = 5 if loader == "val_dataloader" else 4
    assert sorted(row_ids_of(batches)) == list(product(range(3), range(count)))
    for batch in batches:
        assert batch.global_row_ids == tuple(task * count + row for task, row in row_ids_of([batch]))


def test_rows_are_encoded_as_by_the_data_module_of_their_task(make_data, spec):
    data = make_data()
    rows = make_splits(make_labelled_rows(LENGTH))
    options = {"template": "{text} is{soft} {target}", "labels": LENGTH, "cache": False}
    single = ClassificationDataModule(backbone=spec, **options, **rows)
    expected = single.split("train")
    for batch in data.train_dataloader():
        if batch.task_ids[0] == 1:
            for b, row in enumerate(batch.row_ids):
                assert batch.examples[b] == expected.examples[row]
                assert batch.require_encoded()[b].ids == expected.encoded[row].ids
                assert int(batch.labels[b]) == expected.examples[row].label
        assert (batch.labels is None) == (batch.task_ids[0] == 2)
    assert data.describe_row("train", 24 + 5) == {"task": "length", **single.describe_row("train", 5)}


def test_each_task_has_its_classes_and_its_score(make_data):
    data = make_data()
    assert list(data.classes_by_task) == ["mood", "length", "summary"]
    assert data.classes is None
    assert data.classes_by_task["mood"].words == {"negative": [" bad"], "positive": [" good", " great"]}
    assert data.classes_by_task["summary"] is None
    assert data.evaluation.monitor == ("macro", "max")
    assert data.evaluation.scores == {"mood": "accuracy", "length": "accuracy", "summary": "rouge1"}
    assert make_data(scores={"mood": "mcc", "summary": "bleu"}).evaluation.scores["mood"] == "mcc"


def test_a_bad_file_of_any_task_is_reported_before_training(make_data, tmp_path):
    rows = [*make_labelled_rows(LENGTH, 3), {"text": "dull", "label": "tall"}]
    file = write_rows(tmp_path / "train.jsonl", rows)
    with pytest.raises(ValueError, match=r"task 'length': .*train\.jsonl:4: unknown label 'tall'"):
        make_data(length={"train": str(file)}).setup("fit")
    with pytest.raises(ValueError, match=r"task 'summary': no test rows|task 'summary': no source of test rows"):
        make_data(summary={"test": None}).setup("test")


def test_rows_to_predict_are_in_the_order_of_their_source_with_the_task_of_each(make_data):
    rows = [
        {"task": "summary", "document": "a sad story"},
        {"task": "mood", "text": "dull"},
        {"task": "summary", "document": "a dog"},
        {"task": "length", "text": "funny"},
    ]
    data = make_data(predict=rows)
    first, second = data.predict_dataloader()
    assert row_ids_of([first, second]) == [(2, 0), (0, 0), (2, 1), (1, 0)]
    assert [*first.global_row_ids, *second.global_row_ids] == [0, 1, 2, 3]
    assert data.describe_row("predict", 2) == {"task": "summary", "row": 2, "input": "a dog\nSummary:", "target": None}


def test_rows_to_predict_with_a_wrong_task_or_column_are_rejected(make_data):
    with pytest.raises(ValueError, match=r"row 1 of .*must name one of the tasks \['mood', 'length', 'summary'\]"):
        make_data(predict=[{"task": "mood", "text": "dull"}, {"task": "tone", "text": "dull"}]).split("predict")
    with pytest.raises(ValueError, match=r"must name one of the tasks .*got \['mood'\]"):
        make_data(predict=[{"task": ["mood"], "text": "dull"}]).split("predict")
    with pytest.raises(ValueError, match=r"task 'mood': .*no column 'text'"):
        make_data(predict=[{"task": "mood"}]).split("predict")


def test_the_columns_of_rows_to_predict_are_renamed_as_their_task_requires(make_data):
    data = make_data(
        predict=[{"task": "mood", "Review Text": "dull"}], mood={"rename_columns": {"Review Text": "text"}}
    )
    assert data.describe_row("predict", 0)["input"].startswith("dull")


def test_rows_to_predict_can_be_set_for_a_single_task(make_data):
    data = make_data(length={"predict": [{"text": "dull"}, {"text": "funny"}]})
    (batch,) = list(data.predict_dataloader())
    assert row_ids_of([batch]) == [(1, 0), (1, 1)]
    with pytest.raises(ValueError, match=r"no source of predict rows; set data.predict"):
        make_data().split("predict")


def test_the_identity_of_rows_to_predict_depends_on_their_task(make_data):
    def identity(task):
        return make_data(predict=[{"task": task, "text": "dull"}]).identity("predict")

    assert identity("mood") == identity("mood")
    assert identity("mood") != identity("length")


@pytest.mark.parametrize("name", ["a.b", "a/b", "", "a b", "type", "keys"])
def test_names_of_tasks_that_metrics_and_parameters_cannot_have_are_rejected(spec, name):
    task = ClassificationDataModule(labels=MOOD, train=make_labelled_rows(MOOD))
    with pytest.raises(ValueError, match="names of tasks"):
        MultitaskDataModule({name: task}, backbone=spec)


def test_a_data_module_without_tasks_or_with_two_backbones_is_rejected(spec):
    with pytest.raises(ValueError, match="requires tasks"):
        MultitaskDataModule({}, backbone=spec)
    task = ClassificationDataModule(labels=MOOD, train=make_labelled_rows(MOOD), backbone=BackboneSpec(name="other"))
    with pytest.raises(ValueError, match=r"share one backbone, but \['a'\] name another"):
        MultitaskDataModule({"a": task}, backbone=spec)
    assert MultitaskDataModule({"a": task}).spec.name == "other"


def test_a_task_that_is_monitored_by_its_loss_requires_a_score(make_data):
    with pytest.raises(ValueError, match=r"tasks \['summary'\] are monitored by their loss; name one of their metrics"):
        _ = make_data(scores={}).evaluation
    with pytest.raises(ValueError, match=r"scores names \['tone'\]"):
        _ = make_data(scores={"tone": "accuracy"}).evaluation


def test_workers_do_not_change_the_batches(make_data):
    without, with_worker = (list(make_data(num_workers=n).train_dataloader()) for n in (0, 1))
    assert row_ids_of(without) == row_ids_of(with_worker)
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(without, with_worker, strict=True))


def test_rows_of_shared_batches_are_encoded_as_by_the_data_module_of_their_task(make_data):
    data = make_data(together=SharedBatches(rows=7, tasks=3), sampling=UniformTasks(), epoch_batches=20)
    splits = [task.split("train") for task in data.tasks.values()]
    first_row_ids = [0, 24, 36]
    for batch in data.train_dataloader():
        assert len(set(batch.task_ids.tolist())) == 3
        for task, positions, part in batch.by_task():
            expected = splits[task]
            assert (part.labels is None) == (task == 2)
            for b, position in enumerate(positions):
                row = batch.row_ids[position]
                assert part.examples[b] == expected.examples[row]
                assert part.require_encoded()[b].ids == expected.encoded[row].ids
                assert part.labels is None or int(part.labels[b]) == expected.examples[row].label
                assert batch.global_row_ids[position] == first_row_ids[task] + row
    assert all(len(set(batch.task_ids.tolist())) == 1 for batch in data.val_dataloader())


def test_fixed_rates_set_how_often_a_task_is_in_a_batch(make_data):
    rates = {"mood": 6, "length": 3, "summary": 1}
    data = make_data(together=SharedBatches(rows=4, tasks=1), sampling=FixedRates(rates), epoch_batches=1000)
    first_rows = [batch[0] for batch in data.train_dataloader().batch_sampler]
    counts, _ = np.histogram(first_rows, bins=[0, 24, 36, 43])
    assert counts / 1000 == pytest.approx([0.6, 0.3, 0.1], abs=0.04)


def test_tags_classes_and_summaries_can_share_a_batch(spec):
    words = [{"tokens": ["a", "sad", "film"], "tags": ["O", "B", "O"]}, {"tokens": ["dull"], "tags": ["B"]}]
    tasks = {
        "mood": ClassificationDataModule(labels=MOOD, **make_splits(make_labelled_rows(MOOD, 6)), cache=False),
        "tags": TaggingDataModule(template="{soft}{tokens}{soft}{target}", **make_splits(words * 3), cache=False),
        "summary": SummarizationDataModule(**make_splits(make_summaries()), cache=False),
    }
    data = MultitaskDataModule(tasks, together=SharedBatches(6, 3), scores={"summary": "rouge1"}, backbone=spec)
    for batch in data.train_dataloader():
        assert batch.slots.shape == (6, 1)  # each of the three templates has one slot
        mood, tags, summary = (part for *_, part in batch.by_task())
        assert [int(label) for label in mood.labels] == [example.label for example in mood.examples]
        for b, example in enumerate(tags.examples):
            assert tags.labels[b, : len(example.label)].tolist() == list(example.label)
        assert (mood.words, summary.words, summary.labels) == (None, None, None)
        assert tags.words.shape == tags.labels.shape
