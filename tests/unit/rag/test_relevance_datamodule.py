"""Pairs of a question and a passage that is relevant or irrelevant."""

import pytest
from row_files import write_rows

from lightning_softprompt.data.readers.sources import DataError
from lightning_softprompt.retrieval.index_builder import build_index
from lightning_softprompt.retrieval.passages.documents import Document
from lightning_softprompt.retrieval.search.settings import IndexSettings

FAMILIES = ("llama", "bert")
TEXTS = {
    "dog": "the dog is sad . it never ends",
    "story": "a dog film",
    "film": "a warm and funny film",
    "well": "all is well that ends well",
}
ROW = {"question": "is the dog sad", "positive_ids": ["dog"]}
OTHER = {"question": "what film ?", "positive_ids": ["film", "story"]}


@pytest.fixture(scope="session")
def index_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("relevance") / "index"
    documents = [Document(name, name.title(), text) for name, text in TEXTS.items()]
    build_index(folder, documents, IndexSettings(encoder=None))
    return folder


def pairs_of(module):
    """Returns the question, the name of the passage and the label of each test row."""
    names = {text: name for name, text in TEXTS.items()}
    examples = module.split("test").examples
    return [(e.fields["question"], names[e.fields["passage"]], e.label) for e in examples]


def test_gold_passages_are_relevant_and_the_best_other_passages_are_irrelevant(make_relevance_data):
    question, other = ROW["question"], OTHER["question"]
    assert pairs_of(make_relevance_data([ROW, OTHER])) == [
        (question, "dog", 1),
        (question, "story", 0),
        (other, "film", 1),
    ]
    assert pairs_of(make_relevance_data([ROW, OTHER], positives=2, negatives=2)) == [
        (question, "dog", 1),
        (question, "story", 0),
        (question, "well", 0),
        (other, "film", 1),
        (other, "story", 1),
    ]


def test_classes_have_label_words_and_templates_can_contain_the_title(make_relevance_data):
    module = make_relevance_data([ROW], template="{soft}{question} : {title} : {passage} {target}")
    assert module.classes.words == {"irrelevant": [" bad"], "relevant": [" good"]}
    relevant, irrelevant = module.split("test").examples
    assert (relevant.target, relevant.fields["title"]) == ("good", "Dog")
    assert (irrelevant.target, irrelevant.fields["title"]) == ("bad", "Story")
    names = set(module.evaluation.compute())
    assert {"precision/relevant", "recall/relevant", "f1/relevant", "accuracy"} <= names


def test_passages_are_truncated(make_relevance_data):
    module = make_relevance_data([ROW], max_tokens=13)
    assert [row.num_truncated > 0 for row in module.split("test").encoded] == [True, False]
    assert max(len(row.ids) for row in module.split("test").encoded) == 13


def test_prediction_uses_all_retrieved_passages(make_relevance_data):
    module = make_relevance_data([{"question": "is the dog sad"}], num_retrieved=3)
    passages = [example.fields["passage"] for example in module.split("predict").examples]
    assert passages == [TEXTS["dog"], TEXTS["story"], TEXTS["well"]]


def test_balanced_classes_have_equal_total_weights(make_relevance_data):
    module = make_relevance_data([ROW, OTHER], negatives=2, balanced=True)
    examples = module.split("train").examples
    totals = [0.0, 0.0]
    for weight, example in zip(module.weights(examples), examples, strict=True):
        totals[example.label] += weight
    assert totals == pytest.approx([1, 1])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": ""}, "column 'question' must be non-empty text"),
        ({"question": "is it ?"}, "column 'positive_ids' must be a list of document ids"),
        ({"question": "is it ?", "positive_ids": []}, "non-empty list of document ids"),
        ({"question": "is it ?", "positive_ids": ["cat"]}, "the gold document 'cat' has no passage"),
    ],
)
def test_a_bad_row_is_reported_or_skipped(make_relevance_data, row, message, tmp_path):
    path = str(write_rows(tmp_path / "rows.jsonl", [ROW, row]))
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: .*{message}"):
        make_relevance_data(path).split("test")
    assert len(make_relevance_data(path, on_bad_row="skip").split("test")) == 2


def test_pairs_are_located_by_the_line_of_their_question(make_relevance_data, tmp_path):
    path = str(write_rows(tmp_path / "rows.jsonl", [ROW, OTHER]))
    assert make_relevance_data(path).split("test").where == [f"{path}:{line}" for line in (1, 1, 2)]


def test_missing_validation_questions_are_rejected(make_relevance_data):
    with pytest.raises(ValueError, match="requires separate validation questions"):
        make_relevance_data([ROW], validation=None).split("train")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"words": {"yes": "good", "no": "bad"}}, "words must name irrelevant and relevant"),
        ({"template": "{soft}{question} {passage} {answer} {target}"}, r"got \['answer'\]"),
        ({"template": "{soft}{question} {target}"}, "truncate names"),
        ({"negatives": 0}, "positives and negatives must be at least 1"),
        ({"negatives": 30}, "num_retrieved at least negatives, .* and num_retrieved=20"),
    ],
)
def test_invalid_options_are_rejected(make_relevance_data, options, message):
    with pytest.raises(ValueError, match=message):
        make_relevance_data([ROW], **options)
