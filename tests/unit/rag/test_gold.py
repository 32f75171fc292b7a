"""Corpora with copies, and gold ids that they lack: what is equal in content is equally gold."""

import logging
import re
from collections import Counter

import pytest

from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.data.readers.corpora import Columns
from lightning_softprompt.evaluation.qa import QaEvaluation
from lightning_softprompt.rag.answer_form import AnswerForm
from lightning_softprompt.rag.passage_selection import PassageNoise, PassageSettings
from lightning_softprompt.rag.qa_datamodule import RagQaDataModule
from lightning_softprompt.rag.relevance_datamodule import RelevanceDataModule
from lightning_softprompt.retrieval.index import Index
from lightning_softprompt.retrieval.index_builder import build_index
from lightning_softprompt.retrieval.passages.documents import Document
from lightning_softprompt.retrieval.retriever import Retriever
from lightning_softprompt.retrieval.search.settings import IndexSettings

FAMILIES = ("llama",)
TEXTS = {
    "dog": "the dog is sad . it never ends",
    "story": "a dog film",
    "film": "a warm and funny film",
    "well": "all is well that ends well",
}
COPIES = {f"copy-{name}": text for name, text in TEXTS.items()}
ROW = {"question": "is the dog sad", "answers": ["sad"], "positive_ids": ["dog"]}
LEXICAL = IndexSettings(encoder=None)
TITLES = {"untitled": {}, "titled": {"dog": "Dog", "copy-dog": "Another"}}


@pytest.fixture(scope="session", params=TITLES)
def folder(request, tmp_path_factory):
    """The copies come first, so that the index keeps their passages; or both, where titles differ."""
    folder = tmp_path_factory.mktemp("gold") / "index"
    titles = TITLES[request.param]
    documents = [Document(name, titles.get(name, ""), text) for name, text in {**COPIES, **TEXTS}.items()]
    build_index(folder, documents, LEXICAL)
    return folder


@pytest.fixture
def rag(family, tiny_folder, folder):
    def rag(row=ROW, passages=None, answer_form=None, **options):
        groups = {
            "passages": PassageSettings(**{"template": "{number} {text} ,", "count": 4, **(passages or {})}),
            "answer_form": AnswerForm(**(answer_form or {})),
        }
        template = "{passages}{soft}{question} : {target}"
        usual = {**groups, "template": template, "max_tokens": 48, "max_target_tokens": 4, "cache": False}
        spec, retriever = BackboneSpec(name=str(tiny_folder(family))), Retriever(str(folder), "lexical")
        splits = {split: [row] for split in ("train", "validation", "test")}
        return RagQaDataModule(backbone=spec, **{**usual, **splits, "retriever": retriever, **options})

    return rag


def first(module, split="test"):
    return module.split(split).examples[0]


def test_a_copy_that_is_found_is_the_gold_document(rag):
    example = first(rag(answer_form={"cite": True}))
    assert example.passages[0].document == "dog"
    assert (example.found[0], example.gold) == ("dog", ("dog",))
    gold = [number for number, passage in enumerate(example.passages, start=1) if passage.text == TEXTS["dog"]]
    assert example.target == "sad" + "".join(f" [{number}]" for number in gold)
    measured = QaEvaluation(cite=True).score("sad", gold, example)
    assert [measured[name] for name in ("hit@1", "recall@1", "mrr", "cite_precision", "cite_recall")] == [1.0] * 5


def test_gold_documents_that_are_copies_of_each_other_count_once(rag):
    example = first(rag({**ROW, "positive_ids": ["copy-dog", "dog", "dog"]}))
    measured = QaEvaluation().score("sad", [], example)
    assert (example.gold, measured["recall@1"], measured["ndcg@5"]) == (("copy-dog",), 1.0, 1.0)


def test_gold_mode_shows_a_text_once(rag):
    example = first(rag({**ROW, "positive_ids": ["dog", "copy-dog", "film"]}, passages={"mode": "gold"}))
    assert [(p.document, p.text) for p in example.passages] == [("dog", TEXTS["dog"]), ("film", TEXTS["film"])]


def test_a_copy_is_moved_to_the_place_of_gold_passages(rag):
    assert first(rag(passages={"gold_position": -1})).passages[-1].text == TEXTS["dog"]


def test_noise_takes_copies_for_gold(rag):
    hidden = rag(passages={"noise": PassageNoise(no_gold=1.0)})
    _, _, example = hidden.train_dataloader().dataset[0]
    assert TEXTS["dog"] not in [passage.text for passage in example.passages]
    replaced = rag(passages={"noise": PassageNoise(distractors=1.0)}).train_dataloader().dataset[0][2]
    assert TEXTS["dog"] in [passage.text for passage in replaced.passages]


def test_random_passages_are_no_copies_of_gold_ones(rag):
    texts = [passage.text for passage in first(rag(passages={"mode": "random", "count": 8}, num_retrieved=8)).passages]
    assert texts
    assert TEXTS["dog"] not in texts


def relevance(family, tiny_folder, folder, rows):
    return RelevanceDataModule(
        Retriever(str(folder), "lexical"),
        template="{soft}{question} : {passage} {target}",
        words={"relevant": "good", "irrelevant": "bad"},
        negatives=4,
        test=rows,
        max_tokens=40,
        backbone=BackboneSpec(name=str(tiny_folder(family))),
        cache=False,
    )


@pytest.mark.parametrize("also", [[], ["story"]])
def test_no_pair_is_relevant_and_irrelevant(family, tiny_folder, folder, also):
    rows = [ROW, {**ROW, "positive_ids": also}] if also else [ROW]
    examples = relevance(family, tiny_folder, folder, rows).split("test").examples
    labels = {(example.fields["passage"], example.label) for example in examples}
    assert (TEXTS["dog"], 1) in labels
    assert len({label for _, label in labels}) == 2
    assert set(Counter(text for text, _ in labels).values()) == {1}


def test_rows_of_a_document_are_in_the_order_of_its_text(tmp_path):
    shared = "One two three. "
    documents = [
        Document("a", "", shared * 2),
        Document("b", "", f"Four five six. {shared}Seven eight nine. Four five six."),
    ]
    build_index(tmp_path / "index", documents, IndexSettings(size=3, overlap=0, encoder=None))
    passages = Index(tmp_path / "index").passages
    assert [passages[row].text.strip() for row in passages.rows_of("b")] == [
        "Four five six.", "One two three.", "Seven eight nine.",
    ]  # fmt: skip
    assert (passages.rows_of("a"), passages.rows_of("c")) == ((0,), ())


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (["00"], "none of the 1 test rows has a gold document that is in"),
        (["dog", "nope"], "1 of the 1 test rows have gold documents that .* lacks, for example 'nope'"),
    ],
)
def test_gold_ids_that_the_index_lacks_are_reported(rag, caplog, ids, said):
    with caplog.at_level(logging.WARNING):
        rag({**ROW, "positive_ids": ids}).split("test")
    assert [record for record in caplog.records if re.search(said, record.getMessage())]


def test_a_corpus_may_name_its_ids_otherwise(rag, tmp_path, caplog):
    (tmp_path / "corpus.jsonl").write_text('{"_id": "dog", "text": "the dog is sad"}\n')
    retriever = Retriever(str(tmp_path / "index"), "lexical")
    module = rag(
        corpus=str(tmp_path / "corpus.jsonl"),
        index_settings=LEXICAL,
        corpus_columns=Columns(id="_id"),
        retriever=retriever,
    )
    module.prepare_data()
    module.prepare_data()  # the index that is there is compared with the corpus
    assert first(module).found == ("dog",)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
