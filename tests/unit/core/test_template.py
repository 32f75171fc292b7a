import pytest

from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import Answer, Slot, Text


def test_pieces_are_in_reading_order():
    template = Template("{soft}Say: {text}{soft} it was {target} .", truncate=["text"])
    assert template.columns == ("text",)
    assert template.pieces({"text": "Fun!", "other": "?"}) == (
        Slot(),
        Text("Say: "),
        Text("Fun!", truncatable=True),
        Slot(),
        Text(" it was"),
        Answer(" "),
        Text(" ."),
    )


def test_the_text_of_a_column_is_not_read_as_a_template():
    _, first, second, _ = Template("{a}{b} {target}").pieces({"a": "{soft}{b}", "b": "{target}{{"})
    assert first == Text("{soft}{b}")
    assert second == Text("{target}{{")


def test_without_a_slot_soft_tokens_are_at_the_start():
    assert Template("{text}{target}").pieces({"text": "x"}) == (Slot(), Text("x"), Answer(""))


def test_doubled_braces_are_literal_braces():
    pieces = Template("{{{text}}} {target}").pieces({"text": "x"})
    assert pieces == (Slot(), Text("{"), Text("x"), Text("}"), Answer(" "))


@pytest.mark.parametrize(
    ("text", "glue", "before"),
    [
        ("{text} it was {target}", " ", " it was"),
        ("{text} it was   {target}", "   ", " it was"),
        ("{text}\n{target}", "", "\n"),
        ("{text}\n {target}", " ", "\n"),
        ("{text} {target}", " ", None),
        ("{text}{target}", "", None),
        ("{text} it was {soft}{target}", "", " it was "),
        ("{text} it was{soft} {target}", " ", " it was"),
    ],
)
def test_spaces_directly_before_the_target_belong_to_the_answer(text, glue, before):
    template = Template(text)
    pieces = template.pieces({"text": "x"})
    assert template.glue == glue
    assert pieces[-1] == Answer(glue)
    literals = [p.text for p in pieces if isinstance(p, Text) and p.text != "x"]
    assert literals == ([] if before is None else [before])


@pytest.mark.parametrize("text", ["{soft} {text}", "", "{target} or {target}", "{{target}}"])
def test_a_template_names_the_target_exactly_once(text):
    with pytest.raises(ValueError, match=r"must contain \{target\} once"):
        Template(text)


@pytest.mark.parametrize("field", ["{text:>8}", "{text!r}", "{}", "{ }", "{a }", "{ a}", "{a[0]}", '{"a"}', "{a\\nb}"])
def test_a_field_must_be_the_name_of_a_column(field):
    with pytest.raises(ValueError, match=r"must be the name of a column.*rename_columns"):
        Template(f"{field} {{target}}")


@pytest.mark.parametrize(
    "name", ["Review Text", "review-text", "0", "a.b", "größe", "Text (long)", "Is it good?", "n°1"]
)
def test_columns_can_have_spaces_hyphens_and_numbers(name):
    template = Template(f"{{{name}}} it was {{target}}")
    assert template.columns == (name,)
    assert template.pieces({name: "x"})[1] == Text("x")


@pytest.mark.parametrize("text", ["{text {target}", "{text}} {target}", "{"])
def test_a_single_brace_is_an_error_with_advice(text):
    with pytest.raises(ValueError, match=r"cannot be read.*write a literal brace twice"):
        Template(text)


def test_only_columns_can_be_truncated():
    with pytest.raises(ValueError, match=r"truncate names \['other', 'soft'\], but .* has the columns \['text'\]"):
        Template("{soft}{text}{target}", truncate=["soft", "other"])


def test_a_missing_column_is_an_error():
    with pytest.raises(KeyError, match="text"):
        Template("{text}{target}").pieces({"other": "x"})


def test_a_column_can_occur_twice():
    template = Template("{text} , {text} {target}")
    assert template.columns == ("text",)
    assert sum(p == Text("x") for p in template.pieces({"text": "x"})) == 2
