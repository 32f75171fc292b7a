import pickle
import re
from dataclasses import replace

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
    encoded,
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
    """The rows that the tensors of a batch contain, without ignored targets."""
    return [row_in_tensors(batch, b) for b in range(len(batch))]


def row_in_tensors(batch, b):
    mask = batch.mask[b]
    ids = batch.input_ids[b][mask].tolist()
    answers = (~batch.source[b][mask]).nonzero()[:, 0].tolist()
    targets = batch.targets[b][batch.targets[b] != IGNORE].tolist()
    start = int(mask.int().argmax())  # columns of padding before the row
    slots = [slot - start for slot in batch.slots[b].tolist()]
    columns = [] if batch.words is None else [word for word in batch.words[b].tolist() if word != IGNORE]
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
def test_rows_open_and_close_as_their_family_wants(codec, ids, answers, slots):
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
def test_a_target_that_is_not_known_leaves_its_place(codec, answers, targets):
    row = encode(codec, "{a} is {target}", target="", a="it")
    assert (row.answers, row.targets) == (answers, targets)


def test_a_closed_target_ends_with_what_stops_generation(codec, family):
    closed, open_ = (encode(codec, "{a} is {target}", a="it", append_eos=c) for c in (True, False))
    assert closed.targets == (*open_.targets, *([] if family in MASKED else [EOS]))
    unknown, as_before = (encode(codec, "{a} is {target}", target="", a="it", append_eos=c) for c in (True, False))
    assert unknown == as_before


def test_text_is_tokenized_across_pieces(codec):
    row = encode(codec, "{a}ful {b} {target}", a="wonder", b="film")
    assert "wonderful" in text(codec, row)
    assert "ful" not in text(codec, row)
    apart = encode(codec, "{a}{soft}ful {b} {target}", a="wonder", b="film")
    assert "wonderful" not in text(codec, apart)


@pytest.mark.parametrize("family", CAUSAL)
def test_a_causal_row_without_bos_or_eos_still_has_a_state_before_its_first_token(family):
    bare = tokenizer(family)
    bare.bos_token = bare.eos_token = None
    bare.pad_token = "<pad>"
    row = encode(CausalCodec(bare), "{target}")
    assert len(row.ids) == 2
    assert row.answers == (1,)


@pytest.mark.parametrize("family", ["gpt2"])
def test_a_causal_row_starts_with_bos_where_there_is_one(family):
    own = tokenizer(family)
    own.bos_token = "<s>"
    assert CausalCodec(own).start == (BOS,)


@pytest.mark.parametrize("family", ["t5"])
def test_a_masked_model_wants_a_mask_token(family):
    with pytest.raises(ValueError, match="requires a tokenizer with a mask token"):
        MaskedCodec(tokenizer(family))


# Rows that are too long


@pytest.mark.parametrize("most", range(8, 14))
def test_text_gives_way_and_slots_and_answer_do_not(codec, most):
    template, long = "{soft}{text}{soft} it was {target}", "a warm and funny film"
    whole = encode(codec, template, "very good", text=long)
    row = encode(codec, template, "very good", ["text"], most, text=long)
    whole_size, size = (len(r.ids) + (0 if r.answers else len(r.targets)) for r in (whole, row))
    assert size == min(most, whole_size)
    assert row.num_truncated == whole_size - size
    kept = " ".join(long.split()[: 5 - row.num_truncated])
    assert row._replace(num_truncated=0) == encode(codec, template, "very good", text=kept)


def test_the_end_of_the_last_column_goes_first(codec):
    columns = {"a": "one sad story", "b": "film about a dog", "c": "well said"}
    loose = ("a", "b")

    def row(most):
        return encode(codec, "{a} : {soft}{b} , {c} {target}", truncate=loose, max_tokens=most, **columns)

    whole = row(None)
    size = len(whole.ids) + (0 if whole.answers else 1)
    for cut, (a, b) in enumerate([(3, 4), (3, 3), (3, 2), (3, 1), (3, 0), (2, 0), (1, 0), (0, 0)]):
        short = {"a": " ".join(columns["a"].split()[:a]), "b": " ".join(columns["b"].split()[:b]), "c": columns["c"]}
        expected = encode(codec, "{a} : {soft}{b} , {c} {target}", **short)
        assert row(size - cut) == expected._replace(num_truncated=cut)
    with pytest.raises(ValueError, match="exceeds max_tokens by 8 tokens and only 7 are truncatable"):
        row(size - 8)


def test_a_token_that_is_only_partly_loose_stays(codec):
    row = encode(codec, "{a}ful {target}", truncate=["a"], max_tokens=4, a="very wonder")
    assert "wonderful" in text(codec, row)
    with pytest.raises(ValueError, match="exceeds max_tokens"):
        encode(codec, "{a}ful {target}", truncate=["a"], max_tokens=1, a="very wonder")


