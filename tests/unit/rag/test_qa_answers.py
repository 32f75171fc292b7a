"""Answers and choices of questions, and rows and options that are rejected."""

import io

import pytest
from questions import ROW, documents_of, first_example
from row_files import write_rows

from lightning_softprompt.data.readers.sources import DataError
from lightning_softprompt.evaluation.multiple_choice import ChoiceEvaluation
from lightning_softprompt.rag.passage_selection import PassageNoise

FAMILIES = ("llama",)


@pytest.mark.parametrize(
    ("answers", "references"),
    [
        ("sad", ("sad",)),
        ([" sad ", "", "sad"], ("sad",)),
        ([], ("well",)),
        (None, ("well",)),
    ],
)
def test_a_row_can_have_one_several_or_no_answers(make_qa_data, answers, references):
    example = first_example(make_qa_data([{**ROW, "answers": answers}], answer_form={"abstain": "well"}))
    assert example.references == references
    assert example.target == references[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": " "}, "column 'question' is empty"),
        ({"question": 3}, "column 'question' must be text"),
        ({"answers": []}, "column 'answers' has no answer; set answer_form.abstain"),
        ({"answers": [3]}, "column 'answers' must be a text or a list of texts"),
        ({"positive_ids": "dog"}, "column 'positive_ids' must be a list of document ids"),
    ],
)
def test_a_bad_row_is_reported_or_skipped(make_qa_data, changes, message, tmp_path):
    path = str(write_rows(tmp_path / "rows.jsonl", [ROW, {**ROW, **changes}]))
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: {message}"):
        make_qa_data(path).split("test")
    assert len(make_qa_data(path, on_bad_row="skip").split("test")) == 1


def test_gold_mode_requires_gold_documents_of_the_index(make_qa_data):
    with pytest.raises(DataError, match="the gold document 'cat' has no passage"):
        make_qa_data([{**ROW, "positive_ids": ["cat"]}], passages={"mode": "gold"}).split("test")
    with pytest.raises(DataError, match="mode=gold requires document ids in column 'positive_ids'"):
        make_qa_data([{"question": "is it ?", "answers": "dog"}], passages={"mode": "gold"}).split("test")


def test_columns_can_have_other_names(make_qa_data):
    row = {"asked": "is the dog sad", "long": "it is very sad", "docs": [7]}
    names = {"question": "asked", "answers": "long", "gold": "docs", "template": "{passages}{soft}{asked} {target}"}
    example = first_example(make_qa_data([row], **names))
    assert example.target == "it is very sad"
    assert example.gold == ("7",)
    assert example.fields["question"] == row["asked"]
    with pytest.raises(DataError, match="no column 'answers'"):
        first_example(make_qa_data([row], **{**names, "answers": "answers"}))


def test_prediction_requires_no_answers(make_qa_data):
    example = first_example(make_qa_data([{"question": "is the dog sad"}]), "predict")
    assert example.target == ""
    assert example.references == ()
    assert documents_of(example) == ["dog", "story"]


def test_choices_are_classes(make_qa_data):
    rows = [{**ROW, "answers": ["no"]}, {**ROW, "answers": "yes"}]
    module = make_qa_data(rows, answer_form={"choices": {"yes": "good", "no": "bad"}})
    no, yes = module.split("test").examples
    assert (no.label, no.target, no.references) == (1, "bad", ("no",))
    assert (yes.label, yes.target, yes.references) == (0, "good", ("yes",))
    assert module.classes.words == {"yes": [" good"], "no": [" bad"]}
    assert isinstance(module.evaluation, ChoiceEvaluation)
    assert len(module.split("test").encoded[0].targets) == 1  # without an end of sequence
    batch = next(iter(module.test_dataloader()))
    assert sorted(batch.labels.tolist()) == [0, 1]
    assert module.split("predict").examples[0].label is None
    with pytest.raises(DataError, match=r"must name one of the choices \['yes', 'no'\], got \['sad'"):
        make_qa_data([ROW], answer_form={"choices": ["yes", "no"]}).split("test")


def test_plain_text_on_standard_input_is_a_question(make_qa_data, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"is the dog sad ?\n")))
    module = make_qa_data([ROW], predict="-")
    assert [example.fields["question"] for example in module.split("predict").examples] == ["is the dog sad ?"]


