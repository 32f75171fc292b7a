import json
import random
from itertools import pairwise, product
from string import ascii_lowercase

import pytest
import tiny
from small_tokenizers import byte_pairs, unigram, word_pieces
from tokenizers.normalizers import Replace
from transformers import T5TokenizerFast, XLMRobertaTokenizerFast

from lightning_softprompt.backbones.tokenization.added_rows import read_vocabulary
from lightning_softprompt.vocabulary.base import Selection
from lightning_softprompt.vocabulary.corpus_texts import Piece
from lightning_softprompt.vocabulary.extension import MergeExtension, WordExtension, create_extension
from lightning_softprompt.vocabulary.folder import write_tokenizer
from lightning_softprompt.vocabulary.measurement import measure_tokenizer
from lightning_softprompt.vocabulary.merges import apply_merges, continue_merges
from lightning_softprompt.vocabulary.word_counts import count_words

ENGLISH = ["the cat sat on the mat", "the dog and the cat ran", "a cat that sat with a dog 1234"] * 5
PORTUGUESE = ["o coração não tem ação", "a informação não é a ação", "coração e informação 1234"] * 5


def pieces_of(texts):
    return [Piece(number, text) for number, text in enumerate(texts)]


@pytest.fixture
def base():
    return byte_pairs(ENGLISH, 300)


def extend(tokenizer, corpus=PORTUGUESE, general=ENGLISH, **selection):
    """Returns the extension of a tokenizer by the words of a corpus."""
    extension = create_extension(tokenizer)
    counts = count_words(pieces_of(corpus), tokenizer)
    general_counts = None if general is None else count_words(pieces_of(general), tokenizer)
    extension.select(counts, general_counts, Selection(**{"rows": 20, "min_count": 2, "min_documents": 2, **selection}))
    return extension


@pytest.mark.parametrize("unit", ["pieces", "words"])
def test_merges_shorten_the_corpus_and_leave_other_text_unchanged(base, unit):
    extension = extend(base, unit=unit)
    extended = extension.extended()
    assert 0 < len(extension.rows) <= 20
    for text in ENGLISH:
        assert extended(text).input_ids == base(text).input_ids
    for text in PORTUGUESE:
        assert len(extended(text).input_ids) < len(base(text).input_ids)
        assert extended.decode(extended(text).input_ids) == text


def test_new_tokens_stand_for_their_base_tokens(base):
    extension = extend(base)
    extended = extension.extended()
    base_of = {row.id: row.base for row in extension.rows}
    assert [row.id for row in extension.rows] == list(range(len(base), len(base) + len(extension.rows)))
    for text in PORTUGUESE:
        replaced = [id for new in extended(text).input_ids for id in base_of.get(new, (new,))]
        assert replaced == base(text).input_ids


def test_counts_of_new_tokens_are_those_of_the_merges(base):
    extension = extend(base, unit="pieces")
    most = extension.rows[0]
    tokens = [base.backend_tokenizer.model.tokenize(word) for text in PORTUGUESE for word in words_of(base, text)]
    pair = [base.convert_ids_to_tokens(id) for id in most.base]
    pairs = [[a.value, b.value] for word in tokens for a, b in pairwise(word)]
    assert most.count == pairs.count(pair)


