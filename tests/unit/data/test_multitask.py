"""Several data modules as one."""

import json

import pytest
import torch

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


def classified(names, count=12):
    return [{"text": TEXTS[i % 6], "label": list(names)[i % len(names)]} for i in range(count)]


def summed_up(count=7):
    return [{"document": TEXTS[i % 6] + " that ends well", "summary": TEXTS[i % 6]} for i in range(count)]


def splits(rows):
    return {"train": rows, "validation": rows[:5], "test": rows[:4]}


@pytest.fixture
def spec(tiny_folder):
    return BackboneSpec(name=str(tiny_folder("llama")))


@pytest.fixture
def made(spec):
    """Three tasks; what is given for one is added to its arguments."""

    def made(mood=None, length=None, summary=None, **arguments):
        common = {"cache": False}
        tasks = {
            "mood": ClassificationDataModule(
                template="{soft}{text} it was {target}", labels=MOOD, batch_size=4,
                **{**splits(classified(MOOD, 24)), **common, **(mood or {})},
            ),
            "length": ClassificationDataModule(
                template="{text} is{soft} {target}", labels=LENGTH, batch_size=3,
                **{**splits(classified(LENGTH)), **common, **(length or {})},
            ),
            "summary": SummarizationDataModule(
                max_target_tokens=8, batch_size=2, **{**splits(summed_up()), **common, **(summary or {})}
            ),
        }  # fmt: skip
        return MultitaskDataModule(tasks, **{"scores": {"summary": "rouge1"}, "backbone": spec, **arguments})

    return made


def rows_of(batches):
    return [(int(task), int(row)) for batch in batches for task, row in zip(batch.task_ids, batch.row_ids, strict=True)]


def test_an_epoch_of_proportional_sampling_is_each_row_once_in_batches_of_one_task(made):
    data = made(sampling=Proportional())
    batches = list(data.train_dataloader())
    assert len(batches) == 6 + 4 + 4
    assert all(len(set(batch.task_ids.tolist())) == 1 for batch in batches)
    assert {int(batch.task_ids[0]): len(batch) for batch in batches if len(batch) > 1} == {0: 4, 1: 3, 2: 2}
    expected = [(task, row) for task, count in enumerate((24, 12, 7)) for row in range(count)]
    assert sorted(rows_of(batches)) == expected


def test_uniform_sampling_draws_as_many_rows_of_each_task(made):
    data = made(sampling=UniformTasks(), epoch_batches=130)
    rows = [task for task, _ in rows_of(data.train_dataloader())]
    shares = [rows.count(task) / len(rows) for task in range(3)]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.05)


@pytest.mark.parametrize("loader", ["val_dataloader", "test_dataloader"])
def test_rows_are_scored_once_each_with_both_their_numbers(made, loader):
    batches = list(getattr(made(), loader)())
    count = 5 if loader == "val_dataloader" else 4
    assert sorted(rows_of(batches)) == [(task, row) for task in range(3) for row in range(count)]
    for batch in batches:
        assert batch.global_row_ids == tuple(task * count + row for task, row in rows_of([batch]))


def test_a_row_is_what_its_own_data_module_makes_of_it(made, spec):
    data = made()
    alone = ClassificationDataModule(
        template="{text} is{soft} {target}", labels=LENGTH, cache=False, backbone=spec, **splits(classified(LENGTH))
    )
    own = alone.split("train")
    for batch in data.train_dataloader():
        if batch.task_ids[0] == 1:
            for b, row in enumerate(batch.row_ids):
                assert batch.examples[b] == own.examples[row]
                assert batch.require_encoded()[b].ids == own.encoded[row].ids
                assert int(batch.labels[b]) == own.examples[row].label
        assert (batch.labels is None) == (batch.task_ids[0] == 2)
    assert data.describe_row("train", 24 + 5) == {"task": "length", **alone.describe_row("train", 5)}


