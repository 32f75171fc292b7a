import logging
from collections import Counter

import pytest
import torch
from labelled_rows import LABELS, labels_of, make_rows
from row_files import write_rows
from tiny import EOS

# Rows of a split


def test_shots_are_drawn_from_each_class_by_the_seed(make_data):
    rows = make_rows([0] * 20 + [1] * 9)

    def draw(**seed):
        return make_data(train=rows, validation=make_rows([0, 1]), shots=4, **seed)

    places = draw().split("train").where
    assert Counter(labels_of(draw())) == {0: 4, 1: 4}
    assert len(set(places)) == 8
    assert draw(seed=0).split("train").where == places
    assert draw(seed=1).split("train").where != places


def test_too_few_rows_for_the_shots_are_reported_with_their_number(make_data):
    with pytest.raises(ValueError, match=r"shots=4 rows of each class.*only \{'positive': 2\}"):
        make_data(train=make_rows([0] * 5 + [1] * 2), validation=make_rows([0]), shots=4).split("train")


@pytest.mark.parametrize("option", [{"shots": 0}, {"shots": -1}, {"demonstrations": -1}])
def test_invalid_numbers_of_rows_are_rejected(make_data, option):
    with pytest.raises(ValueError, match=rf"{next(iter(option))} must be at least \d, got"):
        make_data(train=make_rows(["negative", "positive"]), **option)


def test_balanced_classes_are_drawn_equally_often(make_data):
    rows = make_rows([0] * 90 + [1] * 10)
    splits = {"train": rows, "validation": rows[:1]}
    plain, balanced = (make_data(**splits, balanced=flag, batch_size=10) for flag in (False, True))
    assert plain.weights(plain.split("train").examples) is None
    weights = torch.tensor(balanced.weights(balanced.split("train").examples))
    labels = torch.tensor(labels_of(balanced))
    for label in (0, 1):
        assert float(weights[labels == label].sum()) == pytest.approx(1)

    def fraction_of_class_1(module):
        labels = torch.cat([batch.labels for batch in module.train_dataloader()])
        return float(labels.float().mean())

    assert fraction_of_class_1(plain) == pytest.approx(0.1)
    assert 0.3 < fraction_of_class_1(balanced) < 0.7  # 100 draws at 0.5: four standard deviations


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_a_share_of_the_training_rows_replaces_missing_validation_rows(make_data, share):
    rows = make_rows([i % 2 for i in range(40)])

    def split(**arguments):
        module = make_data(train=rows, validation_share=share, **arguments)
        return module.split("train").where, module.split("validation").where

    train, validation = split()
    assert len(validation) == round(40 * share)
    assert not set(train) & set(validation)
    assert len(set(train) | set(validation)) == 40
    assert split() == (train, validation)
    assert split(seed=1)[1] != validation


def test_a_file_of_validation_rows_is_used(make_data, tmp_path):
    write_rows(tmp_path / "train.jsonl", make_rows([0] * 10))
    write_rows(tmp_path / "validation.jsonl", make_rows([1] * 3))
    module = make_data(path=str(tmp_path))
    assert labels_of(module) == [0] * 10
    assert labels_of(module, "validation") == [1] * 3


def test_skipped_rows_are_reported_with_their_number(make_data, tmp_path, caplog):
    rows = [*make_rows([0, "neutral", 1]), {"text": None, "label": 0}]
    file = write_rows(tmp_path / "test.jsonl", rows)
    file.write_text(file.read_text() + "{not json\n")
    with caplog.at_level(logging.WARNING):
        module = make_data(test=str(file), on_bad_row="skip")
        assert labels_of(module, "test") == [0, 1]
    assert "3 of the test rows were skipped, the first" in caplog.text
    caplog.clear()
    module = make_data(train=make_rows([0, "neutral", 1]), on_bad_row="skip")
    assert len(module.split("train")) + len(module.split("validation")) == 2
    assert caplog.text.count("1 of the train rows were skipped") == 1


def test_rows_have_their_numbers_in_the_source_after_skipped_rows(make_data, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "warm"}, {"text": None}, {"text": "dull"}])
    file.write_text("{not json\n" + file.read_text())
    module = make_data(predict=str(file), on_bad_row="skip")
    assert module.source_rows("predict") == [1, 3]
    assert [module.describe_row("predict", i)["row"] for i in range(2)] == [1, 3]
    renumbered = make_data(predict=[{"text": "warm"}, {"text": "dull"}])
    assert module.identity("predict") != renumbered.identity("predict")  # one file of predictions cannot continue both


def test_rows_of_several_files_are_described_with_their_file(make_data, tmp_path):
    rows = make_rows([0, 1])
    first = str(write_rows(tmp_path / "a.jsonl", rows))
    second = str(write_rows(tmp_path / "b.jsonl", rows))
    for source in ([first, second], str(tmp_path / "*.jsonl")):
        module = make_data(predict=source)
        descriptions = [module.describe_row("predict", i) for i in range(4)]
        places = [(description["row"], description["file"]) for description in descriptions]
        assert places == [(0, first), (1, first), (0, second), (1, second)]
    assert "file" not in make_data(predict=[first]).describe_row("predict", 0)


