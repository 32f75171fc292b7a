import logging

import pytest
import torch
from row_files import write_rows
from tiny import FAMILIES as ALL_FAMILIES
from tiny import on_side

from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.types import IGNORE, NO_TOKEN
from lightning_softprompt.data.tagging import TaggingDataModule

TAGS = ["O", "B-MOOD", "I-MOOD", "B-THING"]
ROWS = [
    {"tokens": ["a", "very", "good", "film!"], "tags": ["O", "B-MOOD", "I-MOOD", "B-THING"]},
    {"tokens": ["that", "dog", "is", "well,bad", "indeed"], "tags": ["O", "B-THING", "O", "B-MOOD", "I-MOOD"]},
    {"tokens": ["dull"], "tags": ["B-MOOD"]},
]


@pytest.fixture
def make_data(tiny_folder):
    """Returns a function that creates a data module with the tokenizer of a tiny backbone."""

    def make_data(family="llama", **arguments):
        spec = BackboneSpec(name=str(tiny_folder(family)))
        return TaggingDataModule(backbone=spec, **{"tags": TAGS, "cache": False, **arguments})

    return make_data


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("template", ["{soft}{tokens}{target}", "long text{soft} : {tokens}{soft} . it is {target} !"])
@pytest.mark.parametrize("max_tokens", [99, 11])
def test_each_tag_is_at_the_first_token_of_its_word(make_data, family, side, template, max_tokens):
    options = {"max_tokens": max_tokens, "truncate": ["tokens"], "batch_size": 3}
    module = make_data(family, test=ROWS, template=template, **options)
    module.codec = on_side(module.codec, side)
    (batch,) = module.test_dataloader()
    positions = []
    for b, row_id in enumerate(batch.row_ids):
        words, tags = ROWS[row_id]["tokens"], ROWS[row_id]["tags"]
        for w, word in enumerate(words):
            position = int(batch.words[b, w])
            if position == NO_TOKEN:
                assert int(batch.labels[b, w]) == IGNORE
                continue
            assert batch.input_ids[b, position] == module.codec.ids(word)[0]
            assert TAGS[batch.labels[b, w]] == tags[w]
            positions.append((b, position))
        assert set(batch.words[b, len(words) :].tolist()) <= {IGNORE}
    assert len(set(positions)) == len(positions)
    assert batch.source[tuple(torch.tensor(positions).T)].all()
    is_truncated = max_tokens == 11 and "text" in template
    assert (len(positions) < 10) == is_truncated


def test_truncated_words_have_no_tags_and_are_reported(make_data, caplog):
    with caplog.at_level(logging.INFO):
        module = make_data(test=ROWS, max_tokens=5)
        (batch,) = module.test_dataloader()
    assert "Truncated 2 of 3 test rows to max_tokens=5" in caplog.text
    assert "1 words of the test rows have no token after truncation and are not scored" in caplog.text
    row = batch.row_ids.index(1)
    assert batch.labels[row].tolist() == [0, 3, 0, 1, IGNORE]


def test_a_row_without_any_word_after_truncation_is_rejected(make_data):
    with pytest.raises(ValueError, match="row 0 of the given rows: none of the 4 words of a row has a token"):
        make_data(test=ROWS, max_tokens=5, template="one sad story , {tokens}{target}").split("test")


def test_a_word_can_contain_a_space(make_data):
    rows = [{"tokens": ["one dog", "ends"], "tags": [0, 3]}]
    (batch,) = make_data(test=rows).test_dataloader()
    assert batch.words.tolist() == [[1, 3]]
    assert batch.labels.tolist() == [[0, 3]]


def test_cached_tokens_depend_on_the_boundaries_of_words(make_data):
    def word_positions(*words):
        rows = [{"tokens": list(words), "tags": [0] * len(words)}]
        return make_data(test=rows, cache=True).split("test").encoded[0].words

    assert word_positions("one dog", "ends") == (1, 3)
    assert word_positions("one", "dog", "ends") == (1, 2, 3)
    assert word_positions("one dog", "ends") == (1, 3)


def test_tags_can_be_numbers_and_in_other_columns(make_data):
    rows = [{"words": ["a", "dog"], "ner": [0, "B-THING"], "text": "sad"}]
    module = make_data(test=rows, tokens_column="words", tags_column="ner", template="{text} : {words}{target}")
    assert module.split("test").examples[0].label == (0, 3)
    assert module.describe_row("test", 0) == {"row": 0, "input": "sad : a dog", "target": ["O", "B-THING"]}
    assert make_data(test=rows, tokens_column="words", tags_column="ner").template.text == "{soft}{words}{target}"


def test_tags_are_inferred_from_the_training_rows(make_data):
    module = make_data(tags=None, train=ROWS, test=ROWS)
    assert module.names == module.evaluation.names == module.classes.names == tuple(sorted(TAGS))
    assert module.split("test").examples[2].label == (0,)


