"""Reads the chat format of a tokenizer from its chat template, and compares the two."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from lightning_softprompt.core.chat_format import ASSISTANT, SYSTEM, USER, ChatFormat, Turn

CONTENTS = {SYSTEM: "sentinelzero", USER: "sentinelone", ASSISTANT: "sentineltwo"}  # texts without white space
DIALOGUES = (  # roles and contents; the system turn is optional
    ((USER, "What is 2 + 2?"),),
    ((USER, "Hi!"), (ASSISTANT, "Hello. How are you?"), (USER, "Fine:\n- a\n- b")),
    ((USER, "a"), (ASSISTANT, "b"), (USER, "c"), (ASSISTANT, "d")),
)
SHOWN = 40  # characters of a difference in messages


def read_chat_format(tokenizer: PreTrainedTokenizerBase) -> ChatFormat | None:
    """Returns the chat format of a tokenizer; None if it has no chat template.

    Raises:
        ValueError: If the texts of the format differ from those of the template.
    """
    if not tokenizer.chat_template:
        return None
    chat = _derive_format(tokenizer)
    if difference := find_difference(chat, tokenizer):
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path} has no fixed text around the turns: {difference}. Set "
            "data.chat_format"
        )
    return chat


def _derive_format(tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    """Returns the text around the contents of turns. `find_difference` checks it."""
    user, assistant = CONTENTS[USER], CONTENTS[ASSISTANT]
    turns = [Turn.of(USER, user), Turn.of(ASSISTANT, assistant), Turn.of(USER, user), Turn.of(ASSISTANT, assistant)]
    opening, to_assistant, to_user, _, end = _split_at_contents(apply_template(tokenizer, turns), turns)
    assistant_closing = end[: _common_length(end, to_user)]
    user_opening = to_user.removeprefix(assistant_closing)
    question = _split_at_contents(apply_template(tokenizer, turns[:1], generates=False), turns[:1])[-1]
    user_closing = question[: _common_length(question, to_assistant)]
    begin, system_opening, system_closing = "", "", ""
    with_system = [Turn.of(SYSTEM, CONTENTS[SYSTEM]), *turns[:1]]
    if supports_system(tokenizer):
        before_system, to_first_user, _ = _split_at_contents(apply_template(tokenizer, with_system), with_system)
        bos = tokenizer.bos_token or ""
        if bos and user_opening.startswith(bos):  # then it begins each turn
            bos = ""
        begin = bos if before_system.startswith(bos) else ""
        system_opening = before_system.removeprefix(begin)
        system_closing = to_first_user.removesuffix(user_opening)
    else:
        begin = opening.removesuffix(user_opening)
    first = opening.removeprefix(begin).removesuffix(user_opening)
    system = None
    if first and system_opening:
        system = first.removeprefix(system_opening).removesuffix(system_closing)
    stop = _find_stop(tokenizer, assistant_closing)
    return ChatFormat(
        begin=begin,
        system_opening=system_opening,
        system_closing=system_closing,
        user_opening=user_opening,
        user_closing=user_closing,
        assistant_opening=to_assistant.removeprefix(user_closing),
        assistant_stop=stop,
        assistant_closing=assistant_closing.removeprefix(stop),
        system=system,
    )


def _split_at_contents(text: str, turns: Sequence[Turn]) -> list[str]:
    """Returns the texts before, between and after the contents of turns.

    Raises:
        ValueError: If the text does not contain each of them in order.
    """
    texts: list[str] = []
    for turn in turns:
        before, content, text = text.partition(turn.text)
        if not content:
            raise ValueError(f"the chat template leaves out the text of a {turn.role} turn; set data.chat_format")
        texts.append(before)
    return [*texts, text]


def _find_stop(tokenizer: PreTrainedTokenizerBase, closing: str) -> str:
    """Returns the first control token of the text after an answer, if only spaces precede it; else an empty text."""
    added = [str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
    starts = [token for token in {*added, *tokenizer.all_special_tokens} if closing.lstrip(" ").startswith(token)]
    if not starts:
        return ""
    num_spaces = len(closing) - len(closing.lstrip(" "))
    return closing[: num_spaces + max(map(len, starts))]


def supports_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template of a tokenizer accepts a system turn."""
    turns = [Turn.of(SYSTEM, CONTENTS[SYSTEM]), Turn.of(USER, CONTENTS[USER])]
    try:
        return CONTENTS[SYSTEM] in apply_template(tokenizer, turns)
    except Exception:  # an error of Jinja, or of the template itself
        return False


def apply_template(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], generates: bool | None = None) -> str:
    """Returns the text of turns by the chat template of a tokenizer.

    Args:
        tokenizer: The tokenizer.
        turns: The turns.
        generates: Whether the opening of an answer follows (default: after a user turn).
    """
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    if generates is None:
        generates = turns[-1].role == USER
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generates))


def find_difference(chat: ChatFormat, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Returns how the first dialogue that differs is written by a chat format and by the template of a tokenizer.

    Dialogues have one or several turns, with and without a system turn.
    """
    for contents in DIALOGUES:
        turns = [Turn.of(*content) for content in contents]
        variants = [turns]
        if chat.system_opening and supports_system(tokenizer):
            variants.append([Turn.of(SYSTEM, "Be brief."), *turns])
        for variant in variants:
            ours, theirs = chat.render(variant), apply_template(tokenizer, variant)
            if ours.rstrip(" ") != theirs.rstrip(" "):  # spaces before an answer belong to the answer
                return _describe_difference(ours, theirs)
    return None


def _describe_difference(ours: str, theirs: str) -> str:
    position = _common_length(ours, theirs)
    start = max(0, position - SHOWN // 2)
    end = position + SHOWN // 2
    return f"the format gives {ours[start:end]!r} at character {position}, the template {theirs[start:end]!r}"


def _common_length(first: str, second: str) -> int:
    """Returns the length of the common beginning of two texts.

    >>> _common_length("turn", "tune")
    2
    """
    length = 0
    while length < min(len(first), len(second)) and first[length] == second[length]:
        length += 1
    return length