def words_of(tokenizer, text):
    return [word for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def test_numbers_are_not_merged(base):
    rows = extend(base, ["1234 1234 não"] * 9, general=None).rows
    assert not any(character.isdigit() for row in rows for character in row.text)
    assert any("n" in row.text for row in rows)


def test_words_of_the_general_text_are_not_selected(base):
    assert not extend(base, PORTUGUESE, PORTUGUESE).rows
    assert extend(base, PORTUGUESE, None).rows


def test_rare_words_are_not_selected(base):
    assert not extend(base, min_count=1000).rows
    assert not extend(base, ["coração " * 50], min_documents=2).rows


def test_terms_that_exist_are_skipped_with_the_reason(base):
    extension = create_extension(base)
    skipped = extension.add_terms(["the", "coração", "coração", "two words"], None, 50)
    assert skipped["the"] == "it is one token already"
    assert "2 words" in skipped["two words"]
    assert skipped["coração"] == "it is a new token already"
    extended = extension.extended()
    assert extended(" coração").input_ids == [extension.rows[-1].id]
    assert create_extension(base).add_terms(["informação"], None, 1)["informação"].startswith("it requires")


def test_the_base_tokenizer_is_not_changed(base):
    before = base.backend_tokenizer.to_str()
    extend(base)
    assert base.backend_tokenizer.to_str() == before


def test_continued_merges_equal_those_of_the_tokenizer():
    rng = random.Random(0)
    words = {tuple(rng.choices("abc", k=rng.randint(2, 9))): rng.randint(1, 9) for _ in range(200)}
    merges = continue_merges(words, {"a", "b", "c"}, 15)
    earlier = {pair: rank for rank, pair in enumerate(merges[:-1])}
    pairs_left = {}
    for word, count in words.items():  # before the last merge, its pair is the most frequent one
        *_, (_, tokens) = apply_merges(word, earlier)
        for pair in pairwise(tokens):
            pairs_left[pair] = pairs_left.get(pair, 0) + count
    assert pairs_left[merges[-1]] == max(pairs_left.values())


def test_whole_words_remove_unknown_tokens():
    tokenizer = tiny.tokenizer("bert")
    corpus = ["angioplasty is great", "good angioplasty"] * 3
    extension = extend(tokenizer, corpus, None)
    assert isinstance(extension, WordExtension)
    assert [row.text for row in extension.rows] == ["angioplasty"]
    assert extension.rows[0].base == (tiny.UNK,)
    before = measure_tokenizer(pieces_of(corpus), tokenizer)
    after = measure_tokenizer(pieces_of(corpus), extension.extended(), extension.first_id)
    assert (before.unknown, after.unknown, after.added) == (6, 0, 6)
    assert before.unknown_rate == pytest.approx(6 / 15)
    assert (before.documents, before.words, before.fertility) == (6, 15, 1.0)


def test_word_pieces():
    tokenizer = word_pieces()
    extension = extend(tokenizer, ["cardiology wing", "cardio wing"] * 3, None, min_documents=1)
    extended = extension.extended()
    assert [row.text for row in extension.rows] == ["cardiology"]
    assert len(extended("cardiology", add_special_tokens=False).input_ids) == 1
    assert extended("cardio wing").input_ids == tokenizer("cardio wing").input_ids
    with pytest.raises(ValueError, match="set --unit words"):
        extend(tokenizer, unit="pieces")


@pytest.mark.parametrize("tokenizer_class", [T5TokenizerFast, XLMRobertaTokenizerFast])
def test_unigram_words_replace_exactly_their_pieces(tokenizer_class, tmp_path):
    tokenizer = unigram(ENGLISH, tokenizer_class)
    corpus = [*PORTUGUESE, "coração ñandú", "coraçãozinho ñandú"]
    extension = extend(tokenizer, corpus)
    loaded = write_tokenizer(tmp_path / "out", extension, "name")
    assert {row.text for row in extension.rows} >= {" coração", " informação", " ñandú"}
    assert tokenizer.unk_token_id in next(row for row in extension.rows if row.text == " ñandú").base
    assert loaded.get_vocab().items() >= tokenizer.get_vocab().items()
    base_of = {row.id: row.base for row in extension.rows}
    rng = random.Random(0)
    words = [" ".join(ENGLISH), *(word for text in corpus for word in text.split()), "cation", "ão", "<extra_id_3>"]
    for _ in range(200):
        text = " ".join(rng.choices(words, k=5)) + rng.choice(["", ".", "zinho", "e"])
        replaced = [id for new in loaded(text).input_ids for id in base_of.get(new, (new,))]
        # Neighboring unknown characters are one token, unless a new token contains one of them.
        assert join_repeated(replaced, tokenizer.unk_token_id) == tokenizer(text).input_ids, text
    assert loaded.decode(loaded("a coração ñandú", add_special_tokens=False).input_ids) == "a coração ñandú"


def join_repeated(ids, repeated):
    return [id for previous, id in pairwise([None, *ids]) if not previous == id == repeated]


def test_unigram_tokenizers_have_no_pieces_to_merge():
    with pytest.raises(ValueError, match="set --unit words"):
        extend(unigram(ENGLISH, T5TokenizerFast), unit="pieces")


def test_unknown_symbols_are_selected():
    tokenizer = unigram(ENGLISH, T5TokenizerFast)
    rows = extend(tokenizer, ["cat 😀 1234 €5", "dog 😀 1234 €5"] * 3, None).rows
    assert rows[0].text == " 😀"  # unknown words come first
    assert all(row.text.strip().isalpha() for row in rows[1:])


def test_other_types_of_tokenizers_are_refused_by_name(base, monkeypatch):
    monkeypatch.setattr(MergeExtension, "model_types", ())
    with pytest.raises(ValueError, match=r"BPE tokenizer cannot be extended.*WordPiece, WordLevel, Unigram"):
        create_extension(base)


@pytest.mark.parametrize("unit", ["pieces", "words"])
def test_terms_and_words_share_the_limit_and_their_merges(base, unit):
    extension = create_extension(base)
    assert not extension.add_terms(["coração"], None, 20)
    num_terms = len(extension.rows)
    extension.select(count_words(pieces_of(PORTUGUESE), base), None, Selection(num_terms + 3, 2, 2, unit))
    assert num_terms < len(extension.rows) <= num_terms + 3
    tokens = [row.token for row in extension.rows]
    assert len(set(tokens)) == len(tokens)
    base_of = {row.id: row.base for row in extension.rows}
    for text in PORTUGUESE:
        ids = extension.extended()(text).input_ids
        assert [id for new in ids for id in base_of.get(new, (new,))] == base(text).input_ids


@pytest.mark.parametrize(
    ("term", "reason"),
    [
        ("two words", "2 words"),
        ("anti-TNF", "3 words"),
        ("<s>", "3 words"),
        ("x" * 70, "longer than 64"),
        ("naïve", None),
        ("日本語", None),
        ("αβ", None),
        ("e\u0301tude", "3 words"),  # a decomposed letter
        ("\x00", None),
    ],
)
def test_terms_with_special_characters(base, term, reason):
    extension = create_extension(base)
    skipped = extension.add_terms([term], None, 50)
    if reason is not None:
        assert reason in skipped[term]
        assert not extension.rows
        return
    assert not skipped
    extended = extension.extended()
    ids = extended(f"the {term} and").input_ids
    assert extension.rows[-1].id in ids
    assert extended.decode(ids) == f"the {term} and"


def test_a_term_without_characters_is_skipped():
    tokenizer = word_pieces()
    tokenizer.backend_tokenizer.normalizer = Replace("\u200b", "")
    assert create_extension(tokenizer).add_terms(["\u200b"], None, 5) == {
        "\u200b": "the tokenizer removes all its characters"
    }


def test_a_written_tokenizer_is_read_with_its_rows(base, tmp_path):
    extension = extend(base)
    assert isinstance(extension, MergeExtension)
    loaded = write_tokenizer(tmp_path / "out", extension, "name")
    assert loaded(PORTUGUESE[0]).input_ids == extension.extended()(PORTUGUESE[0]).input_ids
    vocabulary = read_vocabulary(tmp_path / "out")
    assert vocabulary.rows == tuple(extension.rows)
    with pytest.raises(ValueError, match="exists"):
        write_tokenizer(tmp_path / "out", extension, "name")


@pytest.mark.parametrize("change", [{"rows": []}, {"base": None, "rows": [{"id": "x"}]}, "ids"])
def test_a_damaged_list_of_rows_is_refused(base, tmp_path, change):
    write_tokenizer(tmp_path / "out", extend(base), "name")
    path = tmp_path / "out" / "vocabulary.json"
    content = json.loads(path.read_text())
    if change == "ids":
        content["rows"][0]["base"] = [10**9]
    else:
        content |= change
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"vocabulary.json"):
        read_vocabulary(tmp_path / "out")


def test_a_folder_without_a_list_of_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="softprompt vocabulary"):
        read_vocabulary(tmp_path)


def test_counts_are_bounded_and_name_their_error(base):
    pairs = list(product(ascii_lowercase, repeat=2))[:400]
    texts = ["common word"] * 200 + [f"rare{first}{second}" for first, second in pairs]
    counts = count_words(pieces_of(texts), base, max_words=50)
    assert len(counts.counts) <= 50
    assert counts.max_error >= 1
    [word] = [word for word in counts.counts if word == "common"]
    assert 200 - counts.max_error <= counts.counts[word] <= 200
    assert counts.documents[word] == counts.counts[word]
