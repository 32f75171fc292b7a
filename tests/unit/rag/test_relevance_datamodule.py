"""Pairs of a question and a passage, relevant or not."""

import json

import pytest

from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.data.readers.sources import DataError
from lightning_softprompt.rag.relevance_datamodule import RelevanceDataModule
from lightning_softprompt.retrieval.index_builder import build_index
from lightning_softprompt.retrieval.passages.documents import Document
from lightning_softprompt.retrieval.retriever import Retriever
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
TEMPLATE = "{soft}{question} : {passage} {target}"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("relevance") / "index"
    documents = [Document(name, name.title(), text) for name, text in TEXTS.items()]
    build_index(folder, documents, IndexSettings(encoder=None))
    return folder


@pytest.fixture
def data(family, tiny_folder, folder):
    def data(rows, **options):
        splits = dict.fromkeys(("train", "validation", "test", "predict"), rows)
        spec, retriever = BackboneSpec(name=str(tiny_folder(family))), Retriever(str(folder), "lexical")
        usual = {"template": TEMPLATE, "words": {"relevant": "good", "irrelevant": "bad"}, "max_tokens": 40}
        return RelevanceDataModule(retriever, backbone=spec, cache=False, **{**usual, **splits, **options})

    return data


def pairs(module, split="test"):
    return [(e.fields["question"], e.fields["passage"], e.label) for e in module.split(split).examples]


def test_gold_passages_are_relevant_and_the_best_of_the_others_are_not(data):
    assert pairs(data([ROW, OTHER])) == [
        (ROW["question"], TEXTS["dog"], 1),
        (ROW["question"], TEXTS["story"], 0),
        (OTHER["question"], TEXTS["film"], 1),
    ]
    assert pairs(data([ROW, OTHER], positives=2, negatives=2)) == [
        (ROW["question"], TEXTS["dog"], 1),
        (ROW["question"], TEXTS["story"], 0),
        (ROW["question"], TEXTS["well"], 0),
        (OTHER["question"], TEXTS["film"], 1),
        (OTHER["question"], TEXTS["story"], 1),
    ]


def test_classes_are_spoken_and_titles_may_be_shown(data):
    module = data([ROW], template="{soft}{question} : {title} : {passage} {target}")
    assert module.classes.words == {"irrelevant": [" bad"], "relevant": [" good"]}
    assert [(e.target, e.fields["title"]) for e in module.split("test").examples] == [("good", "Dog"), ("bad", "Story")]
    names = set(module.evaluation.compute())
    assert {"precision/relevant", "recall/relevant", "f1/relevant", "accuracy"} <= names


def test_passages_give_way(data):
    module = data([ROW], max_tokens=13)
    assert [row.num_truncated > 0 for row in module.split("test").encoded] == [True, False]
    assert max(len(row.ids) for row in module.split("test").encoded) == 13


def test_all_that_is_found_is_to_be_predicted(data):
    module = data([{"question": "is the dog sad"}], num_retrieved=3)
    assert [e.fields["passage"] for e in module.split("predict").examples] == [
        TEXTS[name] for name in ("dog", "story", "well")
    ]


def test_classes_may_be_balanced(data):
    module = data([ROW, OTHER], negatives=2, balanced=True)
    examples = module.split("train").examples
    weights = module.weights(examples)
    totals = [sum(w for w, e in zip(weights, examples, strict=True) if e.label == label) for label in (0, 1)]
    assert totals == pytest.approx([1, 1])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": ""}, "column 'question' must be non-empty text"),
        ({"question": "is it ?"}, "column 'positive_ids' must be a list of document ids"),
        ({"question": "is it ?", "positive_ids": []}, "non-empty list of document ids"),
        ({"question": "is it ?", "positive_ids": ["cat"]}, "the gold document 'cat' has no passage"),
    ],
)
def test_a_bad_row_is_named(data, row, said, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (ROW, row)))
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: .*{said}"):
        data(str(path)).split("test")
    assert len(data(str(path), on_bad_row="skip").split("test")) == 2


def test_places_are_those_of_the_questions(data, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (ROW, OTHER)))
    assert data(str(path)).split("test").where == [f"{path}:{line}" for line in (1, 1, 2)]


def test_validation_has_questions_of_its_own(data):
    with pytest.raises(ValueError, match="requires separate validation questions"):
        data([ROW], validation=None).split("train")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"words": {"yes": "good", "no": "bad"}}, "words must name irrelevant and relevant"),
        ({"template": "{soft}{question} {passage} {answer} {target}"}, r"got \['answer'\]"),
        ({"template": "{soft}{question} {target}"}, "truncate names"),
        ({"negatives": 0}, "positives and negatives must be at least 1"),
        ({"negatives": 30}, "num_retrieved at least negatives, .* and num_retrieved=20"),
    ],
)
def test_settings_that_make_no_sense_are_refused(data, options, said):
    with pytest.raises(ValueError, match=said):
        data([ROW], **options)
