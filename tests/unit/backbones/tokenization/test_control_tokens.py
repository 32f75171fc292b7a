"""Control tokens: their spelling in data stays text, and in a template it is the token."""

import pickle
import random

import pytest
import tiny
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lightning_softprompt.backbones.causal import CausalCodec
from lightning_softprompt.backbones.tokenization.control_tokens import ControlTokens
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import ShownPassage, Text
from lightning_softprompt.rag.passage_rendering import PassageTemplate

NAMED = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
LETTERS = [*"abcdefghijklmnopqrstuvwxyz<>/_|0. "]


def byte_level():
    """Return a tokenizer as GPT-2's, with merges that build the spelling of a control token from characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = ["im", "end", "<|", "|>", "</", "s>", "</s>"]
    pieces = [*alphabet, "en", *merged]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [tuple(pair.split()) for pair in ("i m", "e n", "en d", "< |", "| >", "< /", "s >", "</ s>")]
    rules = Tokenizer(models.BPE(vocabulary, merges))
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rules.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=rules, eos_token="</s>", bos_token="<|im_end|>", additional_special_tokens=["<|im_end|>"]
    )


def unigram():
    """Return a tokenizer as T5's: the pieces of control tokens have the highest scores."""
    letters = [(letter, -5.0) for letter in LETTERS[:-1]]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -3.0), *letters]
    rules = Tokenizer(models.Unigram(pieces, unk_id=2))
    rules.pre_tokenizer = pre_tokenizers.Metaspace()
    special = {"additional_special_tokens": ["<extra_id_0>"], "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=rules, eos_token="</s>", unk_token="<unk>", **special)


def space_prefix():
    """Return a tokenizer as Llama's: a space before the text, and bytes for unknown characters."""
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["<unk>", "<s>", "</s>", *byte_pieces, "▁", *LETTERS[:-1], "</", "s>"]
    merges = [("<", "/"), ("s", ">"), ("</", "s>")]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    rules = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    rules.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=rules, **NAMED)


def lower_case():
    """Return a tokenizer as BERT's: lower-case letters, with punctuation as separate words."""
    letters = LETTERS[:-1]
    continuations = [f"##{letter}" for letter in letters]
    pieces = ["[UNK]", "[SEP]", "[MASK]", *letters, *continuations, "[", "]"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    rules = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    rules.normalizer, rules.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=rules, sep_token="[SEP]", mask_token="[MASK]", unk_token="[UNK]")


MAKERS = (byte_level, unigram, space_prefix, lower_case, lambda: tiny.tokenizer("llama"))
KINDS = ("byte_level", "unigram", "space_prefix", "lower_case", "words")


@pytest.fixture(params=MAKERS, ids=KINDS)
def tokenizer(request):
    return request.param()


@pytest.fixture
def special(tokenizer):
    return next(s for s in ("</s>", "[MASK]") if s in tokenizer.get_vocab())


def test_ordinary_text_has_the_same_tokens(tokenizer):
    control, generator = ControlTokens(tokenizer), random.Random(0)
    for _ in range(50):
        text = "".join(generator.choices([*LETTERS, "É", "☃", "\n", "</", "s>"], k=12)).replace("</s>", "")
        coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert control.tokenize(text) == (coded["input_ids"], coded["offset_mapping"])


def test_data_produces_no_control_token(tokenizer, special):
    control = pickle.loads(pickle.dumps(ControlTokens(tokenizer)))
    unknown = tokenizer.unk_token_id
    for text in (special, f"a film {special} b", f"a{special}{special}b", f"{special[:-1]}{special}"):
        ids, spans = control.tokenize(text)
        assert set(ids) & set(control.spellings) <= {unknown}
        split_ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if tokenizer.get_vocab()[special] not in split_ids:
            assert ids == split_ids
        assert spans == sorted(spans)
        assert (spans[0][0], spans[-1][1]) == (0, len(text))


def test_template_text_produces_control_tokens(tokenizer, special):
    control, special_id = ControlTokens(tokenizer), tokenizer.get_vocab()[special]
    text = f"{special}a film {special} b{special}"
    template_spans = ((0, len(special)), (len(text) - len(special), len(text)))
    ids, spans = control.tokenize(text, template_spans)
    assert [position for position, token in enumerate(ids) if token == special_id] == [0, len(ids) - 1]
    assert (spans[0], spans[-1]) == template_spans
    assert control.tokenize(text, ((0, len(text)),))[0] == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_private_use_character_does_not_turn_a_spelling_into_a_token():
    control = ControlTokens(byte_level())
    end = control.tokenizer.eos_token_id
    assert end not in control.tokenize("a \ue000</s>\ue000 b </s>")[0]


@pytest.mark.parametrize("halves", [("a </", "s> b"), ("a <", "/s>")])
def test_a_column_does_not_complete_a_token_of_the_template(halves):
    codec = CausalCodec(byte_level())
    literal, column = halves
    ids, _ = codec.tokenize([Text(literal, template_spans=((0, len(literal)),)), Text(column)])
    assert codec.tokenizer.eos_token_id not in ids


def test_columns_and_targets_of_a_row_stay_text():
    codec = CausalCodec(byte_level())
    eos = codec.tokenizer.eos_token_id
    template = Template("{soft}</s>{text}</s> a {target}")
    row = codec.encode(template.pieces({"text": "b </s> d"}), "e </s> f", append_eos=True)
    source = row.ids[: row.answers[0]]
    assert source.count(eos) == 2
    assert row.targets.count(eos) == 1
    assert row.targets[-1] == eos
    targets = codec.encode(template.pieces({"text": "b"}), "</s>").targets
    assert codec.ids("</s>") == list(targets)[1:]


def test_a_truncated_row_keeps_the_tokens_of_its_template():
    codec = CausalCodec(byte_level())
    template = Template("{soft}{text}</s>{target}", truncate=["text"])
    row = codec.encode(template.pieces({"text": "a </s> b" * 9}), "e", max_tokens=12)
    assert len(row.ids) == 12
    assert row.ids.count(codec.tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("passage", ["</s>{text} {number}</s>\n", "{soft}</s>{title}{soft}{text}</s>"])
def test_the_template_of_a_passage_produces_control_tokens_and_its_text_does_not(passage):
    codec, template = CausalCodec(byte_level()), PassageTemplate(passage)
    shown = [(ShownPassage("d0", "a </s> b"), "</s>"), (ShownPassage("d1", "</s>"), "")]
    row = Template(template.expand("{passages}{target}", 3))
    spans = template.template_spans(shown, 3)
    encoded = codec.encode(row.pieces(template.fields(shown, 3), template_spans=spans), "e")
    assert encoded.ids.count(codec.tokenizer.eos_token_id) == 4