@pytest.mark.parametrize("pattern", [False, True])
def test_the_rows_of_a_single_file_are_divided_into_splits(make_data, tmp_path, caplog, pattern):
    caplog.set_level(logging.INFO, "lightning_softprompt")
    file = write_rows(tmp_path / "rows.jsonl", make_rows([0, 1] * 20))
    module = make_data(path=str(tmp_path / "*.jsonl") if pattern else str(file))
    parts = {name: module.source_rows(name) for name in ("train", "validation", "test")}
    assert sorted(row for rows in parts.values() for row in rows) == list(range(40))
    assert {name: labels_of(module, name).count(1) for name in parts} == {"train": 16, "validation": 2, "test": 2}
    assert "divided into 32 train, 4 test, 4 validation rows, at random by data.seed=0 and stratified" in caplog.text
    assert caplog.text.count("divided into") == 1
    with pytest.raises(ValueError, match="no source of predict rows"):
        module.split("predict")


def test_a_file_is_not_divided_for_a_split_with_another_source(make_data, tmp_path):
    file = str(write_rows(tmp_path / "rows.jsonl", make_rows([0, 1] * 20)))
    module = make_data(path=file, validation=make_rows([0, 1]), test=make_rows([0]))
    assert [len(module.split(name)) for name in ("train", "validation", "test")] == [40, 2, 1]
    assert len(make_data(path=file, test_share=0).split("train")) == 36
    with pytest.raises(ValueError, match="no source of test rows"):
        make_data(path=file, test_share=0).split("test")


def test_a_file_as_path_excludes_another_source_of_training_rows(make_data, tmp_path):
    file = str(write_rows(tmp_path / "rows.jsonl", make_rows([0, 1])))
    with pytest.raises(ValueError, match=r"remove one of the two"):
        make_data(path=file, train=file)
    with pytest.raises(ValueError, match="test_share must be at least 0"):
        make_data(path=file, test_share=0.95)


def test_the_only_column_with_a_usual_name_of_a_class_is_the_label(make_data, caplog):
    caplog.set_level(logging.INFO, "lightning_softprompt")
    rows = [{"text": "warm", "Category": "bad", "other": "x"}, {"text": "dull", "Category": "good", "other": "y"}]
    module = make_data(train=rows, labels=None)
    assert list(module.words) == ["bad", "good"]
    assert sorted(labels_of(module) + labels_of(module, "validation")) == [0, 1]
    assert "Classes are read from the column 'Category'" in caplog.text
    with pytest.raises(ValueError, match=r"no column 'label'.* such as --data\.label other"):
        make_data(train=[{"text": "warm", "other": "x"}], labels=None).classes  # noqa: B018
    with pytest.raises(ValueError, match="no column 'label'"):
        make_data(train=[{"text": "warm", "topic": "x", "class": "y"}], labels=None).classes  # noqa: B018


@pytest.mark.parametrize("share", [0, -0.5, 1, 2, float("nan")])
def test_a_validation_share_must_be_between_0_and_1(make_data, share):
    with pytest.raises(ValueError, match=rf"validation_share must be between 0 and 1, got {share}"):
        make_data(train=make_rows([0, 1]), validation_share=share)


@pytest.mark.parametrize(("template", "warns"), [(r"{text}\nIt: {target}", True), ("{text}\nIt: {target}", False)])
def test_a_backslash_n_in_a_template_causes_a_warning(make_data, caplog, template, warns):
    make_data(template=template)
    assert ("For a line break or tab" in caplog.text) == warns


def test_templates_use_original_or_renamed_columns(make_data, tmp_path):
    row = {"Review Text": "warm", "target": 1}
    module = make_data(template="{Review Text} it was {target}", label="target", test=[row])
    assert module.describe_row("test", 0)["input"] == "warm it was"
    module = make_data(
        rename_columns={"Review Text": "text", "target": "label"}, test=[row], predict=[{"text": "dull"}]
    )
    assert module.describe_row("test", 0)["input"] == "warm it was"
    assert labels_of(module, "test") == [1]
    assert module.describe_row("predict", 0)["input"] == "dull it was"  # this row already has the new name
    with pytest.raises(ValueError, match=r"no column 'text'; the row has \['other'\]"):
        make_data(rename_columns={"Review Text": "text"}, predict=[{"other": "dull"}]).split("predict")


def test_two_columns_cannot_be_renamed_to_the_same_name(make_data):
    with pytest.raises(ValueError, match=r"gives the columns \['title', 'body'\] the same name 'text'"):
        make_data(rename_columns={"title": "text", "body": "text"})


