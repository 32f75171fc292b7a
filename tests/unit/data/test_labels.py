"""Labels of rows, and the classes of a data module."""

import pytest
from labelled_rows import LABELS, labels_of, make_rows
from row_files import write_rows

from lightning_softprompt.evaluation.classification import ClassificationEvaluation


@pytest.mark.parametrize("negative", ["negative", 0, "0", " 0 "])
def test_a_label_is_a_name_or_a_number(make_data, negative):
    module = make_data(train=make_rows([negative, "positive", 1, "1"]), test=make_rows([negative, 1]))
    assert labels_of(module, "test") == [0, 1]
    assert [example.target for example in module.split("test").examples] == ["bad", "good"]


def test_an_inferred_label_without_a_training_row_is_rejected_with_its_file_and_line(make_data, tmp_path):
    file = write_rows(tmp_path / "validation.jsonl", make_rows(["positive", "odd"]))
    module = make_data(labels=None, train=make_rows(["negative", "positive"]), validation=file)
    with pytest.raises(ValueError, match=r"validation\.jsonl:2: unknown label 'odd'; labels are \["):
        module.split("validation")


def test_a_row_of_half_a_megabyte_is_truncated(make_data):
    text = "a warm and funny film " * 20_000
    module = make_data(train=[{"text": text, "label": name} for name in ("negative", "positive")], max_tokens=12)
    assert [len(row.ids) for row in module.split("train").encoded] == [12]  # the other row is the validation split


@pytest.mark.parametrize("label", ["neutral", 2, -1, "2", True, 0.0, ["negative"]])
def test_an_unknown_label_is_rejected_with_its_file_and_line(make_data, tmp_path, label):
    file = write_rows(tmp_path / "test.jsonl", make_rows([0, 1, label]))
    with pytest.raises(ValueError, match=r"test\.jsonl:3: unknown label .* labels are \['negative', 'positive'\]"):
        make_data(test=file).split("test")


def test_a_number_that_is_a_class_name_is_not_a_position(make_data):
    module = make_data(labels=["1", "0"], test=make_rows(["0", "1"]))
    assert labels_of(module, "test") == [1, 0]


@pytest.mark.parametrize("label", [None, "", " ", float("nan")])
@pytest.mark.parametrize("labels", [LABELS, None], ids=["given", "inferred"])
def test_a_row_without_a_label_is_a_bad_row_and_defines_no_class(make_data, label, labels):
    rows = make_rows(["negative", "positive", label])
    module = make_data(labels=labels, train=rows, test=rows)
    assert list(module.words) == ["negative", "positive"]
    with pytest.raises(ValueError, match=r"row 2 of the given rows: column 'label' has no label, got"):
        module.split("test")
    assert labels_of(make_data(labels=labels, train=rows, test=rows, on_bad_row="skip"), "test") == [0, 1]


def test_spaces_around_labels_are_ignored(make_data):
    module = make_data(labels=None, train=make_rows(["sad ", "good", " sad"]), test=make_rows(["sad", "good\t"]))
    assert list(module.words) == ["good", "sad"]
    assert labels_of(module, "test") == [1, 0]


def test_a_class_name_with_a_space_differs_from_the_one_without(make_data):
    module = make_data(labels={" a": "bad", "a": "good"}, test=make_rows([" a", "a", "a "]))
    assert labels_of(module, "test") == [0, 1, 1]


@pytest.mark.parametrize("mark", ["\u200b", "\ufeff", "\u2060", "\u200f"])
def test_characters_without_width_are_ignored(make_data, mark):
    train, test = make_rows([f"{mark}sad", "good", "sad"]), make_rows([f"sad{mark} "])
    module = make_data(labels=None, train=train, test=test)
    assert list(module.words) == ["good", "sad"]
    assert labels_of(module, "test") == [1]
    with pytest.raises(ValueError, match="column 'label' has no label"):
        make_data(test=make_rows([mark])).split("test")


@pytest.mark.parametrize("numbers", [(1, 1.0), ("1", "1.0"), (1, "1.0")])
def test_two_spellings_of_a_number_are_rejected_as_classes(make_data, numbers):
    with pytest.raises(ValueError, match=r"have both labels '1' and '1.0', which are one number"):
        make_data(labels=None, train=make_rows([*numbers, 2])).split("train")
    assert list(make_data(labels=None, train=make_rows(["v1", "v1.0"])).words) == ["v1", "v1.0"]


@pytest.mark.parametrize("label", [["joy"], {"name": "joy"}, "['joy']"])
def test_a_list_or_object_is_not_a_label(make_data, label):
    module = make_data(labels=None, train=make_rows(["sad", "good", label]), validation=make_rows(["sad"]))
    assert list(module.words) == ["good", "sad"]
    with pytest.raises(ValueError, match="row 2 of the given rows: unknown label"):
        module.split("train")


