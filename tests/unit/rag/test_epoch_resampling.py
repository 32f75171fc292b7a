"""Passages and answers of training rows that are sampled in each epoch."""

import pickle
from collections import Counter

import pytest
from questions import ROW, TEXTS, documents_of, examples_by_epoch, first_example

from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.types import ShownPassage
from lightning_softprompt.data.classification import ClassificationDataModule
from lightning_softprompt.data.multitask import MultitaskDataModule
from lightning_softprompt.rag.passage_selection import PassageNoise

FAMILIES = ("llama",)
ROWS = [{**ROW, "question": "wonderful " * n + ROW["question"]} for n in range(8)]
NOISE = PassageNoise(distractors=0.5, no_gold=0.3, drop=0.3)


def sample_examples(module, num_epochs):
    """Returns the training examples of several epochs in one list."""
    return [example for epoch in examples_by_epoch(module, num_epochs) for example in epoch]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_samples_depend_on_seed_epoch_and_row_only(make_qa_data, num_workers):
    options = {
        "passages": {"count": 4, "order": "shuffled", "noise": NOISE},
        "answer_form": {"training_target": "any"},
        "batch_size": 3,
    }
    epochs = examples_by_epoch(make_qa_data(ROWS, **options, seed=0))
    assert examples_by_epoch(make_qa_data(ROWS, **options, seed=0, num_workers=num_workers)) == epochs
    assert examples_by_epoch(make_qa_data(ROWS, **options, seed=1)) != epochs
    assert epochs[0] != epochs[1] != epochs[2]
    assert all(len(examples) == len(ROWS) for examples in epochs)


def test_without_sampling_all_epochs_are_equal(make_qa_data):
    module = make_qa_data(ROWS, passages={"count": 3})
    assert not module.resamples
    first, second = examples_by_epoch(module, 2)
    assert first == second == module.split("train").examples


def test_shuffling_uses_all_orders_in_training_and_none_in_evaluation(make_qa_data):
    module = make_qa_data(ROWS, passages={"count": 3, "order": "shuffled"})
    orders = {tuple(documents_of(examples[0])) for examples in examples_by_epoch(module, 60)}
    assert len(orders) == 6
    assert all(set(order) == {"dog", "story", "well"} for order in orders)
    for example in module.split("test").examples:
        assert documents_of(example) == ["dog", "story", "well"]


def test_distractors_never_replace_a_passage_with_the_answer(make_qa_data):
    module = make_qa_data(ROWS, passages={"count": 3, "noise": PassageNoise(distractors=0.5)})
    others = []
    for example in sample_examples(module, 30):
        assert example.passages[0] == ShownPassage("dog", TEXTS["dog"], 0)
        others += example.passages[1:]
    assert not any(passage.document == "dog" for passage in others)
    num_distractors = sum(passage.rank is None for passage in others)
    assert 0.4 < num_distractors / len(others) < 0.6


def test_rows_without_their_gold_passages_have_the_abstain_text_as_target(make_qa_data):
    noise = PassageNoise(no_gold=0.5)
    module = make_qa_data(ROWS, passages={"count": 2, "noise": noise}, answer_form={"abstain": "well"})
    examples = sample_examples(module, 30)
    without_gold = [example for example in examples if "dog" not in documents_of(example)]
    assert 0.4 < len(without_gold) / len(examples) < 0.6
    for example in without_gold:
        assert example.target == "well"
        assert example.references == ("well",)
        assert documents_of(example) == ["story", "well"]
    assert {example.target for example in examples if "dog" in documents_of(example)} == {"sad"}


def test_without_an_abstain_text_rows_without_gold_passages_have_their_answer_as_target(make_qa_data):
    module = make_qa_data(ROWS, passages={"noise": PassageNoise(no_gold=1.0)})
    for example in sample_examples(module, 1):
        assert example.target == "sad"
        assert documents_of(example) == ["story", "well"]
    for example in module.split("test").examples:
        assert documents_of(example) == ["dog", "story"]