@pytest.mark.parametrize(
    ("answers", "references"),
    [
        ({"text": ["sad", "very sad"], "answer_start": [3, 9]}, ("sad", "very sad")),
        ([{"text": "sad", "answer_start": 3}, {"text": "sad", "answer_start": 9}], ("sad",)),
        ({"text": [], "answer_start": []}, ("none",)),
        ("[1]", ("[1]",)),
        ('("sad")', ('("sad")',)),
        ("{x}", ("{x}",)),
    ],
)
def test_answers_can_have_the_forms_of_squad(make_qa_data, answers, references):
    module = make_qa_data([{**ROW, "answers": answers}], answer_form={"abstain": "none"})
    assert module.split("test").examples[0].references == references


@pytest.mark.parametrize(
    "answers", ["['sad', 'very sad']", '["sad"]', """['sad', "it's"]""", "['sad' 'bad']", "[]", ["['sad']"],
                "('sad',)", "('sad', 'bad')", "array(['sad'], dtype=object)", "{'sad', 'bad'}",
                "{'text': array(['sad'], dtype=object), 'answer_start': array([3])}"],
)  # fmt: skip
def test_a_list_of_answers_written_as_text_is_rejected(make_qa_data, answers):
    with pytest.raises(DataError, match=r"column 'answers' holds a list written as text, .*Save the rows as JSON"):
        make_qa_data([{**ROW, "answers": answers}]).split("test")


def test_choices_are_text_whether_or_not_a_config_quotes_them(make_qa_data):
    module = make_qa_data(
        [{**ROW, "answers": "0"}, {**ROW, "answers": "1"}], answer_form={"choices": {1: "good", 0: "bad"}}
    )
    assert [example.label for example in module.split("test").examples] == [1, 0]
    with pytest.raises(ValueError, match=r"choices: a name or word is expected, got False.*quotes"):
        make_qa_data([ROW], answer_form={"choices": {False: "bad", True: "good"}})
    with pytest.raises(ValueError, match=r"choices, class 'no': a name or word is empty"):
        make_qa_data([ROW], answer_form={"choices": {"no": "", "yes": "good"}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retriever": None}, "mode=retrieved requires a retriever"),
        ({"passages": {"count": 0}}, "count must be at least 1"),
        ({"num_retrieved": 1}, "num_retrieved=1 is less than passages.count=2"),
        ({"passages": {"mode": "oracle"}}, "mode must be one of retrieved, gold, random, closed_book"),
        ({"passages": {"order": "best"}}, "order one of score, reversed, shuffled"),
        (
            {"passages": {"mode": "random", "noise": PassageNoise(drop=0.5)}},
            "noise requires mode=retrieved or mode=gold",
        ),
        ({"template": "{soft}{question} {target}"}, r"template must contain \{passages\}"),
        ({"template": "{passages}{soft}{target}"}, "question must be a column of the template"),
        ({"max_target_tokens": 48}, "max_target_tokens must be between 0 and max_tokens=48"),
        ({"answer_form": {"choices": ["yes"]}}, "at least two choices are required"),
        ({"answer_form": {"choices": ["yes", "no"], "abstain": "well"}}, "add it to choices"),
        ({"answer_form": {"choices": ["yes", "no"], "cite": True}}, "cite requires generated answers"),
        ({"answer_form": {"cite": True}}, r"cite requires \{number\} in passages\.template"),
        (
            {"passages": {"noise": PassageNoise(drop=0.5)}, "batch_tokens": 200},
            "batch_tokens requires rows of the same length",
        ),
    ],
)
def test_invalid_options_are_rejected(make_qa_data, options, message):
    with pytest.raises(ValueError, match=message):
        make_qa_data([ROW], **options)


def test_probabilities_of_noise_must_be_between_0_and_1():
    with pytest.raises(ValueError, match=r"values of noise must be between 0 and 1, got \{'drop': 1.5\}"):
        PassageNoise(drop=1.5)


@pytest.mark.parametrize("family", ["bert"])
def test_a_masked_model_can_choose_an_answer_but_not_generate_one(make_qa_data):
    with pytest.raises(ValueError, match="fills masks and generates no text"):
        make_qa_data([ROW]).setup("test")
    make_qa_data([{**ROW, "answers": "yes"}], answer_form={"choices": ["yes", "no"]}).setup("test")