def test_classes_and_metrics_are_those_of_the_tasks(made):
    data = made()
    assert list(data.classes_by_task) == ["mood", "length", "summary"]
    assert data.classes is None
    assert data.classes_by_task["mood"].words == {"negative": [" bad"], "positive": [" good", " great"]}
    assert data.classes_by_task["summary"] is None
    assert data.evaluation.monitor == ("macro", "max")
    assert data.evaluation.scores == {"mood": "accuracy", "length": "accuracy", "summary": "rouge1"}
    assert made(scores={"mood": "mcc", "summary": "bleu"}).evaluation.scores["mood"] == "mcc"


def test_a_bad_file_of_any_task_fails_before_training_and_is_named(made, tmp_path):
    file = tmp_path / "train.jsonl"
    rows = [*classified(LENGTH, 3), {"text": "dull", "label": "tall"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"task 'length': .*train\.jsonl:4: unknown label 'tall'"):
        made(length={"train": str(file)}).setup("fit")
    with pytest.raises(ValueError, match=r"task 'summary': no test rows|task 'summary': no source of test rows"):
        made(summary={"test": None}).setup("test")


def test_rows_to_be_predicted_name_their_tasks_and_keep_their_order(made):
    given = [
        {"task": "summary", "document": "a sad story"},
        {"task": "mood", "text": "dull"},
        {"task": "summary", "document": "a dog"},
        {"task": "length", "text": "funny"},
    ]
    data = made(predict=given)
    (first, second) = list(data.predict_dataloader())
    assert [*rows_of([first]), *rows_of([second])] == [(2, 0), (0, 0), (2, 1), (1, 0)]
    assert [*first.global_row_ids, *second.global_row_ids] == [0, 1, 2, 3]
    assert data.describe_row("predict", 2) == {"task": "summary", "row": 2, "input": "a dog\nSummary:", "target": None}
    with pytest.raises(ValueError, match=r"row 1 of .*must name one of the tasks \['mood', 'length', 'summary'\]"):
        made(predict=[given[0], {"task": "tone", "text": "dull"}]).split("predict")
    with pytest.raises(ValueError, match=r"must name one of the tasks .*got \['mood'\]"):
        made(predict=[{"task": ["mood"], "text": "dull"}]).split("predict")
    with pytest.raises(ValueError, match=r"task 'mood': .*no column 'text'"):
        made(predict=[{"task": "mood"}]).split("predict")


def test_rows_to_be_predicted_are_renamed_as_their_task_has_it(made):
    data = made(predict=[{"task": "mood", "Review Text": "dull"}], mood={"rename_columns": {"Review Text": "text"}})
    assert data.describe_row("predict", 0)["input"].startswith("dull")


def test_without_such_rows_those_of_the_tasks_are_predicted(made):
    data = made(length={"predict": [{"text": "dull"}, {"text": "funny"}]})
    (batch,) = list(data.predict_dataloader())
    assert rows_of([batch]) == [(1, 0), (1, 1)]
    with pytest.raises(ValueError, match=r"no source of predict rows; set data.predict"):
        made().split("predict")


def test_rows_to_be_predicted_know_each_other_by_their_task_too(made):
    one, other = ([{"task": task, "text": "dull"}] for task in ("mood", "length"))
    assert made(predict=one).identity("predict") == made(predict=one).identity("predict")
    assert made(predict=one).identity("predict") != made(predict=other).identity("predict")


@pytest.mark.parametrize("name", ["a.b", "a/b", "", "a b", "type", "keys"])
def test_names_of_tasks_must_do_as_names_of_metrics_and_parameters(spec, name):
    task = ClassificationDataModule(labels=MOOD, train=classified(MOOD))
    with pytest.raises(ValueError, match="names of tasks"):
        MultitaskDataModule({name: task}, backbone=spec)


def test_a_run_without_tasks_or_with_two_backbones_is_refused(spec):
    with pytest.raises(ValueError, match="requires tasks"):
        MultitaskDataModule({}, backbone=spec)
    task = ClassificationDataModule(labels=MOOD, train=classified(MOOD), backbone=BackboneSpec(name="other"))
    with pytest.raises(ValueError, match=r"share one backbone, but \['a'\] name another"):
        MultitaskDataModule({"a": task}, backbone=spec)
    assert MultitaskDataModule({"a": task}).spec.name == "other"


def test_a_task_that_is_watched_by_its_loss_wants_a_score(made):
    with pytest.raises(ValueError, match=r"tasks \['summary'\] are monitored by their loss; name one of their metrics"):
        _ = made(scores={}).evaluation
    with pytest.raises(ValueError, match=r"scores names \['tone'\]"):
        _ = made(scores={"tone": "accuracy"}).evaluation


def test_loaders_with_workers_make_the_same_batches(made):
    alone, helped = (list(made(num_workers=n).train_dataloader()) for n in (0, 1))
    assert rows_of(alone) == rows_of(helped)
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(alone, helped, strict=True))


