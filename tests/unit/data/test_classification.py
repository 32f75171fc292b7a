import json
import logging
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny import EOS

from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.types import Encoded
from lightning_softprompt.data import token_cache
from lightning_softprompt.data.classification import ClassificationDataModule
from lightning_softprompt.evaluation.classification import ClassificationEvaluation
from lightning_softprompt.system.cache_dirs import cache_folder

LABELS = {"negative": "bad", "positive": ["good", "great"]}
WORDS = ["warm", "funny", "dull", "sad", "long"]


@pytest.fixture
def data(tiny_folder):
    """A data module with a Llama's tokenizer; no weights are loaded for it."""

    def data(**arguments):
        given = {"template": "{text} it was {target}", "labels": LABELS, "cache": False, **arguments}
        return ClassificationDataModule(backbone=BackboneSpec(name=str(tiny_folder("llama"))), **given)

    return data


def rows_of(labels, **columns):
    texts = [" ".join(WORDS[: 1 + i % len(WORDS)]) for i in range(len(labels))]
    return [{"text": text, "label": label, **columns} for text, label in zip(texts, labels, strict=True)]


def written(path: Path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def labels_of(data, split="train"):
    return [example.label for example in data.split(split).examples]


# Labels


@pytest.mark.parametrize("negative", ["negative", 0, "0", " 0 "])
def test_a_label_is_a_name_or_a_number(data, negative):
    module = data(train=rows_of([negative, "positive", 1, "1"]), test=rows_of([negative, 1]))
    assert labels_of(module, "test") == [0, 1]
    assert [example.target for example in module.split("test").examples] == ["bad", "good"]


def test_a_label_that_no_training_row_has_names_its_file_and_line(data, tmp_path):
    """Where classes are those of the training rows."""
    (tmp_path / "validation.jsonl").write_text('{"text": "dull", "label": "positive"}\n{"text": "?", "label": "odd"}\n')
    module = data(labels=None, train=rows_of(["negative", "positive"]), validation=str(tmp_path / "validation.jsonl"))
    with pytest.raises(ValueError, match=r"validation\.jsonl:2: unknown label 'odd'; labels are \["):
        module.split("validation")


def test_a_row_of_half_a_megabyte_is_cut_like_any_other(data):
    text = "a warm and funny film " * 20_000
    module = data(train=[{"text": text, "label": name} for name in ("negative", "positive")], max_tokens=12)
    assert [len(row.ids) for row in module.split("train").encoded] == [12]  # the other is held out


@pytest.mark.parametrize("label", ["neutral", 2, -1, "2", True, 0.0, ["negative"]])
def test_an_unknown_label_names_its_file_and_line(data, tmp_path, label):
    file = written(tmp_path / "test.jsonl", rows_of([0, 1, label]))
    with pytest.raises(ValueError, match=r"test\.jsonl:3: unknown label .* labels are \['negative', 'positive'\]"):
        data(test=file).split("test")


def test_a_number_that_is_a_name_means_the_name(data):
    module = data(labels=["1", "0"], test=rows_of(["0", "1"]))
    assert labels_of(module, "test") == [1, 0]


@pytest.mark.parametrize("label", [None, "", " ", float("nan")])
@pytest.mark.parametrize("labels", [LABELS, None], ids=["given", "inferred"])
def test_a_row_without_a_label_is_a_bad_row_and_no_class(data, label, labels):
    rows = rows_of(["negative", "positive", label])
    module = data(labels=labels, train=rows, test=rows)
    assert list(module.words) == ["negative", "positive"]
    with pytest.raises(ValueError, match=r"row 2 of the given rows: column 'label' has no label, got"):
        module.split("test")
    assert labels_of(data(labels=labels, train=rows, test=rows, on_bad_row="skip"), "test") == [0, 1]


def test_spaces_around_labels_make_no_other_class(data):
    module = data(labels=None, train=rows_of(["sad ", "good", " sad"]), test=rows_of(["sad", "good\t"]))
    assert list(module.words) == ["good", "sad"]
    assert labels_of(module, "test") == [1, 0]
    assert labels_of(data(labels={" a": "bad", "a": "good"}, test=rows_of([" a", "a", "a "])), "test") == [0, 1, 1]


@pytest.mark.parametrize("mark", ["\u200b", "\ufeff", "\u2060", "\u200f"])
def test_characters_without_width_make_no_other_class(data, mark):
    module = data(labels=None, train=rows_of([f"{mark}sad", "good", "sad"]), test=rows_of([f"sad{mark} "]))
    assert (list(module.words), labels_of(module, "test")) == (["good", "sad"], [1])
    with pytest.raises(ValueError, match="column 'label' has no label"):
        data(test=rows_of([mark])).split("test")


@pytest.mark.parametrize("numbers", [(1, 1.0), ("1", "1.0"), (1, "1.0")])
def test_one_number_in_two_ways_makes_no_two_classes(data, numbers):
    with pytest.raises(ValueError, match=r"have both labels '1' and '1.0', which are one number"):
        data(labels=None, train=rows_of([*numbers, 2])).split("train")
    assert list(data(labels=None, train=rows_of(["v1", "v1.0"])).words) == ["v1", "v1.0"]


@pytest.mark.parametrize("label", [["joy"], {"name": "joy"}, "['joy']"])
def test_a_list_of_labels_is_no_class(data, label):
    module = data(labels=None, train=rows_of(["sad", "good", label]), validation=rows_of(["sad"]))
    assert list(module.words) == ["good", "sad"]
    with pytest.raises(ValueError, match="row 2 of the given rows: unknown label"):
        module.split("train")


@pytest.mark.parametrize(
    "labels",
    [{1: "good", 0: "bad"}, {"1": "good", "0": "bad"}, {"1": "good", 0: ["bad", "awful"]}],
    ids=["numbers", "texts", "mixed"],
)
def test_names_are_text_whether_a_config_quotes_them_or_not(data, labels):
    """Otherwise a row's number would be taken as a position, and classes change places."""
    module = data(labels=labels, test=rows_of([1, 0, "1", "0"]))
    assert labels_of(module, "test") == [0, 1, 0, 1]
    assert list(module.words) == ["1", "0"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({False: "bad", True: "good"}, "labels: a name or word is expected, got False.*put the word in quotes"),
        ({"negative": False, "positive": True}, "labels, class 'negative': .*got False.*quotes"),
        ({"negative": ["bad", None], "positive": "good"}, "labels, class 'negative': .*got None.*quotes"),
        ([False, True], "labels: a name or word is expected, got False"),
        ({"negative": "", "positive": "good"}, "labels, class 'negative': a name or word is empty, got ''"),
        ({"": "bad", "positive": "good"}, "labels: a name or word is empty"),
        ({1: "bad", "1": "good"}, "labels names the class '1' twice"),
        (["não", "não"], "each class needs a name of its own"),
    ],
)
def test_names_and_words_that_yaml_changed_or_that_are_empty_are_refused(data, labels, message):
    with pytest.raises(ValueError, match=message):
        data(labels=labels, test=rows_of([0])).split("test")