@pytest.mark.parametrize("family", ["t5", "bart", "bert"])
def test_text_after_the_answer_gives_way_too(codec):
    row = encode(codec, "{a} {target} {b}", truncate=["a", "b"], max_tokens=6, a="it is", b="a film about a dog")
    assert "it is" in " ".join(text(codec, row))
    assert "dog" not in text(codec, row)


@pytest.mark.parametrize("family", CAUSAL)
def test_text_that_a_causal_row_leaves_out_takes_no_room(codec):
    most = len(encode(codec, "{a} {target}", a="it is a film").ids)
    row = encode(codec, "{a} {target} never ends", truncate=["a"], max_tokens=most, a="it is a film")
    assert row.num_truncated == 0


@pytest.mark.parametrize("family", MASKED)
def test_an_unknown_answer_takes_the_room_of_its_mask(codec):
    assert len(encode(codec, "{a} {target}", "", ["a"], 6, a="it is a film about a dog").ids) == 6


@pytest.mark.parametrize("family", CAUSAL)
def test_a_slot_that_a_causal_answer_cannot_hear_is_an_error(codec):
    with pytest.raises(ValueError, match="soft"):
        encode(codec, "{a} {target}{soft}", a="it is")


# Words


def words_of(text):
    return tuple((match.start(), match.end()) for match in re.finditer(r"\S+", text))


TAGGED = "well : {soft}{text} . {soft}it is {target}"
SENTENCE = "one very,good film . funny! dog?"  # six words, ten tokens


@pytest.mark.parametrize("most", [*range(9, 22), None])
def test_words_begin_at_their_first_token_that_is_left(codec, family, most):
    pieces = Template(TAGGED, ["text"]).pieces({"text": SENTENCE}, {"text": words_of(SENTENCE)})
    row = codec.encode(pieces, "good", most)
    whole = [i for word in SENTENCE.split() for i in codec.ids(word)]
    start = len(codec.start) + 2
    assert [*row.ids[start : start + len(whole) - row.num_truncated]] == whole[: len(whole) - row.num_truncated]
    expected, at = [], 0
    for word in SENTENCE.split():
        expected.append(start + at if at < len(whole) - row.num_truncated else NO_TOKEN)
        at += len(codec.ids(word))
    assert list(row.words) == expected
    assert (NO_TOKEN in row.words) == (row.num_truncated > 1)


def test_a_row_that_keeps_none_of_its_words_is_an_error(codec):
    pieces = Template(TAGGED, ["text"]).pieces({"text": SENTENCE}, {"text": words_of(SENTENCE)})
    least = len(codec.encode(pieces, "good").ids) + (codec.assemble((), (), [0])[1] == range(0)) - 10
    assert codec.encode(pieces, "good", least + 1).words[1:] == (NO_TOKEN,) * 5
    with pytest.raises(ValueError, match="none of the 6 words of a row has a token after 10 tokens were truncated"):
        codec.encode(pieces, "good", least)


def test_a_slot_that_words_of_a_causal_row_cannot_hear_is_an_error(codec, family):
    pieces = Template("{text}{soft} it {target}").pieces({"text": "a dog"}, {"text": words_of("a dog")})
    if family not in CAUSAL:
        assert codec.encode(pieces, "").slots[0] > max(codec.encode(pieces, "").words)
        return
    with pytest.raises(ValueError, match=r"words of a causal model cannot attend to \{soft\} after them"):
        codec.encode(pieces, "")


@pytest.mark.parametrize("side", SIDES)
def test_words_move_with_padding_and_answers(codec, side):
    codec = on_side(codec, side)
    template, texts = Template("{soft}{text} it{soft} was {target}", ["text"]), (*TEXTS, SENTENCE)
    rows = [codec.encode(template.pieces({"text": t}, {"text": words_of(t)}), "very good", 12) for t in texts]
    labels = [tuple(range(len(row.words))) for row in rows]
    batch = codec.collate(rows, labels=labels)
    assert rows_in_tensors(batch) == [row._replace(num_truncated=0) for row in rows]
    for b, row in enumerate(rows):
        for w, at in enumerate(row.words):
            place, label = int(batch.words[b, w]), int(batch.labels[b, w])
            if at == NO_TOKEN:
                assert (place, label) == (NO_TOKEN, IGNORE)
            else:
                assert (int(batch.input_ids[b, place]), label) == (codec.ids(texts[b].split()[w])[0], w)
        assert set(batch.words[b, len(row.words) :].tolist()) <= {IGNORE}
        assert set(batch.labels[b, len(row.words) :].tolist()) <= {IGNORE}
    assert NO_TOKEN in rows[-1].words
    for row in rows:
        assert codec.with_answer(row, codec.ids("bad")).words == row.words


