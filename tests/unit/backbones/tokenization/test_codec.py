import pickle
import re
from dataclasses import replace
from itertools import chain

import pytest
import torch
from tiny import (
    BOS,
    CAUSAL,
    EOS,
    MASK,
    MASKED,
    SEQ2SEQ,
    TARGETS,
    TEMPLATES,
    TEXTS,
    batch_of,
    encode_rows,
    on_side,
    tokenizer,
)
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from lightning_softprompt.backbones.causal import CausalCodec
from lightning_softprompt.backbones.masked import MaskedCodec
from lightning_softprompt.backbones.seq2seq import Seq2SeqCodec
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import IGNORE, NO_TOKEN, Encoded

CODECS = dict.fromkeys(CAUSAL, CausalCodec) | dict.fromkeys(SEQ2SEQ, Seq2SeqCodec) | dict.fromkeys(MASKED, MaskedCodec)
SIDES = ("right", "left")


@pytest.fixture
def codec(family):
    return CODECS[family](tokenizer(family))


def encode(codec, template, target="good", truncate=(), max_tokens=None, append_eos=False, **fields):
    return codec.encode(Template(template, truncate).pieces(fields), target, max_tokens, append_eos)


def rows_in_tensors(batch):
    """Return the rows that the tensors of a batch contain, without ignored targets."""
    return [row_in_tensors(batch, b) for b in range(len(batch))]


def row_in_tensors(batch, b):
    mask = batch.mask[b]
    ids = batch.input_ids[b][mask].tolist()
    answers = (~batch.source[b][mask]).nonzero()[:, 0].tolist()
    targets = batch.targets[b][batch.targets[b] != IGNORE].tolist()
    start = int(mask.int().argmax())  # columns of padding before the row
    slots = [slot - start for slot in batch.slots[b].tolist()]
    columns = [] if batch.words is None else batch.words[b].tolist()
    columns = [column for column in columns if column != IGNORE]
    words = [NO_TOKEN if column == NO_TOKEN else column - start for column in columns]
    return Encoded(tuple(ids), tuple(answers), tuple(targets), tuple(slots), tuple(words))


def text(codec, row):
    return codec.tokenizer.convert_ids_to_tokens(list(row.ids))


# What a row looks like


@pytest.mark.parametrize(
    ("family", "ids", "answers", "slots"),
    [
        ("llama", "<s> it is very good", (3, 4), (1, 2)),
        ("gpt2", "</s> it is very good", (3, 4), (1, 2)),
        ("t5", "it is . </s>", (), (0, 1)),
        ("bart", "<s> it is . </s>", (), (1, 2)),
        ("bert", "<s> it is <mask> <mask> . </s>", (3, 4), (1, 2)),
    ],
)
def test_rows_have_the_special_tokens_of_their_family(codec, ids, answers, slots):
    row = encode(codec, "{soft}{a}{soft} is {target} .", target="very good", a="it")
    assert text(codec, row) == ids.split()
    assert (row.answers, row.slots) == (answers, slots)
    assert row.targets == tuple(codec.ids("very good"))
    assert row.num_truncated == 0


@pytest.mark.parametrize(("family", "slot"), [("t5", 3), ("bart", 4), ("bert", 5)])
def test_a_slot_after_the_answer_moves_with_it(codec, slot):
    assert encode(codec, "{a} is {target} .{soft}", a="it").slots == (slot,)


@pytest.mark.parametrize(
    ("family", "answers", "targets"), [("llama", (), ()), ("t5", (), ()), ("bert", (3,), (IGNORE,))]
)
def test_an_unknown_target_leaves_a_mask_only_in_masked_models(codec, answers, targets):
    row = encode(codec, "{a} is {target}", target="", a="it")
    assert (row.answers, row.targets) == (answers, targets)


def test_append_eos_ends_a_known_target_with_the_token_that_stops_generation(codec, family):
    template = "{a} is {target}"
    plain = encode(codec, template, a="it")
    with_eos = encode(codec, template, a="it", append_eos=True)
    assert with_eos.targets == (*plain.targets, *([] if family in MASKED else [EOS]))
    unknown = encode(codec, template, target="", a="it")
    assert encode(codec, template, target="", a="it", append_eos=True) == unknown


