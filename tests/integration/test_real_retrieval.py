"""The packaged encoder finds passages by meaning that share no word with the query."""

import pytest

from lightning_softprompt.retrieval.index_builder import build_index
from lightning_softprompt.retrieval.passages.documents import Document
from lightning_softprompt.retrieval.retriever import Retriever

pytestmark = pytest.mark.slow

TEXTS = {
    "heart": "A myocardial infarction happens when blood no longer reaches a part of the cardiac muscle.",
    "bread": "Yeast makes the dough rise before it goes into the oven.",
    "moon": "Armstrong walked on the lunar surface in July 1969.",
    "code": "The ticket QX-7731 was closed without comment.",
}


def test_meaning_words_and_both(tmp_path):
    build_index(tmp_path / "index", [Document(name, "", text) for name, text in TEXTS.items()])
    ask = {way: Retriever(str(tmp_path / "index"), way) for way in ("lexical", "dense", "hybrid")}
    questions = {"What causes a heart attack?": "heart", "How is baking done?": "bread", "the first astronaut": "moon"}
    for question, wanted in questions.items():
        assert ask["dense"].search([question], 1)[0][0].passage.document == wanted
        assert ask["hybrid"].search([question], 1)[0][0].passage.document == wanted
    assert ask["lexical"].search(["QX-7731"], 1)[0][0].passage.document == "code"
    assert ask["hybrid"].search(["QX-7731"], 1)[0][0].passage.document == "code"