@pytest.mark.parametrize("family", MASKED)
def test_words_after_the_answer_move_with_it(codec):
    template, text = Template("{soft}it was {target} : {text}"), "a film"
    short, long = (codec.encode(template.pieces({"text": text}, {"text": words_of(text)}), t) for t in ("bad", "a b c"))
    assert [w - 2 for w in long.words] == list(short.words)
    assert codec.with_answer(short, long.targets) == long


SUBWORDS = {  # how words become tokens, and whether a token holds the space before its word
    "byte-level": (pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.ByteLevel.alphabet()),
    "metaspace": (pre_tokenizers.Metaspace(), []),
    "with spaces": (pre_tokenizers.Split(" ", "isolated"), []),
}


@pytest.mark.parametrize("kind", SUBWORDS)
def test_words_are_found_whatever_makes_of_them_tokens(kind):
    before, alphabet = SUBWORDS[kind]
    rules = Tokenizer(BPE(unk_token="<unk>"))
    rules.pre_tokenizer = before
    trainer = BpeTrainer(
        vocab_size=len(alphabet) + 90, special_tokens=["<unk>", "<s>", "<pad>"], initial_alphabet=alphabet
    )
    texts = [*TEXTS, "naïve cafés — don't pay 1 000,50 €", "🙂 smile 你好 world"]
    rules.train_from_iterator(texts, trainer)
    codec = CausalCodec(PreTrainedTokenizerFast(tokenizer_object=rules, bos_token="<s>", pad_token="<pad>"))
    several = 0
    for text in texts:
        row = codec.encode(Template("a{soft}{text} . {target}").pieces({"text": text}, {"text": words_of(text)}), "")
        coded = codec.tokenizer(f"{text} .", return_offsets_mapping=True)["offset_mapping"]
        shift = len(row.ids) - len(coded)
        for (start, end), at in zip(words_of(text), row.words, strict=True):
            owners = [n for n, (a, b) in enumerate(coded) if set(range(a, b)) & set(range(start, end))]
            assert at == shift + owners[0]
            several += len(owners) > 1
    assert several > 5


# Batches


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("template", [*TEMPLATES.values(), "{soft}{text} it{soft} was {target} ."])
def test_the_tensors_of_a_batch_contain_its_rows(codec, template, side):
    codec = on_side(codec, side)
    rows = encoded(codec, template)
    batch = codec.collate(rows)
    assert rows_in_tensors(batch) == [*batch.require_encoded()] == rows


@pytest.mark.parametrize("side", SIDES)
def test_padding_stands_on_its_side_and_everything_moves_with_it(codec, side):
    codec = on_side(codec, side)
    rows = encoded(codec, TEMPLATES["middle"])
    batch = codec.collate(rows, labels=[0, 1, 1, 0], row_ids=[7, 3, 9, 1])
    for b, row in enumerate(rows):
        width = batch.mask.shape[1]
        at = width - len(row.ids) if side == "left" else 0
        assert batch.mask[b].nonzero()[:, 0].tolist() == [*range(at, at + len(row.ids))]
        assert batch.input_ids[b, at : at + len(row.ids)].tolist() == list(row.ids)
        assert (batch.mask & ~batch.source)[b].nonzero()[:, 0].tolist() == [at + a for a in row.answers]
        assert batch.slots[b].tolist() == [at + s for s in row.slots]
        assert batch.targets[b].tolist() == [*row.targets, *[IGNORE] * (batch.targets.shape[1] - len(row.targets))]
    assert (batch.input_ids[~batch.mask] == codec.pad_id).all()
    assert not batch.source[~batch.mask].any()
    assert (batch.labels.tolist(), batch.row_ids, len(batch)) == ([0, 1, 1, 0], (7, 3, 9, 1), 4)


@pytest.mark.parametrize(
    ("cut", "left"), [("end", "a very warm"), ("start", "and funny film"), ("middle", "a very film")]
)
def test_text_is_cut_at_its_end_its_start_or_in_the_middle(codec, cut, left):
    template = Template("{text}{soft} it was {target}", ["text"])
    pieces = template.pieces({"text": "a very warm and funny film"})
    whole = codec.encode(pieces, "good")
    most = len(whole.ids) + (not whole.answers) - 3  # an answer that is the decoder's counts too
    row = codec.encode(pieces, "good", max_tokens=most, truncation_side=cut)
    assert (row.num_truncated, " ".join(text(codec, row)[len(codec.start) :][:3])) == (3, left)