def test_tasks_that_share_batches_keep_templates_labels_and_numbers_of_their_own(made):
    data = made(together=SharedBatches(rows=7, tasks=3), sampling=UniformTasks(), epoch_batches=20)
    kinds, alone = list(data.tasks), {name: task.split("train") for name, task in made().tasks.items()}
    for batch in data.train_dataloader():
        assert len(set(batch.task_ids.tolist())) == 3
        for task, places, part in batch.by_task():
            own = data.tasks[kinds[task]].split("train")
            assert (part.labels is None) == (kinds[task] == "summary")
            for b, at in enumerate(places):
                row = batch.row_ids[at]
                assert part.examples[b] == own.examples[row]
                assert part.require_encoded()[b].ids == own.encoded[row].ids
                assert part.labels is None or int(part.labels[b]) == own.examples[row].label
                assert batch.global_row_ids[at] == sum(len(alone[name]) for name in kinds[:task]) + row
    assert all(len(set(batch.task_ids.tolist())) == 1 for batch in data.val_dataloader())


def test_how_often_a_task_is_in_a_batch_is_by_its_rate(made):
    rates = {"mood": 6, "length": 3, "summary": 1}
    data = made(together=SharedBatches(rows=4, tasks=1), sampling=FixedRates(rates), epoch_batches=1000)
    drawn = [int(batch[0] >= 24) + int(batch[0] >= 36) for batch in data.train_dataloader().batch_sampler]
    assert [drawn.count(task) / 1000 for task in range(3)] == pytest.approx([0.6, 0.3, 0.1], abs=0.04)


def test_tags_and_classes_share_a_batch(spec):
    words = [{"tokens": ["a", "sad", "film"], "tags": ["O", "B", "O"]}, {"tokens": ["dull"], "tags": ["B"]}]
    tasks = {
        "mood": ClassificationDataModule(labels=MOOD, **splits(classified(MOOD, 6)), cache=False),
        "tags": TaggingDataModule(template="{soft}{tokens}{soft}{target}", **splits(words * 3), cache=False),
        "summary": SummarizationDataModule(**splits(summed_up()), cache=False),
    }
    data = MultitaskDataModule(tasks, together=SharedBatches(6, 3), scores={"summary": "rouge1"}, backbone=spec)
    for batch in data.train_dataloader():
        assert batch.slots.shape == (6, 1)  # as many as each of the three templates has
        mood, tags, summary = (part for *_, part in batch.by_task())
        assert [int(label) for label in mood.labels] == [example.label for example in mood.examples]
        for b, example in enumerate(tags.examples):
            assert tags.labels[b, : len(example.label)].tolist() == list(example.label)
        assert (mood.words, summary.words, summary.labels) == (None, None, None)
        assert tags.words.shape == tags.labels.shape
