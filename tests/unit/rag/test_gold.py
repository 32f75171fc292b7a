"""Corpora with copies of documents: a copy of a gold document is gold. Gold ids that are not in a corpus."""

import logging
import re

import pytest
from row_files import write_rows

from lightning_softprompt.data.readers.corpora import Columns
from lightning_softprompt.evaluation.qa import QaEvaluation
from lightning_softprompt.rag.passage_selection import PassageNoise
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
def index_folder(request, tmp_path_factory):
    """An index of copies and their originals. It has the passages of the copies, and of both if their titles differ."""
    folder = tmp_path_factory.mktemp("gold") / "index"
    titles = TITLES[request.param]
    texts = {**COPIES, **TEXTS}
    build_index(folder, [Document(name, titles.get(name, ""), text) for name, text in texts.items()], LEXICAL)
    return folder


@pytest.fixture
def make_data(make_qa_data):
    """Returns a function that creates a data module of one question with numbered passages."""

    def make_data(row=ROW, passages=None, **options):
        settings = {"template": "{number} {text} ,", "count": 4, **(passages or {})}
        return make_qa_data([row], passages=settings, **options)

    return make_data


def first_example(module):
    return module.split("test").examples[0]


def texts_of(example):
    return [passage.text for passage in example.passages]


def test_a_retrieved_copy_has_the_id_of_the_gold_document(make_data):
    example = first_example(make_data(answer_form={"cite": True}))
    assert example.passages[0].document == "dog"
    assert example.found[0] == "dog"
    assert example.gold == ("dog",)
    citations = [number for number, text in enumerate(texts_of(example), start=1) if text == TEXTS["dog"]]
    assert example.target == "sad" + "".join(f" [{number}]" for number in citations)
    scores = QaEvaluation(cite=True).score("sad", citations, example)
    for name in ("hit@1", "recall@1", "mrr", "cite_precision", "cite_recall"):
        assert scores[name] == 1


def test_gold_documents_that_are_copies_of_each_other_count_once(make_data):
    example = first_example(make_data({**ROW, "positive_ids": ["copy-dog", "dog", "dog"]}))
    scores = QaEvaluation().score("sad", [], example)
    assert example.gold == ("copy-dog",)
    assert scores["recall@1"] == 1
    assert scores["ndcg@5"] == 1


def test_gold_mode_uses_a_text_once(make_data):
    row = {**ROW, "positive_ids": ["dog", "copy-dog", "film"]}
    dog, film = first_example(make_data(row, passages={"mode": "gold"})).passages
    assert (dog.document, dog.text) == ("dog", TEXTS["dog"])
    assert (film.document, film.text) == ("film", TEXTS["film"])


def test_a_copy_is_moved_to_the_position_of_gold_passages(make_data):
    example = first_example(make_data(passages={"gold_position": -1}))
    assert texts_of(example)[-1] == TEXTS["dog"]


@pytest.mark.parametrize(
    ("noise", "contains_gold"), [(PassageNoise(no_gold=1.0), False), (PassageNoise(distractors=1.0), True)]
)
def test_noise_treats_copies_as_gold(make_data, noise, contains_gold):
    module = make_data(passages={"noise": noise})
    _, _, example = module.train_dataloader().dataset[0]
    assert (TEXTS["dog"] in texts_of(example)) == contains_gold


def test_random_passages_are_not_copies_of_gold_ones(make_data):
    example = first_example(make_data(passages={"mode": "random", "count": 8}, num_retrieved=8))
    assert example.passages
    assert TEXTS["dog"] not in texts_of(example)


@pytest.mark.parametrize("rows", [[ROW], [ROW, {**ROW, "positive_ids": ["story"]}]], ids=["one row", "two rows"])
def test_no_pair_is_both_relevant_and_irrelevant(make_relevance_data, rows):
    examples = make_relevance_data(rows, negatives=4).split("test").examples
    pairs = {(example.fields["passage"], example.label) for example in examples}
    assert (TEXTS["dog"], 1) in pairs
    assert {label for _, label in pairs} == {0, 1}
    assert len({text for text, _ in pairs}) == len(pairs)


def test_passages_of_a_document_are_in_the_order_of_its_text(tmp_path):
    shared = "One two three. "
    documents = [
        Document("a", "", shared * 2),
        Document("b", "", f"Four five six. {shared}Seven eight nine. Four five six."),
    ]
    build_index(tmp_path / "index", documents, IndexSettings(size=3, overlap=0, encoder=None))
    passages = Index(tmp_path / "index").passages
    texts = [passages[row].text.strip() for row in passages.rows_of("b")]
    assert texts == ["Four five six.", "One two three.", "Seven eight nine."]
    assert passages.rows_of("a") == (0,)
    assert passages.rows_of("c") == ()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["00"], "none of the 1 test rows has a gold document that is in"),
        (["dog", "nope"], "1 of the 1 test rows have gold documents that .* lacks, for example 'nope'"),
    ],
)
def test_gold_ids_that_are_not_in_the_index_are_reported(make_data, caplog, ids, message):
    with caplog.at_level(logging.WARNING):
        make_data({**ROW, "positive_ids": ids}).split("test")
    assert [record for record in caplog.records if re.search(message, record.getMessage())]


def test_the_column_of_document_ids_can_have_another_name(make_data, tmp_path, caplog):
    corpus = write_rows(tmp_path / "corpus.jsonl", [{"_id": "dog", "text": "the dog is sad"}])
    retriever = Retriever(str(tmp_path / "index"), "lexical")
    settings = {"index_settings": LEXICAL, "corpus_columns": Columns(id="_id")}
    module = make_data(corpus=str(corpus), retriever=retriever, **settings)
    module.prepare_data()
    module.prepare_data()  # compares the existing index with the corpus
    assert first_example(module).found == ("dog",)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