def test_lines_of_a_text_file_are_rows_of_the_column_of_the_template(make_data, tmp_path):
    (tmp_path / "a.txt").write_text("warm\n\ndull\n")
    module = make_data(template="{review} it was {target}", predict=str(tmp_path / "a.txt"))
    assert [module.describe_row("predict", i)["input"] for i in range(2)] == ["warm it was", "dull it was"]
    renamed = make_data(rename_columns={"Review": "text"}, predict=str(tmp_path / "a.txt"))
    assert renamed.describe_row("predict", 1)["input"] == "dull it was"


def test_a_split_without_usable_rows_is_rejected(make_data):
    with pytest.raises(
        ValueError, match=r"no test rows are left to use: all 1 were skipped, the first: row 0 .*neutral"
    ):
        make_data(test=make_rows(["neutral"]), on_bad_row="skip").split("test")


def test_a_single_training_row_is_too_few_for_a_validation_share(make_data):
    with pytest.raises(ValueError, match=r"no train rows are left to use: 0.1 of the 1 training rows, at least one"):
        make_data(train=make_rows(["negative"])).split("train")
    assert labels_of(make_data(train=make_rows(["negative"]), validation=make_rows(["positive"]))) == [0]


def test_a_split_without_source_is_rejected_with_the_option_to_set(make_data):
    with pytest.raises(ValueError, match=r"no source of test rows; set data\.test or data\.path"):
        make_data(train=make_rows([0, 1])).split("test")


def test_rows_to_predict_require_no_labels(make_data):
    module = make_data(predict=[{"text": "warm"}, {"text": "dull", "label": "neutral"}])
    (batch,) = module.predict_dataloader()
    assert batch.labels is None
    assert batch.row_ids == (0, 1)
    assert module.describe_row("predict", 1) == {"row": 1, "input": "dull it was", "target": None}


def test_a_row_is_described_by_its_input_and_target(make_data):
    module = make_data(test=make_rows([1]), template="{soft}{text}{soft} it was {target} .")
    assert module.describe_row("test", 0) == {"row": 0, "input": "warm it was .", "target": "good"}


@pytest.mark.parametrize(
    "change",
    [
        {"predict": [{"text": "warm"}, {"text": "sad"}]},
        {"predict": [{"text": "dull"}, {"text": "warm"}]},
        {"template": "{text} it is {target}"},
        {"labels": {"negative": "dull", "positive": ["good", "great"]}},
        {"max_tokens": 4},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_identity_of_rows_changes_with_all_that_affects_predictions(make_data, change):
    arguments = {"predict": [{"text": "warm"}, {"text": "dull"}]}
    identity = make_data(**arguments).identity("predict")
    assert make_data(**arguments, batch_size=3).identity("predict") == identity
    assert make_data(**{**arguments, **change}).identity("predict") != identity


# Tokens


def test_batches_contain_every_row_once_with_its_label(make_data):
    rows = make_rows([0, 1, 1, 0, 1, 0, 0])
    module = make_data(test=rows, validation=rows, batch_size=2, eval_batch_size=3)
    expected = {}
    for i, row in enumerate(rows):
        word = LABELS["negative"] if row["label"] == 0 else LABELS["positive"][0]
        expected[i] = (row["label"], f"{row['text']} it was {word}")
    for loader in (module.test_dataloader(), module.val_dataloader()):
        batches = list(loader)
        assert sorted(map(len, batches)) == [1, 3, 3]
        rows_read = {}
        for batch in batches:
            texts = [module.codec.decode(ids[None])[0] for ids in batch.input_ids]
            rows_read |= dict(zip(batch.row_ids, zip(batch.labels.tolist(), texts, strict=True), strict=True))
        assert rows_read == expected


def test_all_columns_are_truncated_unless_some_are_named(make_data, caplog):
    rows = [{"text": "warm funny dull", "other": "sad sad", "label": 0}]
    template = "{text} , {other} {target}"

    def encode_and_decode(**arguments):
        module = make_data(test=rows, template=template, **arguments)
        return module.codec.decode(torch.tensor([module.split("test").encoded[0].ids]))[0]

    assert encode_and_decode() == "warm funny dull , sad sad bad"
    with caplog.at_level(logging.INFO):
        assert encode_and_decode(max_tokens=6) == "warm funny dull , bad"
    assert "Truncated 1 of 1 test rows to max_tokens=6" in caplog.text
    assert encode_and_decode(max_tokens=6, truncate=["text"]) == "warm , sad sad bad"
    with pytest.raises(ValueError, match="row 0 of the given rows: a row exceeds max_tokens by 3 tokens"):
        encode_and_decode(max_tokens=5, truncate=["other"])


def test_the_target_of_a_class_has_no_end_of_sequence(make_data):
    assert EOS not in make_data(test=make_rows([0])).split("test").encoded[0].targets
