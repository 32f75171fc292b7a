"""Names of the tokens of a row, in every family."""

import pytest

from lightning_softprompt.backbones.tokenization.token_names import NamedPiece, name_tokens
from lightning_softprompt.core.types import Answer, Slot, Text

PIECES = [
    NamedPiece(Text("a warm film"), "one"),
    NamedPiece(Text(" , ")),
    NamedPiece(Slot()),
    NamedPiece(Text("is it sad"), "two"),
    NamedPiece(Text(" :")),
    NamedPiece(Answer(" ")),
]
AFTER = NamedPiece(Text(" indeed ."), "after")


def words_by_name(codec, row, names):
    words = {}
    for token, name in zip(codec.tokenizer.convert_ids_to_tokens(row.ids), names, strict=True):
        words.setdefault(name, []).append(token)
    return {name: " ".join(tokens) for name, tokens in words.items()}


def test_tokens_have_the_name_of_their_piece(backbone, family):
    codec = backbone.codec
    pieces = PIECES if backbone.is_causal else [*PIECES, AFTER]
    row = codec.encode([named.piece for named in pieces], "very good", append_eos=True)
    words = words_by_name(codec, row, name_tokens(codec, pieces, row))
    assert words["one"] == "a warm film"
    assert words["two"] == "is it sad"
    assert words.get("after") == (None if backbone.is_causal else "indeed .")
    answer = {"bert": "<mask> <mask>", "t5": None, "bart": None}
    assert words.get("answer") == answer.get(family, "very good </s>")
    end = " ".join(codec.tokenizer.convert_ids_to_tokens(list(codec.end)))
    assert words["template"] == f", : {end}".rstrip()


def test_a_token_that_spans_two_pieces_belongs_to_its_first_visible_character(load):
    codec = load("llama").codec
    codec.tokenizer.add_tokens(["dog film", " text"])
    pieces = [NamedPiece(Text("a dog"), "one"), NamedPiece(Text(" film "), "two"), NamedPiece(Text("text"), "three")]
    pieces += [NamedPiece(Answer(" "))]
    row = codec.encode([named.piece for named in pieces], "good")
    assert words_by_name(codec, row, name_tokens(codec, pieces, row)) == {
        "start": "<s>", "one": "a dog film", "three": " text", "answer": "good",
    }  # fmt: skip


def test_truncated_rows_are_refused(load):
    codec = load("llama").codec
    pieces = [NamedPiece(Text("a b a b a b", truncatable=True), "one"), NamedPiece(Answer(" "))]
    row = codec.encode([named.piece for named in pieces], "good", 4)
    with pytest.raises(ValueError, match="truncated row"):
        name_tokens(codec, pieces, row)