def test_a_batch_goes_to_another_device_whole(codec):
    rows = [row._replace(words=(1,)) for row in encoded(codec, TEMPLATES["front"])]
    batch = codec.collate(rows, labels=[(0,)] * 4, task_ids=torch.arange(4), row_ids=range(4))
    moved = batch.to("meta")
    assert {t.device.type for t in vars(moved).values() if isinstance(t, torch.Tensor)} == {"meta"}
    assert batch.input_ids.device.type == "cpu"
    assert moved.encoded is batch.encoded


def test_the_rows_of_a_batch_follow_it_through_processes_and_parts(codec):
    rows = encoded(codec, TEMPLATES["middle"])
    batch = codec.collate(rows, task_ids=torch.tensor([1, 0, 1, 0]), row_ids=[7, 3, 9, 1])
    copy = pickle.loads(pickle.dumps(batch))
    assert (copy.encoded, copy.row_ids) == (tuple(rows), (7, 3, 9, 1))
    part = batch.only([2, 0])
    assert (part.encoded, part.row_ids, part.global_row_ids) == ((rows[2], rows[0]), (9, 7), (9, 7))
    assert rows_in_tensors(part) == [rows[2], rows[0]]
    assert [(task, part.encoded) for task, _, part in batch.by_task()] == [(0, (*rows[1::2],)), (1, (*rows[::2],))]


def test_a_batch_without_its_rows_is_refused_where_they_are_needed(codec):
    batch = replace(batch_of(codec), encoded=None)
    for use in (codec.without_answers, lambda batch: codec.candidates(batch, [[1]])):
        with pytest.raises(ValueError, match="create it with `Codec"):
            use(batch)


@pytest.mark.parametrize("template", [*TEMPLATES.values(), "{soft}{text} it{soft} was {target} ."])
def test_another_answer_makes_the_row_that_would_have_been_written_with_it(codec, template):
    for row, other in zip(encoded(codec, template), encoded(codec, template, targets=TARGETS[::-1]), strict=True):
        assert codec.with_answer(row, other.targets) == other


@pytest.mark.parametrize("family", [*SEQ2SEQ, *MASKED])
def test_a_slot_after_the_answer_moves_with_another_answer(codec):
    template = "{soft}{text} was {target}{soft} .{soft}"
    for answer in ("very good indeed", "bad", ""):
        for row, other in zip(
            encoded(codec, template), encoded(codec, template, targets=[answer] * len(TEXTS)), strict=True
        ):
            assert codec.with_answer(row, codec.ids(answer)) == other


@pytest.mark.parametrize("side", SIDES)
def test_candidates_are_every_row_with_every_answer(codec, side):
    codec = on_side(codec, side)
    answers = [codec.ids("very good"), codec.ids("bad")]
    batch = replace(batch_of(codec, TEMPLATES["middle"]), task_ids=torch.tensor([4, 5, 6, 7]))
    asked = codec.candidates(batch, answers)
    texts, targets = [t for t in TEXTS for _ in answers], ["very good", "bad"] * len(TEXTS)
    assert rows_in_tensors(asked) == [*asked.encoded] == encoded(codec, TEMPLATES["middle"], texts, targets)
    assert asked.task_ids.tolist() == [4, 4, 5, 5, 6, 6, 7, 7]


@pytest.mark.parametrize("side", SIDES)
def test_questions_hold_nothing_of_the_answer(codec, side, family):
    codec = on_side(codec, side)
    questions, rows = (
        codec.without_answers(batch_of(codec)),
        encoded(codec, TEMPLATES["front"], targets=[""] * len(TEXTS)),
    )
    assert [*questions.require_encoded()] == rows
    assert rows_in_tensors(questions) == [row._replace(targets=()) for row in rows]
    assert all(MASK in row.ids for row in rows) == (family in MASKED)


def test_tokens_become_text_without_what_is_special(codec):
    good, very = codec.ids("good")[0], codec.ids("very")[0]
    ids = torch.tensor([[very, good, EOS, codec.pad_id], [good, IGNORE, IGNORE, IGNORE]])
    assert codec.decode(ids) == ["very good", "good"]


def test_only_fast_tokenizers_can_be_used(codec):
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="a fast tokenizer is required"):
        type(codec)(Slow())


def test_what_decides_tokens_decides_the_fingerprint(codec, family):
    prints = {f: CODECS[f](tokenizer(f)).fingerprint for f in CODECS}
    assert len(set(prints.values())) == len(prints)
    assert codec.fingerprint == prints[family]
    other = tokenizer(family)
    other.add_tokens(["unheard"])
    assert type(codec)(other).fingerprint != codec.fingerprint
