"""The chat format of a tokenizer, which is read from its chat template and compared with it."""

import json
from pathlib import Path

import pytest
import tiny

from lightning_softprompt.backbones.loading import load_codec
from lightning_softprompt.backbones.tokenization.chat_template import apply_template, find_difference, read_chat_format
from lightning_softprompt.backbones.tokenization.dialogue import DialogueEncoder
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.chat_format import ChatFormat, Turn

DIALOGUES = Path(__file__).parents[5] / "shared" / "data" / "preference" / "hh_helpful_base" / "test.jsonl"
TURN = "<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n"
OPENING = "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
PLAIN = "{% for message in messages %}" + TURN + "{% endfor %}" + OPENING
SYSTEM = "{% if loop.first and message['role'] != 'system' %}<s>system\nBe kind.</s>\n{% endif %}"
TEMPLATES = {
    "without_system_turn": PLAIN,
    "with_default_system_turn": PLAIN.replace(TURN, SYSTEM + TURN),
    "bos_and_trim": "{{ bos_token }}" + PLAIN.replace("<s>", "## ").replace("['content']", "['content'] | trim"),
    "refuses_system_turns": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + PLAIN,
    "other_names": (
        "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}"
    ),
}


def tokenizer_with(template):
    tokenizer = tiny.tokenizer("llama")
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_format_writes_the_text_of_the_chat_template(name):
    tokenizer = tokenizer_with(TEMPLATES[name])
    chat = read_chat_format(tokenizer)
    turns = [Turn.of("user", "what ?"), Turn.of("assistant", "a dog"), Turn.of("user", "good !")]
    assert chat.render(turns).rstrip(" ") == apply_template(tokenizer, turns)
    assert chat.assistant_stop.strip() == "</s>"
    assert chat.system == ("Be kind." if name == "with_default_system_turn" else None)
    assert chat.begin == ("<s>" if name == "bos_and_trim" else "")


def test_a_template_whose_text_depends_on_the_turn_is_refused_with_the_difference():
    thinking = PLAIN.replace(
        "{{ message['content'] }}", "{% if loop.last %}<think></think>{% endif %}{{ message['content'] }}"
    )
    with pytest.raises(ValueError, match=r"no fixed text around the turns: the format gives .*Set data.chat_format"):
        read_chat_format(tokenizer_with(thinking))
    with pytest.raises(ValueError, match="leaves out the text of a user turn"):
        read_chat_format(tokenizer_with("{% for message in messages %}{% if loop.last %}x{% endif %}{% endfor %}"))


def test_without_a_chat_template_there_is_no_format():
    assert read_chat_format(tiny.tokenizer("llama")) is None


def test_the_difference_of_a_format_is_shown_at_its_position():
    tokenizer = tokenizer_with(PLAIN)
    assert find_difference(read_chat_format(tokenizer), tokenizer) is None
    difference = find_difference(ChatFormat(), tokenizer)
    assert difference.startswith("the format gives 'User: What is 2 + 2?")
    assert "the template '<s>user" in difference


def read_dialogues(count):
    """Returns the turns of real dialogues, of which each answer is followed by a line of the person."""
    dialogues = []
    for line in DIALOGUES.read_text().splitlines()[:count]:
        row = json.loads(line)
        turns = []
        for paragraph in f"\n\n{row['prompt']} {row['chosen']}".split("\n\nHuman: ")[1:]:
            question, _, answer = paragraph.partition("\n\nAssistant:")
            turns += [Turn.of("user", question.strip()), Turn.of("assistant", answer.strip())]
        dialogues.append(turns)
    return dialogues


def mask_by_rendering(tokenizer, turns):
    """Returns the tokens of a dialogue by the chat template, and the positions of its answers: those that each answer
    adds to the text before it, up to the control token that ends it.
    """
    ids, answers = [], []
    for number, turn in enumerate(turns, start=1):
        text = apply_template(tokenizer, turns[:number])
        longer = tokenizer(text, add_special_tokens=False)["input_ids"]
        if turn.role == "assistant":
            answers += range(len(ids), len(longer) - 1)  # the line break after the last token is not predicted
        ids = longer
    return ids, answers


@pytest.mark.slow
@pytest.mark.skipif(not DIALOGUES.is_file(), reason="requires the dialogues of hh_helpful_base beside the repository")
def test_answers_of_real_dialogues_are_those_of_the_rendered_chat_template():
    codec = load_codec(BackboneSpec())
    encoder = DialogueEncoder(codec, read_chat_format(codec.tokenizer), max_tokens=10_000, learns_all=True)
    dialogues = read_dialogues(100)
    assert sum(len(turns) for turns in dialogues) > 400
    for turns in dialogues:
        row = encoder.encode(turns[:-1], turns[-1].text)
        ids, answers = mask_by_rendering(codec.tokenizer, turns)
        assert [*row.ids, ids[-1]] == ids
        assert list(row.answers) == answers
        assert [row.ids[position] for position in row.answers] == list(row.targets)
        assert row.targets.count(codec.tokenizer.eos_token_id) == len(turns) // 2