def test_words_may_be_numbers(data):
    module = data(labels={"negative": 0, "positive": 1}, test=rows_of(["positive"]))
    assert module.words == {"negative": ["0"], "positive": ["1"]}


@pytest.mark.parametrize("label", [0, "0", 6, "6"])
def test_a_number_is_no_position_where_names_are_numerals(data, label):
    labels = {"1": "bad", "2": "sad", "3": "fine", "4": "good", "5": "great"}
    with pytest.raises(ValueError, match=r"row 1 .*unknown label .*; labels are \['1', '2', '3', '4', '5'\]$"):
        data(labels=labels, test=rows_of([5, label])).split("test")


@pytest.mark.parametrize("name", ["não", "não"], ids=["composed", "decomposed"])
@pytest.mark.parametrize("label", ["não", "não"], ids=["composed", "decomposed"])
def test_labels_are_the_same_in_composed_and_decomposed_unicode(data, name, label):
    assert labels_of(data(labels={"sim": "good", name: "bad"}, test=rows_of([label])), "test") == [1]
    rows = rows_of(["sim", name, label])
    assert list(data(labels=None, train=rows).words) == ["não", "sim"]


def test_a_label_column_that_no_training_row_has_is_named_with_the_option(data):
    rows = [{"message": "warm", "category": "good"}]
    with pytest.raises(ValueError, match=r"no column 'label' .*'category', 'message'.*set data\.label"):
        _ = data(labels=None, train=rows).classes


