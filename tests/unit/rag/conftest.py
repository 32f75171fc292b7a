"""Data modules of retrieval tests."""

import pytest
from questions import LEXICAL, TEXTS

from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.rag.answer_form import AnswerForm
from lightning_softprompt.rag.passage_selection import PassageSettings
from lightning_softprompt.rag.qa_datamodule import RagQaDataModule
from lightning_softprompt.rag.relevance_datamodule import RelevanceDataModule
from lightning_softprompt.retrieval.index_builder import build_index
from lightning_softprompt.retrieval.passages.documents import Document
from lightning_softprompt.retrieval.retriever import Retriever


@pytest.fixture(scope="session")
def index_folder(tmp_path_factory):
    """The folder of an index of the small corpus, in which one document has a title."""
    folder = tmp_path_factory.mktemp("rag") / "index"
    documents = [Document(name, "Film" if name == "film" else "", text) for name, text in TEXTS.items()]
    build_index(folder, documents, LEXICAL)
    return folder


@pytest.fixture
def make_qa_data(family, tiny_folder, index_folder):
    """Returns a function that creates a data module with the same questions in each split.

    Its passages come from a lexical search in the index at `index_folder`, which a test file can replace. The keyword
    arguments `passages` and `answer_form` are the fields of these groups of settings.
    """
    defaults = {"template": "{passages}{soft}{question} : {target}", "max_tokens": 48, "max_target_tokens": 4}
    passage_defaults = {"template": "{heading}{text} ,", "count": 2}

    def make_qa_data(rows, passages=None, answer_form=None, **options):
        data = dict.fromkeys(("train", "validation", "test", "predict"), rows)
        data["passages"] = PassageSettings(**passage_defaults | (passages or {}))
        data["answer_form"] = AnswerForm(**answer_form or {})
        data["retriever"] = Retriever(str(index_folder), "lexical")
        spec = BackboneSpec(name=str(tiny_folder(family)))
        return RagQaDataModule(backbone=spec, cache=False, **defaults | data | options)

    return make_qa_data


@pytest.fixture
def make_relevance_data(family, tiny_folder, index_folder):
    """Returns a function that creates a data module of pairs with the same questions in each split."""
    defaults = {"template": "{soft}{question} : {passage} {target}", "max_tokens": 40, "cache": False}
    defaults["words"] = {"relevant": "good", "irrelevant": "bad"}

    def make_relevance_data(rows, **options):
        splits = dict.fromkeys(("train", "validation", "test", "predict"), rows)
        retriever = Retriever(str(index_folder), "lexical")
        spec = BackboneSpec(name=str(tiny_folder(family)))
        return RelevanceDataModule(retriever, backbone=spec, **defaults | splits | options)

    return make_relevance_data
