"""Each constraint on answers that meet it and on answers that miss it narrowly."""

import importlib.util
import json

import pytest
from row_files import read_rows, write_rows

from lightning_softprompt.__main__ import main
from lightning_softprompt.constraints.base import constraint_classes, read_constraint, read_constraints
from lightning_softprompt.constraints.if_eval import REFUSED
from lightning_softprompt.constraints.prompts import ARGUMENTS, Question, make_prompts

needs_if_eval = pytest.mark.skipif(importlib.util.find_spec("if_verifiable") is None, reason="an optional extra")
KINDS = [
    # constraint, answers that meet it, answers that do not
    ({"kind": "word_count", "low": 2, "high": 3}, ["one two", "Don't stop"], ["one", "one two three four", "- ..."]),
    ({"kind": "sentence_count", "low": 2, "high": 2}, ["Yes. No.", "One\ntwo"], ["Mr. Doe left.", "One. Big. Dog."]),
    ({"kind": "bullet_count", "count": 2}, ["* a\n* b", "Here:\n- a\n  • b"], ["* a", "* a\n*b", "* a\n* b\n* c"]),
    ({"kind": "lower_case"}, ["all small, 3", "ärger"], ["One capital", "123"]),
    ({"kind": "no_commas"}, ["a; b"], ["a, b", "一，二"]),  # noqa: RUF001
    (
        {"kind": "keywords", "contains": ["blue dog"], "forbids": ["cat"]},
        ["A Blue dog. Catty"], ["blue dogs", "blue dog cat"],
    ),
    ({"kind": "ends_with", "phrase": "That is all."}, ['x. that is all.\n"'], ["That is all. x", "That is all"]),
    (
        {"kind": "json_format", "keys": ["a"]},
        ['{"a": 1}', '```json\n{"a": []}\n```'], ['{"b": 1}', '{"a": 1,}', '["a"]', '{"a": 1} x'],
    ),
    ({"kind": "json_format"}, ["[1]"], ["1", "a"]),
    ({"kind": "two_answers"}, ["one\n******\ntwo"], ["one", "one******one", "a******b******c", "******b"]),
    (
        {"kind": "repeats_question", "question": "Why  is it?"},
        ["why is it? Because"], ["Why is it?", "Because. Why is it?"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("value", "met", "missed"), KINDS, ids=[str(value["kind"]) for value, _, _ in KINDS])
def test_a_constraint_accepts_and_refuses_answers(value, met, missed):
    constraint = read_constraint(value)
    assert constraint.instruction.endswith(".")
    assert [constraint.passes(answer) for answer in met] == [True] * len(met)
    assert [constraint.passes(answer) for answer in missed] == [False] * len(missed)
    assert not any(constraint.passes(empty, is_loose) for empty in ("", " \n") for is_loose in (False, True))


def test_loose_checks_ignore_the_first_and_last_line_and_markup():
    cases = {
        "Sure! Here it is:\nsmall letters": True,
        "small letters\nIs there More?": True,
        "Sure:\nsmall letters\nBye": True,
        "small\nBig\nsmall": False,
    }
    lower = read_constraint({"kind": "lower_case"})
    for answer, is_met in cases.items():
        assert not lower.passes(answer)
        assert lower.passes(answer, is_loose=True) == is_met
    ends = read_constraint({"kind": "ends_with", "phrase": "all."})
    assert not ends.passes("That is **all.**")
    assert ends.passes("That is **all.**", is_loose=True)
    two = read_constraint({"kind": "two_answers"})
    assert two.passes("one******two", is_loose=True)
    assert not two.passes("Sure:\none", is_loose=True)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_commas", "must be a mapping"),
        ({"kind": "no_comma"}, "did you mean 'no_commas'"),
        ({"kind": "word_count", "low": 3}, "missing 1 required positional argument: 'high'"),
        ({"kind": "word_count", "low": 3, "high": 2}, "low=3 and high=2"),
        ({"kind": "word_count", "low": "3", "high": 4}, "whole numbers"),
        ({"kind": "no_commas", "count": 2}, "no argument 'count'"),
        ({"kind": "keywords"}, "requires words"),
        ({"kind": "keywords", "contains": "word"}, "list of words"),
        ({"kind": "ends_with", "phrase": " "}, "requires a phrase"),
    ],
)
def test_a_wrong_constraint_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        read_constraint(value)
    for wrong in ("[]", [], {"kind": "no_commas"}, None):
        with pytest.raises(ValueError, match="non-empty list"):
            read_constraints(wrong)