@pytest.mark.parametrize(
    "labels",
    [{1: "good", 0: "bad"}, {"1": "good", "0": "bad"}, {"1": "good", 0: ["bad", "awful"]}],
    ids=["numbers", "texts", "mixed"],
)
def test_class_names_are_text_whether_or_not_a_config_quotes_them(make_data, labels):
    """Otherwise the number of a row would be read as a position, and the classes would be swapped."""
    module = make_data(labels=labels, test=make_rows([1, 0, "1", "0"]))
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
def test_empty_class_names_and_words_that_yaml_converted_are_rejected(make_data, labels, message):
    with pytest.raises(ValueError, match=message):
        make_data(labels=labels, test=make_rows([0])).split("test")


def test_label_words_can_be_numbers(make_data):
    module = make_data(labels={"negative": 0, "positive": 1}, test=make_rows(["positive"]))
    assert module.words == {"negative": ["0"], "positive": ["1"]}


@pytest.mark.parametrize("label", [0, "0", 6, "6"])
def test_a_number_is_not_a_position_if_class_names_are_numbers(make_data, label):
    labels = {"1": "bad", "2": "sad", "3": "fine", "4": "good", "5": "great"}
    with pytest.raises(ValueError, match=r"row 1 .*unknown label .*; labels are \['1', '2', '3', '4', '5'\]$"):
        make_data(labels=labels, test=make_rows([5, label])).split("test")


@pytest.mark.parametrize("name", ["não", "não"], ids=["composed", "decomposed"])
@pytest.mark.parametrize("label", ["não", "não"], ids=["composed", "decomposed"])
def test_labels_are_equal_in_composed_and_decomposed_unicode(make_data, name, label):
    assert labels_of(make_data(labels={"sim": "good", name: "bad"}, test=make_rows([label])), "test") == [1]
    rows = make_rows(["sim", name, label])
    assert list(make_data(labels=None, train=rows).words) == ["não", "sim"]


def test_a_missing_label_column_is_reported_with_the_option_to_set(make_data):
    rows = [{"message": "warm", "kind": "good"}]
    with pytest.raises(ValueError, match=r"no column 'label'; .*'kind', 'message'.*set data\.label"):
        _ = make_data(labels=None, train=rows).classes


@pytest.mark.parametrize("column", ["text", "label"])
def test_a_missing_column_is_reported_with_its_file_and_line(make_data, tmp_path, column):
    rows = make_rows([0, 1])
    del rows[1][column]
    file = write_rows(tmp_path / "test.jsonl", rows)
    with pytest.raises(ValueError, match=rf"test\.jsonl:2: no column '{column}'; the row has \["):
        make_data(test=file).split("test")


@pytest.mark.parametrize("value", [None, 3, ["a"]])
def test_a_column_that_is_not_text_is_reported_with_its_file_and_line(make_data, tmp_path, value):
    file = write_rows(tmp_path / "test.jsonl", [*make_rows([0]), {"text": value, "label": 1}])
    with pytest.raises(ValueError, match=rf"jsonl:2: column 'text' must be text, got .* \({type(value).__name__}"):
        make_data(test=file).split("test")


def test_a_text_to_classify_can_be_empty(make_data):
    assert len(make_data(test=[{"text": "", "label": 1}]).split("test")) == 1


def test_labels_can_be_in_another_column(make_data):
    rows = [{"text": "warm", "mood": "positive", "label": "what"}]
    assert labels_of(make_data(label="mood", test=rows), "test") == [1]


def test_labels_are_inferred_from_the_training_rows(make_data):
    module = make_data(labels=None, train=make_rows(["sad", "funny", "long", "sad"]))
    assert module.classes.words == {"funny": [" funny"], "long": [" long"], "sad": [" sad"]}
    assert sorted(labels_of(module) + labels_of(module, "validation")) == [0, 1, 2, 2]
    assert isinstance(module.evaluation, ClassificationEvaluation)
    assert module.evaluation.names == ("funny", "long", "sad")


@pytest.mark.parametrize("numbers", [[1, 2], range(12)])
def test_inferred_class_names_are_the_numbers_of_the_rows(make_data, numbers):
    rows = make_rows(numbers)
    module = make_data(labels=None, train=rows, test=rows)
    names = module.evaluation.names
    assert [names[label] for label in labels_of(module, "test")] == [str(number) for number in numbers]


@pytest.mark.parametrize("labels", [["good"], {"good": []}, {"good": "good", "bad": []}])
def test_fewer_than_two_classes_with_words_are_rejected(make_data, labels):
    with pytest.raises(ValueError, match="at least two classes, each with a label word"):
        make_data(labels=labels, test=make_rows([0])).split("test")


def test_label_words_start_with_the_space_of_the_template(make_data):
    assert make_data().classes.words == {"negative": [" bad"], "positive": [" good", " great"]}
    assert make_data(template="{text}\n{target}").classes.words == {"negative": ["bad"], "positive": ["good", "great"]}
    assert make_data().classes.template == "{text} it was {target}"