@pytest.mark.parametrize("column", ["text", "label"])
def test_a_missing_column_names_its_file_and_line(data, tmp_path, column):
    rows = rows_of([0, 1])
    del rows[1][column]
    file = written(tmp_path / "test.jsonl", rows)
    with pytest.raises(ValueError, match=rf"test\.jsonl:2: no column '{column}'; the row has \["):
        data(test=file).split("test")


@pytest.mark.parametrize("value", [None, 3, ["a"]])
def test_a_column_that_is_no_text_names_its_file_and_line(data, tmp_path, value):
    file = written(tmp_path / "test.jsonl", [*rows_of([0]), {"text": value, "label": 1}])
    with pytest.raises(ValueError, match=rf"jsonl:2: column 'text' must be text, got .* \({type(value).__name__}"):
        data(test=file).split("test")


def test_a_text_to_be_classified_may_be_empty(data):
    assert len(data(test=[{"text": "", "label": 1}]).split("test")) == 1


def test_labels_may_stand_in_another_column(data):
    rows = [{"text": "warm", "mood": "positive", "label": "what"}]
    assert labels_of(data(label="mood", test=rows), "test") == [1]


def test_labels_are_inferred_from_the_training_rows(data):
    module = data(labels=None, train=rows_of(["sad", "funny", "long", "sad"]))
    assert module.classes.words == {"funny": [" funny"], "long": [" long"], "sad": [" sad"]}
    assert sorted(labels_of(module) + labels_of(module, "validation")) == [0, 1, 2, 2]
    assert isinstance(module.evaluation, ClassificationEvaluation)
    assert module.evaluation.names == ("funny", "long", "sad")


@pytest.mark.parametrize("numbers", [[1, 2], range(12)])
def test_numbers_are_inferred_as_themselves(data, numbers):
    rows = rows_of(numbers)
    module = data(labels=None, train=rows, test=rows)
    names = module.evaluation.names
    assert [names[label] for label in labels_of(module, "test")] == [str(number) for number in numbers]


@pytest.mark.parametrize("labels", [["good"], {"good": []}, {"good": "good", "bad": []}])
def test_fewer_than_two_classes_with_words_is_an_error(data, labels):
    with pytest.raises(ValueError, match="at least two classes, each with a label word"):
        data(labels=labels, test=rows_of([0])).split("test")


def test_words_get_the_spaces_of_the_template(data):
    assert data().classes.words == {"negative": [" bad"], "positive": [" good", " great"]}
    assert data(template="{text}\n{target}").classes.words == {"negative": ["bad"], "positive": ["good", "great"]}
    assert data().classes.template == "{text} it was {target}"


# Which rows


def test_shots_are_so_many_of_each_class_by_the_seed(data):
    rows = rows_of([0] * 20 + [1] * 9)
    held_out = rows_of([0, 1])

    def chosen(seed):
        module = data(train=rows, validation=held_out, shots=4, seed=seed)
        return module.split("train").where

    module = data(train=rows, validation=held_out, shots=4)
    assert Counter(labels_of(module)) == {0: 4, 1: 4}
    assert chosen(0) == chosen(0) == module.split("train").where
    assert chosen(0) != chosen(1)
    assert len(set(chosen(0))) == 8


def test_too_few_shots_is_an_error_that_says_how_many_there_are(data):
    with pytest.raises(ValueError, match=r"shots=4 rows of each class.*only \{'positive': 2\}"):
        data(train=rows_of([0] * 5 + [1] * 2), validation=rows_of([0]), shots=4).split("train")


@pytest.mark.parametrize("option", [{"shots": 0}, {"shots": -1}, {"demonstrations": -1}])
def test_a_number_of_rows_is_not_negative(data, option):
    with pytest.raises(ValueError, match=rf"{next(iter(option))} must be at least \d, got"):
        data(train=rows_of(["negative", "positive"]), **option)