def test_numbers_are_not_positions_if_the_names_of_tags_are_numbers(make_data):
    rows = [{"tokens": ["a"], "tags": [number]} for number in (1, 0)]
    module = make_data(test=rows, tags=["1", "2"])
    with pytest.raises(ValueError, match=r"row 1 .*unknown tag 0 of 'a'; tags are \['1', '2'\]: set data\.tags"):
        module.split("test")
    (example,) = make_data(test=rows[:1], tags=[1, 2]).split("test").examples
    assert example.label == (0,)


def test_an_empty_tag_is_rejected(make_data):
    rows = [{"tokens": ["a", "dog"], "tags": ["O", "B"]}, {"tokens": ["a"], "tags": [""]}]
    module = make_data(test=rows, train=rows, tags=None)
    assert module.names == ("B", "O")
    with pytest.raises(ValueError, match=r"row 1 .*unknown tag '' of 'a'"):
        module.split("test")
    with pytest.raises(ValueError, match=r"tags: a name or word is empty"):
        _ = make_data(test=rows, tags=["O", ""]).names


def test_a_missing_tags_column_is_reported_with_the_option_to_set(make_data):
    rows = [{"tokens": ["a"], "ner_tags": ["O"]}]
    with pytest.raises(ValueError, match=r"no column 'tags' in the training rows, .*'ner_tags'.*data\.tags_column"):
        _ = make_data(test=rows, train=rows, tags=None).names


def test_rows_to_predict_require_no_tags(make_data):
    module = make_data(predict=[{"tokens": ["a", "dog"]}, {"tokens": ["dull"], "tags": "what"}])
    (batch,) = module.predict_dataloader()
    assert batch.labels is None
    assert batch.words.tolist() == [[1, 2], [1, IGNORE]]
    assert module.describe_row("predict", 0) == {"row": 0, "input": "a dog", "target": None}


BAD_ROWS = {
    "fewer tags": ({"tokens": ["a", "dog"], "tags": ["O"]}, "there are 2 words and 1 tags"),
    "more tags": ({"tokens": ["a"], "tags": ["O", "O"]}, "there are 1 words and 2 tags"),
    "unknown tag": ({"tokens": ["a", "dog"], "tags": ["O", "B-DOG"]}, r"unknown tag 'B-DOG' of 'dog'; tags are \['O',"),
    "unknown number": ({"tokens": ["a"], "tags": [4]}, "unknown tag 4 of 'a'"),
    "negative number": ({"tokens": ["a"], "tags": [-1]}, "unknown tag -1 of 'a'"),
    "no tags": ({"tokens": ["a"]}, r"no column 'tags'; the row has \['tokens'\]: set data\.tags_column"),
    "no words": ({"text": "a dog", "tags": ["O"]}, r"no column 'tokens'.* set data\.tokens_column"),
    "empty row": ({"tokens": [], "tags": []}, r"'tokens' must contain non-empty words, got \[\]"),
    "empty word": ({"tokens": ["a", ""], "tags": ["O", "O"]}, "non-empty words"),
    "text for words": ({"tokens": "a dog", "tags": ["O", "O"]}, "'tokens' must be a list of str, got 'a dog'"),
    "numbers for words": ({"tokens": [1], "tags": ["O"]}, r"'tokens' must be a list of str, got \[1\]"),
    "text for tags": ({"tokens": ["a"], "tags": "O"}, "'tags' must be a list of str or int, got 'O'"),
    "bool for tags": ({"tokens": ["a"], "tags": [True]}, "'tags' must be a list of str or int"),
    "lists for tags": ({"tokens": ["a"], "tags": [["O"]]}, "'tags' must be a list of str or int"),
}


@pytest.mark.parametrize(("row", "message"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_bad_row_is_reported_with_its_file_and_line(make_data, tmp_path, row, message):
    file = write_rows(tmp_path / "test.jsonl", [ROWS[0], row])
    with pytest.raises(ValueError, match=rf"test\.jsonl:2: .*{message}"):
        make_data(test=file).split("test")
    assert len(make_data(test=file, on_bad_row="skip").split("test")) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"template": "{soft}{text}{target}"}, r"must contain the words \{tokens\} once, before \{target\}"),
        ({"template": "{tokens} {tokens}{target}"}, "once"),
        ({"template": "{target} {tokens}"}, "before"),
        ({"template": "{{tokens}}{target}"}, "once"),
    ],
)
def test_a_template_without_the_words_before_the_target_is_rejected(make_data, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_data(**arguments)


@pytest.mark.parametrize(
    ("tags", "rows", "message"),
    [
        (["O"], ROWS, "at least two different tags"),
        (["O", "B", "O"], ROWS, "at least two different tags"),
        (None, [{"tokens": ["a"], "tags": ["O"]}], "at least two different tags"),
        (None, [{"tokens": ["a"], "tags": [1]}], r"are numbers; set data\.tags to the names of the tags in order"),
    ],
)
def test_too_few_or_unnamed_tags_are_rejected(make_data, tags, rows, message):
    with pytest.raises(ValueError, match=message):
        make_data(tags=tags, train=rows).split("train")