def test_prompts_ask_for_each_constraint_and_are_the_same_for_a_seed(tmp_path, capsys):
    answer = "Because wonderful animals always travel slowly through several countries"
    rows = [{"instruction": f"Why is number {n} good?", "input": "", "output": answer} for n in range(5)]
    rows.append({"instruction": "Why is this good?", "input": "A text.", "output": answer})
    questions, out = write_rows(tmp_path / "questions.jsonl", rows), tmp_path / "prompts.jsonl"
    assert main(["constraints", str(questions), str(out), "--count=3"]) == 0
    prompts = read_rows(out)
    assert "Wrote 30 prompts of 3 questions" in capsys.readouterr().out
    kinds = [prompt["constraints"][0]["kind"] for prompt in prompts]
    assert kinds == 3 * list(ARGUMENTS)
    assert set(ARGUMENTS) == set(constraint_classes()) - {"if_eval"}
    for prompt in prompts:
        (constraint,) = read_constraints(prompt["constraints"])
        assert prompt["prompt"] == f"{prompt['question']} {constraint.instruction}"
        assert f"{prompt['source'].rpartition(':')[0]}" == str(questions)
    content = out.read_bytes()
    assert main(["constraints", str(questions), str(out), "--count=3"]) == 0
    assert out.read_bytes() == content
    assert main(["constraints", str(questions), str(out), "--count=3", "--seed=1"]) == 0
    assert out.read_bytes() != content
    assert main(["constraints", str(questions), str(out), "--count=6"]) == 2
    assert "5 of 5 are suitable" in capsys.readouterr().err


def test_required_words_are_words_of_the_answer_that_the_question_lacks():
    question = Question("Are wonderful things good?", "Wonderful animals eat slowly today.", "here")
    (row,) = [row for row in make_prompts([question], 1, 0) if row["constraints"][0]["kind"] == "keywords"]
    contains = row["constraints"][0]["contains"]
    assert len(contains) == 2
    assert set(contains) <= {"animals", "slowly", "today"}


@needs_if_eval
def test_the_checkers_of_if_eval_that_need_no_download_are_constraints():
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT

    created = []
    for name, checker in INSTRUCTION_DICT.items():
        keys = checker(name).get_instruction_args_keys()
        values = {"keywords": ["a"], "forbidden_words": ["a"], "language": "en", "first_word": "a", "starter": "a"}
        values |= {"relation": "at least", "let_relation": "at least", "capital_relation": "at least"}
        values |= {"keyword": "a", "letter": "a", "postscript_marker": "P.S.", "section_spliter": "Section"}
        values |= {"end_phrase": "a", "prompt_to_repeat": "a", "starter": "a"}
        value = {"kind": "if_eval", "id": name, "arguments": {key: values.get(key, 1) for key in keys}}
        if name in REFUSED:
            with pytest.raises(ValueError, match="must be downloaded"):
                read_constraint(value)
        else:
            created.append(read_constraint(value))
    assert len(created) == 23
    assert all(isinstance(constraint.passes("A text, in English."), bool) for constraint in created)
    assert len({constraint.label for constraint in created}) == 23


@needs_if_eval
def test_constraints_of_if_eval_check_answers_and_require_all_arguments():
    no_comma = read_constraint({"kind": "if_eval", "id": "punctuation:no_comma"})
    assert (no_comma.passes("a b"), no_comma.passes("a, b")) == (True, False)
    words = {"kind": "if_eval", "id": "length_constraints:number_words"}
    at_least = read_constraint({**words, "arguments": {"num_words": 3, "relation": "at least"}})
    assert (at_least.passes("a b"), at_least.passes("a b c")) == (False, True)
    assert "3" in at_least.instruction
    with pytest.raises(ValueError, match="requires the arguments"):
        read_constraint({**words, "arguments": {"num_words": 3}})
    with pytest.raises(ValueError, match="no instruction"):
        read_constraint({"kind": "if_eval", "id": "punctuation"})
    with pytest.raises(ValueError, match="use the constraint 'sentence_count'"):
        read_constraint({"kind": "if_eval", "id": "length_constraints:number_sentences"})


def test_a_constraint_in_a_row_is_json():
    assert read_constraint(json.loads('{"kind": "word_count", "low": 1, "high": 2}')).low == 1