def test_balanced_rows_are_drawn_equally_often(data):
    rows = rows_of([0] * 90 + [1] * 10)
    plain, balanced = (data(train=rows, validation=rows[:1], balanced=b, batch_size=10) for b in (False, True))
    assert plain.weights(plain.split("train").examples) is None
    weights = balanced.weights(balanced.split("train").examples)
    for label in (0, 1):
        assert sum(w for w, y in zip(weights, labels_of(balanced), strict=True) if y == label) == pytest.approx(1)
    share = {}
    for module in (plain, balanced):
        labels = torch.cat([batch.labels for batch in module.train_dataloader()]).float()
        share[module] = float(labels.mean())
    assert share[plain] == pytest.approx(0.1)
    assert 0.3 < share[balanced] < 0.7  # 100 draws at 0.5: four standard deviations


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_without_validation_rows_a_share_is_held_out(data, share):
    rows = rows_of([i % 2 for i in range(40)])

    def split(**arguments):
        module = data(train=rows, validation_share=share, **arguments)
        return module.split("train").where, module.split("validation").where

    train, validation = split()
    assert len(validation) == round(40 * share)
    assert not set(train) & set(validation)
    assert len(set(train) | set(validation)) == 40
    assert split() == (train, validation)
    assert split(seed=1)[1] != validation


def test_validation_rows_that_are_given_are_taken(data, tmp_path):
    written(tmp_path / "train.jsonl", rows_of([0] * 10))
    written(tmp_path / "validation.jsonl", rows_of([1] * 3))
    module = data(path=str(tmp_path))
    assert (labels_of(module), labels_of(module, "validation")) == ([0] * 10, [1] * 3)


def test_bad_rows_may_be_skipped_and_are_told(data, tmp_path, caplog):
    rows = [*rows_of([0, "neutral", 1]), {"text": None, "label": 0}]
    file = Path(written(tmp_path / "test.jsonl", rows))
    file.write_text(file.read_text() + "{not json\n")
    with caplog.at_level(logging.WARNING):
        module = data(test=str(file), on_bad_row="skip")
        assert labels_of(module, "test") == [0, 1]
    assert "3 of the test rows were skipped, the first" in caplog.text
    caplog.clear()
    module = data(train=rows_of([0, "neutral", 1]), on_bad_row="skip")
    assert len(module.split("train")) + len(module.split("validation")) == 2
    assert caplog.text.count("1 of the train rows were skipped") == 1


def test_rows_are_numbered_as_in_their_source_where_others_were_skipped(data, tmp_path):
    file = Path(written(tmp_path / "rows.jsonl", [{"text": "warm"}, {"text": None}, {"text": "dull"}]))
    file.write_text("{not json\n" + file.read_text())
    module = data(predict=str(file), on_bad_row="skip")
    assert module.source_rows("predict") == [1, 3]
    assert [module.describe_row("predict", i)["row"] for i in range(2)] == [1, 3]
    same = data(predict=[{"text": "warm"}, {"text": "dull"}])
    assert module.identity("predict") != same.identity("predict")  # a file of predictions does not go on under both


def test_rows_of_several_files_name_their_file(data, tmp_path):
    files = [written(tmp_path / f"{name}.jsonl", rows_of([0, 1])) for name in "ab"]
    for source in (files, str(tmp_path / "*.jsonl")):
        module = data(predict=source)
        shown = [module.describe_row("predict", i) for i in range(4)]
        assert [(row["row"], row["file"]) for row in shown] == [
            (0, files[0]),
            (1, files[0]),
            (0, files[1]),
            (1, files[1]),
        ]
    assert "file" not in data(predict=files[:1]).describe_row("predict", 0)


def test_a_file_or_pattern_is_no_path_of_splits(data, tmp_path):
    file = written(tmp_path / "train.csv", [])
    for path in (file, str(tmp_path / "*.csv")):
        with pytest.raises(
            ValueError, match=r"data.path must be a folder of splits .*names files: set data.train, data.test"
        ):
            data(path=path)