def test_text_is_tokenized_across_pieces(codec):
    row = encode(codec, "{a}ful {b} {target}", a="wonder", b="film")
    assert "wonderful" in text(codec, row)
    assert "ful" not in text(codec, row)
    separate = encode(codec, "{a}{soft}ful {b} {target}", a="wonder", b="film")
    assert "wonderful" not in text(codec, separate)


@pytest.mark.parametrize("family", CAUSAL)
def test_a_causal_row_without_bos_or_eos_still_has_a_state_before_its_first_token(family):
    tokens = tokenizer(family)
    tokens.bos_token = tokens.eos_token = None
    tokens.pad_token = "<pad>"
    row = encode(CausalCodec(tokens), "{target}")
    assert len(row.ids) == 2
    assert row.answers == (1,)


def test_a_causal_row_starts_with_bos_if_the_tokenizer_has_one():
    tokens = tokenizer("gpt2")
    tokens.bos_token = "<s>"
    assert CausalCodec(tokens).start == (BOS,)


def test_a_masked_model_requires_a_mask_token():
    with pytest.raises(ValueError, match="requires a tokenizer with a mask token"):
        MaskedCodec(tokenizer("t5"))


# Rows that are too long


def size_of(row):
    """Return the number of tokens of a row, with the targets that only the decoder reads."""
    return len(row.ids) if row.answers else len(row.ids) + len(row.targets)


@pytest.mark.parametrize("max_tokens", range(8, 14))
def test_text_is_truncated_and_slots_and_answer_are_not(codec, max_tokens):
    template, long = "{soft}{text}{soft} it was {target}", "a warm and funny film"
    full_size = size_of(encode(codec, template, "very good", text=long))
    row = encode(codec, template, "very good", ["text"], max_tokens, text=long)
    assert size_of(row) == min(max_tokens, full_size)
    assert row.num_truncated == full_size - size_of(row)
    words = long.split()
    remaining = " ".join(words[: len(words) - row.num_truncated])
    assert row._replace(num_truncated=0) == encode(codec, template, "very good", text=remaining)


def test_the_end_of_the_last_column_is_truncated_first(codec):
    template = "{a} : {soft}{b} , {c} {target}"
    first, second, last = "one sad story", "film about a dog", "well said"

    def row(max_tokens):
        return encode(codec, template, "good", ("a", "b"), max_tokens, a=first, b=second, c=last)

    size = size_of(row(None))
    words_left = [(3, count) for count in (4, 3, 2, 1, 0)]  # of the first and second column
    words_left += [(count, 0) for count in (2, 1, 0)]
    for num_truncated, (in_first, in_second) in enumerate(words_left):
        short_first = " ".join(first.split()[:in_first])
        short_second = " ".join(second.split()[:in_second])
        expected = encode(codec, template, a=short_first, b=short_second, c=last)
        assert row(size - num_truncated) == expected._replace(num_truncated=num_truncated)
    with pytest.raises(ValueError, match="exceeds max_tokens by 8 tokens and only 7 are truncatable"):
        row(size - 8)


def test_a_token_that_is_only_partly_truncatable_remains(codec):
    row = encode(codec, "{a}ful {target}", truncate=["a"], max_tokens=4, a="very wonder")
    assert "wonderful" in text(codec, row)
    with pytest.raises(ValueError, match="exceeds max_tokens"):
        encode(codec, "{a}ful {target}", truncate=["a"], max_tokens=1, a="very wonder")


@pytest.mark.parametrize("family", ["t5", "bart", "bert"])
def test_text_after_the_answer_is_truncated_too(codec):
    template, columns = "{a} {target} {b}", {"a": "it is", "b": "a film about a dog"}
    row = encode(codec, template, truncate=["a", "b"], max_tokens=6, **columns)
    assert "it is" in " ".join(text(codec, row))
    assert "dog" not in text(codec, row)


@pytest.mark.parametrize("family", CAUSAL)
def test_text_after_the_answer_of_a_causal_row_does_not_count(codec):
    size = len(encode(codec, "{a} {target}", a="it is a film").ids)
    row = encode(codec, "{a} {target} never ends", truncate=["a"], max_tokens=size, a="it is a film")
    assert row.num_truncated == 0


@pytest.mark.parametrize("family", MASKED)
def test_an_unknown_answer_counts_as_its_mask(codec):
    assert len(encode(codec, "{a} {target}", "", ["a"], 6, a="it is a film about a dog").ids) == 6


