"""Words of scripts without spaces and with combining marks; other text is split as by regular expressions."""

# ruff: noqa: RUF001

import random
import re
import unicodedata

import pytest

from lightning_softprompt.core.sentences import sentences
from lightning_softprompt.core.word_boundaries import split_words
from lightning_softprompt.evaluation.metrics.text import Rouge, novel_bigrams, repetition, rouge
from lightning_softprompt.retrieval.index_builder import build_index
from lightning_softprompt.retrieval.passages.chunking import Chunking, find_words
from lightning_softprompt.retrieval.passages.documents import Document
from lightning_softprompt.retrieval.passages.words import words
from lightning_softprompt.retrieval.retriever import Retriever
from lightning_softprompt.retrieval.search.settings import IndexSettings

SPACED = "abc ÀéßøжИΩ가나한_12,.'\n\t-–«»’ªº"


@pytest.mark.parametrize("seed", range(20))
def test_scripts_with_spaces_are_split_as_by_regular_expressions(seed):
    text = "".join(random.Random(seed).choices(SPACED, k=400))
    assert split_words(text) == re.findall(r"\w+", text)
    assert find_words(text) == [found.span() for found in re.finditer(r"\S+", text)]
    decomposed = [unicodedata.normalize("NFD", word) for word in split_words(text.lower())]
    without_marks = [re.sub("[\u0300-\u036fªº]", "", word) for word in decomposed]
    search_words = words(re.sub("[ªº]", "", text), "none")
    assert [unicodedata.normalize("NFD", word) for word in search_words] == [word for word in without_marks if word]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("फ्रांस की राजधानी", ["फ्रांस", "की", "राजधानी"]),
        ("தமிழ் மொழி", ["தமிழ்", "மொழி"]),
        ("العَرَبِيَّة", ["العربية"]),
        ("שָׁלוֹם", ["שלום"]),
        ("می‌خواهم", ["میخواهم"]),
        ("東京都に", ["東", "東京", "京", "京都", "都", "都に", "に"]),
        ("が か", ["が", "か"]),
        ("ＧＰＴ４", ["gpt4"]),
        ("ไทย", ["ไ", "ไท", "ท", "ทย", "ย"]),
        ("não", ["nao"]),
        ("e\u0301te\u0301", ["ete"]),
    ],
)
def test_search_words(text, expected):
    assert words(text, "none") == expected


QUESTIONS = {
    "zh": ("法国的首都是哪里？", ["法国的首都是巴黎。", "日本的货币是日元。"]),
    "ja": ("日本の首都はどこですか", ["東京は日本の首都です。", "パリはきれいです。"]),
    "th": ("เมืองหลวงของไทย", ["กรุงเทพเป็นเมืองหลวงของประเทศไทย", "แมวนอน"]),
    "ar": ("ما هي عاصمة فرنسا", ["بَارِيس عَاصِمَةُ فَرَنْسَا", "قِطّ"]),
    "hi": ("फ्रांस की राजधानी", ["पेरिस फ्रांस की राजधानी है", "बिल्ली सोती है"]),
}


@pytest.mark.parametrize("language", QUESTIONS)
def test_lexical_search_finds_the_document(tmp_path, language):
    question, texts = QUESTIONS[language]
    documents = [Document(str(number), "", text) for number, text in enumerate(texts)]
    build_index(tmp_path / "index", documents, IndexSettings(encoder=None, language="none"))
    ((best, *_),) = Retriever(str(tmp_path / "index"), "lexical").search([question], 2)
    assert best.passage.document == "0"


@pytest.mark.parametrize(
    "sentence", ["法国的首都是巴黎。", "東京は日本の首都です。", "ประเทศไทย ", "ខ្ញុំស្រលាញ់។", "ཁྱེད་རང་"]
)
def test_documents_without_spaces_are_split_at_sentences(sentence):
    text, size = sentence * 40, 3 * len(find_words(sentence))
    spans = Chunking(size, overlap=0).spans(text)
    assert "".join(text[start:end] for start, end in spans) == text
    assert len(spans) == 14  # three sentences each
    assert all(text[:end].endswith(sentence) for _, end in spans)
    assert len(Chunking(size // 3, overlap=0, whole="nothing").spans(text)) == 40


def test_sentences_of_other_scripts_are_split():
    assert sentences("यह एक है। वह दो है।") == ["यह एक है।", "वह दो है।"]
    assert sentences("هل هذا؟ نعم.") == ["هل هذا؟", "نعم."]


def test_bigrams_of_scripts_without_spaces_are_of_characters():
    assert novel_bigrams("北京是", "北京大") == 0.5
    assert repetition("北京北京") == pytest.approx(1 / 3)
    assert novel_bigrams("फ्रांस की", "फ्रांस की राजधानी") == 0.0


@pytest.mark.parametrize(
    ("text", "right", "ascii", "unicode"),
    [("北京", "北京", 0, 1), ("Привет мир", "Привет мир", 0, 1), ("n o", "não", 1, 0), ("a film", "a film", 1, 1)],
)
def test_rouge_compares_words_of_every_script_if_asked_to(text, right, ascii, unicode):
    scores = [rouge(text, [right], ["rouge1"], letters=letters)["rouge1"] for letters in ("ascii", "unicode")]
    assert scores == [ascii, unicode]


@pytest.mark.parametrize(
    ("letters", "right", "warns"),
    [
        ("ascii", "não é", True),
        ("ascii", "Привет", True),
        ("ascii", "it’s “so” €5 …", False),
        ("unicode", "não", False),
    ],
)
def test_a_run_reports_once_that_rouge_leaves_letters_out(caplog, letters, right, warns):
    score = Rouge(["rouge1"], letters=letters)
    for _ in range(2):
        score("n o", ["no", right])
    assert caplog.text.count("set rouge_words=unicode") == warns