@pytest.mark.parametrize("share", [0, -0.5, 1, 2, float("nan")])
def test_a_share_that_is_held_out_lies_between_none_and_all(data, share):
    with pytest.raises(ValueError, match=rf"validation_share must be between 0 and 1, got {share}"):
        data(train=rows_of([0, 1]), validation_share=share)


@pytest.mark.parametrize(("template", "warns"), [(r"{text}\nIt: {target}", True), ("{text}\nIt: {target}", False)])
def test_a_line_break_that_a_shell_left_as_a_backslash_is_worth_a_warning(data, caplog, template, warns):
    data(template=template)
    assert ("For a line break or tab" in caplog.text) == warns


def test_columns_are_named_as_they_are_or_renamed(data, tmp_path):
    row = {"Review Text": "warm", "target": 1}
    module = data(template="{Review Text} it was {target}", label="target", test=[row])
    assert module.describe_row("test", 0)["input"] == "warm it was"
    module = data(rename_columns={"Review Text": "text", "target": "label"}, test=[row], predict=[{"text": "dull"}])
    assert (module.describe_row("test", 0)["input"], labels_of(module, "test")) == ("warm it was", [1])
    assert module.describe_row("predict", 0)["input"] == "dull it was"  # which has the new name already
    with pytest.raises(ValueError, match=r"no column 'text'; the row has \['other'\]"):
        data(rename_columns={"Review Text": "text"}, predict=[{"other": "dull"}]).split("predict")


def test_two_columns_get_no_common_name(data):
    with pytest.raises(ValueError, match=r"gives the columns \['title', 'body'\] the same name 'text'"):
        data(rename_columns={"title": "text", "body": "text"})


def test_text_files_become_the_column_of_the_template(data, tmp_path):
    (tmp_path / "a.txt").write_text("warm\n\ndull\n")
    module = data(template="{review} it was {target}", predict=str(tmp_path / "a.txt"))
    assert [module.describe_row("predict", i)["input"] for i in range(2)] == ["warm it was", "dull it was"]
    renamed = data(rename_columns={"Review": "text"}, predict=str(tmp_path / "a.txt"))
    assert renamed.describe_row("predict", 1)["input"] == "dull it was"


def test_a_split_without_usable_rows_is_an_error(data):
    with pytest.raises(
        ValueError, match=r"no test rows are left to use: all 1 were skipped, the first: row 0 .*neutral"
    ):
        data(test=rows_of(["neutral"]), on_bad_row="skip").split("test")


def test_a_single_training_row_is_not_enough_to_hold_one_out(data):
    with pytest.raises(ValueError, match=r"no train rows are left to use: 0.1 of the 1 training rows, at least one"):
        data(train=rows_of(["negative"])).split("train")
    assert labels_of(data(train=rows_of(["negative"]), validation=rows_of(["positive"]))) == [0]


def test_a_split_without_source_is_an_error_that_says_what_to_set(data):
    with pytest.raises(ValueError, match=r"no source of test rows; set data\.test or data\.path"):
        data(train=rows_of([0, 1])).split("test")


def test_rows_to_be_predicted_need_no_labels(data):
    module = data(predict=[{"text": "warm"}, {"text": "dull", "label": "neutral"}])
    (batch,) = module.predict_dataloader()
    assert batch.labels is None
    assert batch.row_ids == (0, 1)
    assert module.describe_row("predict", 1) == {"row": 1, "input": "dull it was", "target": None}


def test_a_row_is_shown_as_it_is_read(data):
    module = data(test=rows_of([1]), template="{soft}{text}{soft} it was {target} .")
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
def test_rows_are_known_again_by_their_identity(data, change):
    given = {"predict": [{"text": "warm"}, {"text": "dull"}]}
    identity = data(**given).identity("predict")
    assert data(**given, batch_size=3).identity("predict") == identity
    assert data(**{**given, **change}).identity("predict") != identity


# Tokens