@pytest.mark.parametrize("family", CAUSAL)
def test_a_slot_that_a_causal_answer_cannot_attend_to_is_an_error(codec):
    with pytest.raises(ValueError, match="soft"):
        encode(codec, "{a} {target}{soft}", a="it is")


# Words


def word_spans(text):
    return tuple((match.start(), match.end()) for match in re.finditer(r"\S+", text))


TAGGED = "well : {soft}{text} . {soft}it is {target}"
SENTENCE = "one very,good film . funny! dog?"  # six words, ten tokens


@pytest.mark.parametrize("max_tokens", [*range(9, 22), None])
def test_a_word_is_at_its_first_token_that_remains(codec, max_tokens):
    pieces = Template(TAGGED, ["text"]).pieces({"text": SENTENCE}, {"text": word_spans(SENTENCE)})
    row = codec.encode(pieces, "good", max_tokens)
    ids_by_word = [codec.ids(word) for word in SENTENCE.split()]
    ids = [*chain.from_iterable(ids_by_word)]
    num_left = len(ids) - row.num_truncated
    start = len(codec.start) + 2
    assert list(row.ids[start : start + num_left]) == ids[:num_left]
    expected, position = [], 0
    for word_ids in ids_by_word:
        expected.append(start + position if position < num_left else NO_TOKEN)
        position += len(word_ids)
    assert list(row.words) == expected
    assert (NO_TOKEN in row.words) == (row.num_truncated > 1)


def test_a_row_without_any_of_its_words_is_an_error(codec):
    pieces = Template(TAGGED, ["text"]).pieces({"text": SENTENCE}, {"text": word_spans(SENTENCE)})
    size_without_words = size_of(codec.encode(pieces, "good")) - 10
    assert codec.encode(pieces, "good", size_without_words + 1).words[1:] == (NO_TOKEN,) * 5
    with pytest.raises(ValueError, match="none of the 6 words of a row has a token after 10 tokens were truncated"):
        codec.encode(pieces, "good", size_without_words)


def test_a_slot_that_words_of_a_causal_row_cannot_attend_to_is_an_error(codec, family):
    pieces = Template("{text}{soft} it {target}").pieces({"text": "a dog"}, {"text": word_spans("a dog")})
    if family not in CAUSAL:
        assert codec.encode(pieces, "").slots[0] > max(codec.encode(pieces, "").words)
        return
    with pytest.raises(ValueError, match=r"words of a causal model cannot attend to \{soft\} after them"):
        codec.encode(pieces, "")


@pytest.mark.parametrize("side", SIDES)
def test_words_move_with_padding_and_answers(codec, side):
    codec = on_side(codec, side)
    template = Template("{soft}{text} it{soft} was {target}", ["text"])
    texts = (*TEXTS, SENTENCE)
    pieces = [template.pieces({"text": text}, {"text": word_spans(text)}) for text in texts]
    rows = [codec.encode(each, "very good", 12) for each in pieces]
    labels = [tuple(range(len(row.words))) for row in rows]
    batch = codec.collate(rows, labels=labels)
    assert rows_in_tensors(batch) == [row._replace(num_truncated=0) for row in rows]
    for b, row in enumerate(rows):
        for w, word in enumerate(texts[b].split()):
            position, label = int(batch.words[b, w]), int(batch.labels[b, w])
            if row.words[w] == NO_TOKEN:
                assert (position, label) == (NO_TOKEN, IGNORE)
            else:
                assert int(batch.input_ids[b, position]) == codec.ids(word)[0]
                assert label == w
        assert set(batch.words[b, len(row.words) :].tolist()) <= {IGNORE}
        assert set(batch.labels[b, len(row.words) :].tolist()) <= {IGNORE}
    assert NO_TOKEN in rows[-1].words
    for row in rows:
        assert codec.with_answer(row, codec.ids("bad")).words == row.words


@pytest.mark.parametrize("family", MASKED)
def test_words_after_the_answer_move_with_it(codec):
    template, text = Template("{soft}it was {target} : {text}"), "a film"
    pieces = template.pieces({"text": text}, {"text": word_spans(text)})
    short, long = codec.encode(pieces, "bad"), codec.encode(pieces, "a b c")
    assert [w - 2 for w in long.words] == list(short.words)
    assert codec.with_answer(short, long.targets) == long


