import json
import logging

import pytest
import torch
from tiny import FAMILIES as ALL
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
def data(tiny_folder):
    """A data module with the tokenizer of a tiny backbone."""

    def data(family="llama", **arguments):
        given = {"tags": TAGS, "cache": False, **arguments}
        return TaggingDataModule(backbone=BackboneSpec(name=str(tiny_folder(family))), **given)

    return data


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("template", ["{soft}{tokens}{target}", "long text{soft} : {tokens}{soft} . it is {target} !"])
@pytest.mark.parametrize("most", [None, 11])
def test_each_tag_stands_at_the_first_token_of_its_word(data, family, side, template, most):
    module = data(family, test=ROWS, template=template, max_tokens=most or 99, truncate=["tokens"], batch_size=3)
    module.codec = on_side(module.codec, side)
    (batch,) = module.test_dataloader()
    at_words, seen = [], 0
    for b, number in enumerate(batch.row_ids):
        row = ROWS[number]
        for w, (word, tag) in enumerate(zip(row["tokens"], row["tags"], strict=True)):
            place = int(batch.words[b, w])
            if place == NO_TOKEN:
                assert int(batch.labels[b, w]) == IGNORE
                continue
            assert batch.input_ids[b, place] == module.codec.ids(word)[0]
            assert TAGS[batch.labels[b, w]] == tag
            at_words.append((b, place))
            seen += 1
        assert set(batch.words[b, len(row["tokens"]) :].tolist()) <= {IGNORE}
    assert len(set(at_words)) == len(at_words)
    assert batch.source[tuple(torch.tensor(at_words).T)].all()
    assert (seen < 10) == (most is not None and "text" in template)


def test_words_that_are_cut_lose_their_tags_and_are_counted(data, caplog):
    with caplog.at_level(logging.INFO):
        module = data(test=ROWS, max_tokens=5)
        (batch,) = module.test_dataloader()
    assert "Truncated 2 of 3 test rows to max_tokens=5" in caplog.text
    assert "1 words of the test rows have no token after truncation and are not scored" in caplog.text
    row = batch.row_ids.index(1)
    assert batch.labels[row].tolist() == [0, 3, 0, 1, IGNORE]


def test_a_row_with_all_words_cut_names_its_place(data):
    with pytest.raises(ValueError, match="row 0 of the given rows: none of the 4 words of a row has a token"):
        data(test=ROWS, max_tokens=5, template="one sad story , {tokens}{target}").split("test")


def test_words_with_spaces_are_one_word(data):
    rows = [{"tokens": ["one dog", "ends"], "tags": [0, 3]}]
    (batch,) = data(test=rows).test_dataloader()
    assert (batch.words.tolist(), batch.labels.tolist()) == ([[1, 3]], [[0, 3]])


def test_words_alone_decide_what_is_kept_on_disk(data):
    together, apart = ([{"tokens": t, "tags": [0] * len(t)}] for t in (["one dog", "ends"], ["one", "dog", "ends"]))
    said = [data(test=rows, cache=True).split("test").encoded[0].words for rows in (together, apart, together)]
    assert said == [(1, 3), (1, 2, 3), (1, 3)]


def test_tags_may_be_numbers_and_stand_in_other_columns(data):
    rows = [{"words": ["a", "dog"], "ner": [0, "B-THING"], "text": "sad"}]
    module = data(test=rows, tokens_column="words", tags_column="ner", template="{text} : {words}{target}")
    assert module.split("test").examples[0].label == (0, 3)
    assert module.describe_row("test", 0) == {"row": 0, "input": "sad : a dog", "target": ["O", "B-THING"]}
    assert data(test=rows, tokens_column="words", tags_column="ner").template.text == "{soft}{words}{target}"


def test_tags_are_inferred_from_the_training_rows(data):
    module = data(tags=None, train=ROWS, test=ROWS)
    assert module.names == module.evaluation.names == module.classes.names == tuple(sorted(TAGS))
    assert module.split("test").examples[2].label == (0,)


def test_numbers_are_no_positions_where_tags_are_numerals(data):
    module = data(test=[{"tokens": ["a"], "tags": [1]}, {"tokens": ["a"], "tags": [0]}], tags=["1", "2"])
    with pytest.raises(ValueError, match=r"row 1 .*unknown tag 0 of 'a'; tags are \['1', '2'\]: set data\.tags"):
        module.split("test")
    assert data(test=[{"tokens": ["a"], "tags": [1]}], tags=[1, 2]).split("test").examples[0].label == (0,)


def test_an_empty_tag_is_no_tag(data):
    rows = [{"tokens": ["a", "dog"], "tags": ["O", "B"]}, {"tokens": ["a"], "tags": [""]}]
    module = data(test=rows, train=rows, tags=None)
    assert module.names == ("B", "O")
    with pytest.raises(ValueError, match=r"row 1 .*unknown tag '' of 'a'"):
        module.split("test")
    with pytest.raises(ValueError, match=r"tags: a name or word is empty"):
        _ = data(test=rows, tags=["O", ""]).names


def test_a_tags_column_that_no_training_row_has_is_named_with_the_option(data):
    rows = [{"tokens": ["a"], "ner_tags": ["O"]}]
    with pytest.raises(ValueError, match=r"no column 'tags' in the training rows, .*'ner_tags'.*data\.tags_column"):
        _ = data(test=rows, train=rows, tags=None).names


def test_rows_to_be_predicted_need_no_tags(data):
    module = data(predict=[{"tokens": ["a", "dog"]}, {"tokens": ["dull"], "tags": "what"}])
    (batch,) = module.predict_dataloader()
    assert batch.labels is None
    assert batch.words.tolist() == [[1, 2], [1, IGNORE]]
    assert module.describe_row("predict", 0) == {"row": 0, "input": "a dog", "target": None}


BAD = {
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
    "truth for tags": ({"tokens": ["a"], "tags": [True]}, "'tags' must be a list of str or int"),
    "lists for tags": ({"tokens": ["a"], "tags": [["O"]]}, "'tags' must be a list of str or int"),
}


@pytest.mark.parametrize("mistake", BAD)
def test_a_bad_row_names_its_file_and_line(data, tmp_path, mistake):
    row, told = BAD[mistake]
    file = written(tmp_path / "test.jsonl", [ROWS[0], row])
    with pytest.raises(ValueError, match=rf"test\.jsonl:2: .*{told}"):
        data(test=file).split("test")
    assert len(data(test=file, on_bad_row="skip").split("test")) == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"template": "{soft}{text}{target}"}, r"must contain the words \{tokens\} once, before \{target\}"),
        ({"template": "{tokens} {tokens}{target}"}, "once"),
        ({"template": "{target} {tokens}"}, "before"),
        ({"template": "{{tokens}}{target}"}, "once"),
    ],
)
def test_a_template_that_does_not_name_the_words_is_an_error(data, arguments, told):
    with pytest.raises(ValueError, match=told):
        data(**arguments)


@pytest.mark.parametrize(
    ("tags", "rows", "told"),
    [
        (["O"], ROWS, "at least two different tags"),
        (["O", "B", "O"], ROWS, "at least two different tags"),
        (None, [{"tokens": ["a"], "tags": ["O"]}], "at least two different tags"),
        (None, [{"tokens": ["a"], "tags": [1]}], r"are numbers; set data\.tags to the names of the tags in order"),
    ],
)
def test_tags_that_are_none_are_an_error(data, tags, rows, told):
    with pytest.raises(ValueError, match=told):
        data(tags=tags, train=rows).split("train")
