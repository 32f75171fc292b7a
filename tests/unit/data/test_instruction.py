"""Rows of instructions and dialogues."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import tiny
import torch

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.chat_format import ChatFormat
from lightning_softprompt.core.types import SoftPrompt
from lightning_softprompt.data.instruction.datamodule import InstructionDataModule
from lightning_softprompt.data.readers.sources import DataError

CHAT = ChatFormat(
    "", "great : ", " . ", "what ", " ? ", "well ", "</s>", " ! ", system="good"
)  # words of the tiny vocabulary
DIALOGUE = ["a dog", "very good", "a film", "dull", "that story", "sad indeed"]


def messages_of(texts, system=None):
    """Returns messages of alternating roles."""
    roles = ("user", "assistant") * len(texts)
    first = [] if system is None else [{"role": "system", "content": system}]
    return {"messages": first + [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]}


@pytest.fixture
def make_data(tiny_folder):
    """Returns a function that creates a data module with the same rows in each split."""

    def make_data(rows, family="llama", **options):
        spec = BackboneSpec(name=str(tiny_folder(family)))
        splits = dict.fromkeys(("train", "validation", "test", "predict"), rows)
        defaults = {"chat_format": CHAT, "max_tokens": 44, "max_target_tokens": 6, "cache": False, "batch_size": 2}
        return InstructionDataModule(backbone=spec, **splits, **{**defaults, **options})

    return make_data


def read_tokens(module, ids):
    """Returns tokens as text; control tokens are spelled."""
    return " ".join(module.codec.tokenizer.convert_ids_to_tokens(list(ids)))


def read_row(module, row=0, split="train"):
    """Returns the text of a row, and the text of each of its answers."""
    encoded = module.split(split).encoded[row]
    answers = [[encoded.answers[0]]]
    for previous, position in pairwise(encoded.answers):
        if position > previous + 1:
            answers.append([])
        answers[-1].append(position)
    texts = [read_tokens(module, [encoded.ids[position] for position in answer]) for answer in answers]
    return read_tokens(module, encoded.ids), texts


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "a dog", "input": "long text", "output": "very good"},
        {"instruction": " a dog\n", "context": "long text", "response": "very good "},
        messages_of(["a dog long text", "very good"]),
    ],
    ids=["instruction", "dolly", "messages"],
)
def test_the_answer_and_the_token_that_ends_it_have_a_loss(make_data, row):
    text, answers = read_row(make_data([row]))
    assert text == "<s> great : good . what a dog long text ? well very good </s>"
    assert answers == ["very good </s>"]


def test_columns_have_other_names_and_an_input_may_be_missing(make_data):
    names = {"instruction": "text", "input": "about", "output": "story", "separator": " : "}
    rows = [{"text": "a dog", "about": "film", "story": "good"}, {"text": "a dog", "about": None, "story": "good"}]
    module = make_data(rows, system=False, **names)
    assert read_row(module, 0)[0] == "<s> what a dog : film ? well good </s>"
    assert read_row(module, 1)[0] == "<s> what a dog ? well good </s>"


def test_rows_of_other_tasks_become_instructions(make_data):
    rows = [{"text": "long story", "answers": ["sad", " ", "very sad"], "references": ["sad", "dull"]}]
    module = make_data(
        rows, default_instruction="a film :", input="text", output="answers", separator=" ", system=False
    )
    assert read_row(module)[0] == "<s> what a film : long story ? well sad </s>"
    assert module.split("test").examples[0].references == ("sad", "very sad", "dull")
    assert module.needed_columns == ("text",)
    with pytest.raises(DataError, match="'answers' must be a text or a list of texts"):
        make_data([{**rows[0], "answers": [" "]}], default_instruction="a", input="text", output="answers").split(
            "test"
        )


def test_all_answers_of_a_dialogue_have_a_loss_or_the_last_one(make_data):
    rows = [messages_of(DIALOGUE, system="funny")]
    text, answers = read_row(make_data(rows))
    assert text == (
        "<s> great : funny . what a dog ? well very good </s> ! what a film ? well dull </s> ! "
        "what that story ? well sad indeed </s>"
    )
    assert answers == ["very good </s>", "dull </s>", "sad indeed </s>"]
    last = make_data(rows, loss_turns="last")
    assert read_row(last) == (text, ["sad indeed </s>"])


@pytest.mark.parametrize(
    ("soft", "before"), [("start", 1), ("system", 3), ("user", 6)], ids=["start", "system", "user"]
)
def test_soft_tokens_are_before_the_first_turn_or_in_a_turn(make_data, soft, before):
    module = make_data([{"instruction": "a dog", "output": "good"}], soft=soft)
    assert module.split("train").encoded[0].slots == (before,)
    assert read_row(module)[0] == "<s> great : good . what a dog ? well good </s>"


def test_a_dialogue_that_is_too_long_loses_whole_turns(make_data):
    rows = [messages_of(DIALOGUE, system="funny")]
    for max_tokens, num_removed in ((33, 0), (32, 9), (24, 9), (23, 17), (16, 17)):
        module = make_data(rows, max_tokens=max_tokens)
        encoded = module.split("train").encoded[0]
        assert encoded.num_truncated == num_removed
        text, answers = read_row(module)
        assert text.startswith("<s> great : funny . what")
        assert text.endswith("what that story ? well sad indeed </s>")
        assert len(answers) == {0: 3, 9: 2, 17: 1}[num_removed]
    with pytest.raises(DataError, match="the last turn of a dialogue exceeds max_tokens by 1 tokens"):
        make_data(rows, max_tokens=15).split("train")


@pytest.mark.parametrize("side", ["end", "start"])
def test_the_input_is_truncated_before_the_instruction(make_data, side):
    rows = [{"instruction": "a dog is good", "input": "that film was dull", "output": "sad"}]
    options = {"system": False, "separator": ":", "max_target_tokens": 3, "truncation_side": side}
    kept = {"end": ("that film", "a dog"), "start": ("was dull", "is good")}[side]
    text, _ = read_row(make_data(rows, max_tokens=14, **options))
    assert text == f"<s> what a dog is good : {kept[0]} ? well sad </s>"
    text, _ = read_row(make_data(rows, max_tokens=10, **options))
    assert text == f"<s> what {kept[1]} : ? well sad </s>"


def test_a_truncated_answer_does_not_end_with_eos(make_data):
    rows = [{"instruction": "a dog", "output": text} for text in ("very good", "very good indeed , this is a film")]
    module = make_data(rows, max_target_tokens=3)
    assert [read_row(module, row)[1] for row in (0, 1)] == [["very good </s>"], ["very good indeed"]]
    short, long = module.split("test").encoded
    assert module.codec.with_answer(short, ()) == module.codec.with_answer(long, ())


def test_a_row_to_predict_ends_with_the_opening_of_an_answer(make_data):
    rows = [{"instruction": "a dog"}, messages_of(DIALOGUE[:3]), messages_of(DIALOGUE[:2])]
    module = make_data(rows, system=False)
    texts = [read_tokens(module, row.ids) for row in module.split("predict").encoded]
    assert texts == ["<s> what a dog ? well", "<s> what a dog ? well very good </s> ! what a film ? well", texts[0]]
    assert module.describe_row("predict", 0)["input"] == "a dog"
    assert module.describe_row("predict", 1)["input"] == "user: a dog\nassistant: very good\nuser: a film"
    with pytest.raises(DataError, match=r"no column 'output'; the row has instruction: set data.output"):
        module.split("train")


def test_an_encoder_decoder_predicts_the_last_answer(make_data):
    rows = [messages_of(DIALOGUE)]
    encoded = make_data(rows, family="t5", chat_format=None).split("train").encoded[0]
    assert encoded.ids.count(tiny.EOS) == 1
    assert len(encoded.targets) == 3
    with pytest.raises(ValueError, match="loss_turns=all requires a decoder"):
        make_data(rows, family="t5", loss_turns="all").split("train")


def test_a_masked_language_model_is_refused(make_data):
    with pytest.raises(ValueError, match="fills masks and generates no text"):
        make_data([messages_of(DIALOGUE)], family="bert").split("train")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "no column 'instruction' or 'messages'; the row has text"),
        ({"instruction": " ", "output": "a"}, "'instruction' must be non-empty text"),
        ({"instruction": "a", "output": 3}, "'output' must be non-empty text, got 3"),
        ({"messages": "a"}, "must be a list of messages"),
        ({"messages": [{"from": "human", "value": "a"}]}, "a message requires a role"),
        ({"messages": [{"role": "user", "content": "a"}] * 2}, r"must alternate .* got \['user', 'user'\]"),
        ({"messages": [{"role": "system", "content": "a"}]}, "must alternate"),
        (messages_of(DIALOGUE[:3]), "the last message must be of the assistant"),
        (messages_of(["a", " "]), "a message of the assistant is empty"),
    ],
)
def test_a_row_that_cannot_be_used_is_refused(make_data, row, message):
    with pytest.raises(DataError, match=message):
        make_data([row]).split("train")


def test_answers_that_cannot_attend_to_the_soft_tokens_are_refused(make_data):
    rows = [messages_of(DIALOGUE)]
    with pytest.raises(DataError, match="set loss_turns to last, or soft to start or system"):
        make_data(rows, soft="user").split("train")
    assert read_row(make_data(rows, soft="user", loss_turns="last"))[1] == ["sad indeed </s>"]
    with pytest.raises(ValueError, match="soft=system requires a system turn"):
        make_data(rows, soft="system", system=False).split("train")
    no_system = ChatFormat(user_opening="what")
    with pytest.raises(DataError, match="the chat format has no system turn"):
        make_data([messages_of(["a", "b"], system="c")], chat_format=no_system).split("train")


def test_a_format_that_differs_from_the_chat_template_is_reported(make_data, caplog):
    module = make_data([messages_of(DIALOGUE)])
    module.codec.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    with caplog.at_level("INFO"):
        module.split("train")
    assert "data.chat_format differs from the chat template of the tokenizer: the format gives 'great : good" in (
        caplog.text
    )


def test_the_cache_of_tokens_depends_on_format_and_loss(make_data):
    rows = [messages_of(DIALOGUE)]
    for options in ({}, {"loss_turns": "last"}, {"system": False}):
        cached = make_data(rows, cache=True, **options)
        assert cached.split("train").encoded == make_data(rows, **options).split("train").encoded


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_generated_answers_are_finished_if_they_end_before_the_maximum(make_data, load, family):
    module = make_data([{"instruction": "a dog", "output": text} for text in ("good", "very good")], family=family)
    batch = next(iter(module.test_dataloader()))
    evaluation, backbone = module.evaluation, load(family)
    endings = [[10, tiny.EOS, tiny.PAD, tiny.PAD], [10, 11, 12, 13], [10, 11, 12, tiny.EOS]]
    decoding = replace(module.decoding, max_new_tokens=4)
    assert decoding.are_finished(module.codec, torch.tensor(endings)) == [True, False, True]
    assert decoding.are_finished(module.codec, torch.tensor(endings)[:, :3]) == [True] * 3
    stop = module.codec.decode(torch.tensor([[12]]))[0]
    assert replace(decoding, stop=[stop]).are_finished(module.codec, torch.tensor(endings)) == [True] * 3
    lm = PromptedLM(backbone, lambda batch: SoftPrompt())
    evaluation.begin("test", 0)
    records = evaluation.update(lm, batch)
    metrics = {name: float(value) for name, value in evaluation.compute().items()}
    losses = lm.cross_entropy(batch).sum(1)
    assert metrics["cross_entropy"] == pytest.approx(float(losses.sum()) / 5, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["cross_entropy"]), rel=1e-5)
    assert metrics["finished"] == sum(record["scores"]["finished"] for record in records) / 2
    assert [record["details"]["tokens"] for record in records] == [len(row.targets) for row in batch.encoded]
    assert set(metrics) >= {"rougeL", "length_ratio", "finished_low", "cross_entropy_high"}


def test_a_validation_without_generation_computes_the_loss_of_all_rows(make_data, load):
    module = make_data([messages_of(DIALOGUE)] * 3, generate_every=2)
    evaluation, lm = module.evaluation, PromptedLM(load("llama"), lambda batch: SoftPrompt())
    evaluation.begin("val", 1)
    records = [record for batch in module.val_dataloader() for record in evaluation.update(lm, batch)]
    assert records == [None] * 3
    metrics = evaluation.compute()
    assert set(metrics) == {"cross_entropy", "perplexity", "generated"}
    assert evaluation.mode_of("perplexity") == "min"
    assert set(metrics) <= set(evaluation.logged)


def test_answers_of_dialogues_are_checked_against_the_constraints_of_their_rows(make_data, load):
    constraints = [{"kind": "no_commas"}, {"kind": "word_count", "low": 50, "high": 90}]  # of at most 6 tokens
    row = {"instruction": "a dog", "output": "good", "constraints": constraints}
    module = make_data([row] * 2, constraints="constraints")
    evaluation, lm = module.evaluation, PromptedLM(load("llama"), lambda batch: SoftPrompt())
    evaluation.begin("test", 0)
    records = [record for batch in module.test_dataloader() for record in evaluation.update(lm, batch)]
    metrics = evaluation.compute()
    commas = [float("," not in record["prediction"]) for record in records]
    assert metrics["no_commas_strict"] == pytest.approx(sum(commas) / 2)
    assert metrics["word_count_strict"] == metrics["prompts_strict"] == 0
    assert metrics["constraints_strict"] == pytest.approx(sum(commas) / 4)
    with pytest.raises(DataError, match=r"no column 'rules'.*data\.constraints"):
        make_data([row], constraints="rules").split("test")