SUBWORDS = {  # how words become tokens, and whether a token contains the space before its word
    "byte-level": (pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.ByteLevel.alphabet()),
    "metaspace": (pre_tokenizers.Metaspace(), []),
    "with spaces": (pre_tokenizers.Split(" ", "isolated"), []),
}


@pytest.mark.parametrize("kind", SUBWORDS)
def test_words_are_found_with_every_kind_of_subword_tokenizer(kind):
    pre_tokenizer, alphabet = SUBWORDS[kind]
    rules = Tokenizer(BPE(unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizer
    trainer = BpeTrainer(
        vocab_size=len(alphabet) + 90, special_tokens=["<unk>", "<s>", "<pad>"], initial_alphabet=alphabet
    )
    texts = [*TEXTS, "naïve cafés — don't pay 1 000,50 €", "🙂 smile 你好 world"]
    rules.train_from_iterator(texts, trainer)
    codec = CausalCodec(PreTrainedTokenizerFast(tokenizer_object=rules, bos_token="<s>", pad_token="<pad>"))
    template = Template("a{soft}{text} . {target}")
    words_of_several_tokens = 0
    for text in texts:
        row = codec.encode(template.pieces({"text": text}, {"text": word_spans(text)}), "")
        token_spans = codec.tokenizer(f"{text} .", return_offsets_mapping=True)["offset_mapping"]
        shift = len(row.ids) - len(token_spans)
        for (start, end), position in zip(word_spans(text), row.words, strict=True):
            overlapping = [n for n, (first, stop) in enumerate(token_spans) if max(first, start) < min(stop, end)]
            assert position == shift + overlapping[0]
            words_of_several_tokens += len(overlapping) > 1
    assert words_of_several_tokens > 5


# Batches


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("template", [*TEMPLATES.values(), "{soft}{text} it{soft} was {target} ."])
def test_the_tensors_of_a_batch_contain_its_rows(codec, template, side):
    codec = on_side(codec, side)
    rows = encode_rows(codec, template)
    batch = codec.collate(rows)
    assert rows_in_tensors(batch) == [*batch.require_encoded()] == rows


@pytest.mark.parametrize("side", SIDES)
def test_padding_is_on_one_side_and_positions_move_with_it(codec, side):
    codec = on_side(codec, side)
    rows = encode_rows(codec, TEMPLATES["middle"])
    batch = codec.collate(rows, labels=[0, 1, 1, 0], row_ids=[7, 3, 9, 1])
    for b, row in enumerate(rows):
        start = batch.mask.shape[1] - len(row.ids) if side == "left" else 0
        stop = start + len(row.ids)
        assert batch.mask[b].nonzero()[:, 0].tolist() == [*range(start, stop)]
        assert batch.input_ids[b, start:stop].tolist() == list(row.ids)
        is_answer = batch.mask[b] & ~batch.source[b]
        assert is_answer.nonzero()[:, 0].tolist() == [start + answer for answer in row.answers]
        assert batch.slots[b].tolist() == [start + slot for slot in row.slots]
        targets = batch.targets[b].tolist()
        assert targets[: len(row.targets)] == list(row.targets)
        assert set(targets[len(row.targets) :]) <= {IGNORE}
    assert (batch.input_ids[~batch.mask] == codec.pad_id).all()
    assert not batch.source[~batch.mask].any()
    assert (batch.labels.tolist(), batch.row_ids, len(batch)) == ([0, 1, 1, 0], (7, 3, 9, 1), 4)


@pytest.mark.parametrize(
    ("side", "remaining"), [("end", "a very warm"), ("start", "and funny film"), ("middle", "a very film")]
)
def test_text_is_truncated_at_its_end_its_start_or_in_the_middle(codec, side, remaining):
    template = Template("{text}{soft} it was {target}", ["text"])
    pieces = template.pieces({"text": "a very warm and funny film"})
    size = size_of(codec.encode(pieces, "good"))
    row = codec.encode(pieces, "good", max_tokens=size - 3, truncation_side=side)
    assert row.num_truncated == 3
    start = len(codec.start)
    assert " ".join(text(codec, row)[start : start + 3]) == remaining


def test_every_tensor_of_a_batch_moves_to_another_device(codec):
    rows = [row._replace(words=(1,)) for row in encode_rows(codec, TEMPLATES["front"])]
    batch = codec.collate(rows, labels=[(0,)] * 4, task_ids=torch.arange(4), row_ids=range(4))
    moved = batch.to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert batch.input_ids.device.type == "cpu"
    assert moved.encoded is batch.encoded


def test_a_batch_keeps_its_rows_in_other_processes_and_in_parts(codec):
    rows = encode_rows(codec, TEMPLATES["middle"])
    batch = codec.collate(rows, task_ids=torch.tensor([1, 0, 1, 0]), row_ids=[7, 3, 9, 1])
    copy = pickle.loads(pickle.dumps(batch))
    assert (copy.encoded, copy.row_ids) == (tuple(rows), (7, 3, 9, 1))
    part = batch.only([2, 0])
    assert (part.encoded, part.row_ids, part.global_row_ids) == ((rows[2], rows[0]), (9, 7), (9, 7))
    assert rows_in_tensors(part) == [rows[2], rows[0]]
    rows_by_task = [(task, list(part.encoded)) for task, _, part in batch.by_task()]
    assert rows_by_task == [(0, rows[1::2]), (1, rows[::2])]


def test_functions_that_need_the_rows_of_a_batch_reject_one_without_them(codec):
    batch = replace(batch_of(codec), encoded=None)
    with pytest.raises(ValueError, match="create it with `Codec"):
        codec.without_answers(batch)
    with pytest.raises(ValueError, match="create it with `Codec"):
        codec.candidates(batch, [[1]])


@pytest.mark.parametrize("template", [*TEMPLATES.values(), "{soft}{text} it{soft} was {target} ."])
def test_with_answer_gives_the_row_that_is_encoded_with_that_answer(codec, template):
    rows = encode_rows(codec, template)
    others = encode_rows(codec, template, targets=TARGETS[::-1])
    for row, other in zip(rows, others, strict=True):
        assert codec.with_answer(row, other.targets) == other


@pytest.mark.parametrize("family", [*SEQ2SEQ, *MASKED])
def test_a_slot_after_the_answer_moves_with_another_answer(codec):
    template = "{soft}{text} was {target}{soft} .{soft}"
    rows = encode_rows(codec, template)
    for answer in ("very good indeed", "bad", ""):
        others = encode_rows(codec, template, targets=[answer] * len(TEXTS))
        for row, other in zip(rows, others, strict=True):
            assert codec.with_answer(row, codec.ids(answer)) == other


@pytest.mark.parametrize("side", SIDES)
def test_candidates_combine_every_row_with_every_answer(codec, side):
    codec = on_side(codec, side)
    answers = [codec.ids("very good"), codec.ids("bad")]
    batch = replace(batch_of(codec, TEMPLATES["middle"]), task_ids=torch.tensor([4, 5, 6, 7]))
    candidates = codec.candidates(batch, answers)
    texts, targets = [text for text in TEXTS for _ in answers], ["very good", "bad"] * len(TEXTS)
    rows = encode_rows(codec, TEMPLATES["middle"], texts, targets)
    assert [*candidates.encoded] == rows
    assert rows_in_tensors(candidates) == rows
    assert candidates.task_ids.tolist() == [4, 4, 5, 5, 6, 6, 7, 7]


@pytest.mark.parametrize("side", SIDES)
def test_without_answers_removes_the_answers(codec, side, family):
    codec = on_side(codec, side)
    questions = codec.without_answers(batch_of(codec))
    rows = encode_rows(codec, TEMPLATES["front"], targets=[""] * len(TEXTS))
    assert [*questions.require_encoded()] == rows
    assert rows_in_tensors(questions) == [row._replace(targets=()) for row in rows]
    assert all(MASK in row.ids for row in rows) == (family in MASKED)


def test_decoded_text_has_no_special_tokens(codec):
    good, very = codec.ids("good")[0], codec.ids("very")[0]
    ids = torch.tensor([[very, good, EOS, codec.pad_id], [good, IGNORE, IGNORE, IGNORE]])
    assert codec.decode(ids) == ["very good", "good"]


def test_only_fast_tokenizers_can_be_used(codec):
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="a fast tokenizer is required"):
        type(codec)(Slow())


def test_the_fingerprint_changes_with_the_tokenizer(codec, family):
    fingerprints = {name: CODECS[name](tokenizer(name)).fingerprint for name in CODECS}
    assert len(set(fingerprints.values())) == len(fingerprints)
    assert codec.fingerprint == fingerprints[family]
    other = tokenizer(family)
    other.add_tokens(["unseen"])
    assert type(codec)(other).fingerprint != codec.fingerprint