def test_passages_are_dropped_with_the_given_probability(make_qa_data):
    module = make_qa_data(ROWS, passages={"count": 3, "noise": PassageNoise(drop=0.25)})
    counts = [len(example.passages) for example in sample_examples(module, 40)]
    assert 0.7 < sum(counts) / (3 * len(counts)) < 0.8


def test_all_answers_are_targets_equally_often(make_qa_data):
    module = make_qa_data(ROWS, answer_form={"training_target": "any"})
    targets = Counter(example.target for example in sample_examples(module, 30))
    assert set(targets) == {"sad", "very sad"}
    assert 0.4 < targets["sad"] / targets.total() < 0.6
    assert first_example(module).target == "sad"


def test_sampled_rows_fit_into_max_tokens(make_qa_data):
    passages = {"count": 4, "noise": PassageNoise(distractors=0.5), "order": "shuffled"}
    loader = make_qa_data(ROWS, passages=passages, max_tokens=34).train_dataloader()
    for epoch in range(5):
        loader.batch_sampler.set_epoch(epoch)
        for batch in loader:
            assert int(batch.mask.sum(1).max()) <= 34


def test_sampled_rows_have_a_slot_for_each_passage_whether_or_not_it_was_dropped(make_qa_data):
    passages = {"template": "{soft}{text} ,", "count": 3, "noise": PassageNoise(drop=0.5)}
    loader, slots_of_rows = make_qa_data(ROWS, passages=passages).train_dataloader(), []
    for epoch in range(10):
        loader.batch_sampler.set_epoch(epoch)
        for batch in loader:
            slots_of_rows += batch.slots.tolist()
    assert {len(slots) for slots in slots_of_rows} == {4}
    has_passages = {slots[0] != slots[1] for slots in slots_of_rows}
    assert has_passages == {True, False}


def test_citations_are_the_numbers_of_gold_passages_in_each_sample(make_qa_data):
    passages = {"template": "[{number}] {text} ,", "order": "shuffled"}
    module = make_qa_data([ROW], passages=passages, answer_form={"cite": True, "training_target": "any"}, batch_size=1)
    targets = set()
    for example in sample_examples(module, 30):
        number = documents_of(example).index("dog") + 1
        assert example.target in (f"sad [{number}]", f"very sad [{number}]")
        targets.add(example.target)
    assert len(targets) == 4


def test_a_resumed_loader_continues_with_the_samples_of_the_remaining_rows(make_qa_data):
    def make_loader():
        return make_qa_data(ROWS, passages={"count": 4, "noise": NOISE}, batch_size=2).train_dataloader()

    complete, interrupted, resumed = make_loader(), make_loader(), make_loader()
    complete.batch_sampler.set_epoch(2)
    expected = [batch.examples for batch in complete]
    interrupted.batch_sampler.set_epoch(2)
    first = next(iter(interrupted)).examples
    resumed.load_state_dict(interrupted.state_dict())
    assert [first, *(batch.examples for batch in resumed)] == expected


def test_sampled_rows_can_be_pickled_for_workers(make_qa_data):
    loader = make_qa_data(ROWS, passages={"noise": PassageNoise(drop=0.5)}).train_dataloader()
    rows = pickle.loads(pickle.dumps(loader.dataset))
    assert rows[11][2] == loader.dataset[11][2]


def test_a_task_of_several_cannot_sample_passages(make_qa_data, tiny_folder, family):
    spec = BackboneSpec(name=str(tiny_folder(family)))
    other = ClassificationDataModule(labels=["good", "bad"], backbone=spec, train=[{"text": "a", "label": "good"}])
    questions = make_qa_data(ROWS, passages={"noise": PassageNoise(drop=0.5)})
    with pytest.raises(ValueError, match=r"the tasks \['asked'\] do"):
        MultitaskDataModule({"asked": questions, "other": other}).split("train")