def test_batches_hold_every_row_once_with_its_label(data):
    rows = rows_of([0, 1, 1, 0, 1, 0, 0])
    module = data(test=rows, validation=rows, batch_size=2, eval_batch_size=3)
    for loader in (module.test_dataloader(), module.val_dataloader()):
        batches = list(loader)
        assert sorted(map(len, batches)) == [1, 3, 3]
        told = {row: label for b in batches for row, label in zip(b.row_ids, b.labels.tolist(), strict=True)}
        assert told == {i: row["label"] for i, row in enumerate(rows)}
        for batch in batches:
            for ids, row in zip(batch.input_ids, batch.row_ids, strict=True):
                said = module.codec.decode(ids[None])[0]
                assert said == f"{rows[row]['text']} it was {['bad', 'good'][rows[row]['label']]}"


def test_all_columns_give_way_unless_some_are_named(data, caplog):
    rows = [{"text": "warm funny dull", "other": "sad sad", "label": 0}]
    template = "{text} , {other} {target}"

    def said(**arguments):
        module = data(test=rows, template=template, **arguments)
        return module.codec.decode(torch.tensor([module.split("test").encoded[0].ids]))[0]

    assert said() == "warm funny dull , sad sad bad"
    with caplog.at_level(logging.INFO):
        assert said(max_tokens=6) == "warm funny dull , bad"
    assert "Truncated 1 of 1 test rows to max_tokens=6" in caplog.text
    assert said(max_tokens=6, truncate=["text"]) == "warm , sad sad bad"
    with pytest.raises(ValueError, match="row 0 of the given rows: a row exceeds max_tokens by 3 tokens"):
        said(max_tokens=5, truncate=["other"])


def test_the_target_of_a_class_is_not_closed(data):
    assert EOS not in data(test=rows_of([0])).split("test").encoded[0].targets


# The cache


@pytest.fixture
def no_tokenizing(monkeypatch):
    def forbid():
        def encode(*_, **__):
            raise AssertionError("tokenized again")

        monkeypatch.setattr(Codec, "encode", encode)

    return forbid


def test_rows_are_tokenized_once(data, no_tokenizing):
    rows = rows_of([0, 1, 1])
    first = data(test=rows, cache=True, max_tokens=6).split("test")
    no_tokenizing()
    again = data(test=rows, cache=True, max_tokens=6).split("test")
    assert again.encoded == first.encoded
    assert again.examples == first.examples


@pytest.mark.parametrize(
    "change",
    [
        {"template": "{text} it is {target}"},
        {"template": "{text}{soft} it was {target}"},
        {"max_tokens": 7},
        {"truncate": []},
        {"labels": {"negative": "dull", "positive": "good"}},
        {"test": rows_of([1, 1, 1])},
        {"cache": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_tokens_misses_the_cache(data, no_tokenizing, change):
    same = {"test": rows_of([0, 1, 1]), "cache": True, "max_tokens": 10}
    data(**same).split("test")
    no_tokenizing()
    with pytest.raises(AssertionError, match="tokenized again"):
        data(**{**same, **change}).split("test")


def test_another_tokenizer_misses_the_cache(data, no_tokenizing, tiny_folder):
    arguments = {"test": rows_of([0, 1]), "cache": True}
    data(**arguments).split("test")
    gpt2 = BackboneSpec(name=str(tiny_folder("gpt2")))
    other = ClassificationDataModule(template="{text} it was {target}", labels=LABELS, backbone=gpt2, **arguments)
    no_tokenizing()
    with pytest.raises(AssertionError, match="tokenized again"):
        other.split("test")


def test_a_damaged_cache_is_made_again(data, no_tokenizing):
    rows = rows_of([0, 1, 1])
    first = data(test=rows, cache=True).split("test")
    (file,) = cache_folder("tokens").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:40])
    assert data(test=rows, cache=True).split("test").encoded == first.encoded
    no_tokenizing()
    assert data(test=rows, cache=True).split("test").encoded == first.encoded


def test_what_is_packed_is_unpacked():
    rows = [
        Encoded((1, 2, 3), (2,), (3,), (0, 3), num_truncated=2),
        Encoded((4,), (), (), (1, 1)),
        Encoded((5, 6), (), (7, -100), (0, 1), (1, -1, 1)),
    ]
    assert token_cache.unpack(token_cache.pack(rows)) == rows
