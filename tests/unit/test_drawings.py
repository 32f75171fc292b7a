"""The drawings of the guide show every method at the place where it enters the model."""

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tiny import batch_of

from lightning_softprompt import methods
from lightning_softprompt.cli.commands.methods import SHIPPED, read_file, read_methods

sys.path.append(str(Path(__file__).parents[2] / "docs"))
import drawings

FAMILIES = ("llama",)
SVG = "{http://www.w3.org/2000/svg}"
NEW_METHOD = '''
class Gained(SoftPromptModule):
    """A new method.

    Paper: none
    Enters: {}
    Parameters: P
    """
'''


def read_new_method(tmp_path, enters):
    file = tmp_path / "gained.py"
    file.write_text(NEW_METHOD.format(enters))
    return list(read_file(file))


def texts_of(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_the_drawings_of_the_guide_are_up_to_date():
    message = "run python docs/drawings.py"
    assert drawings.METHODS_FILE.read_text() == drawings.draw_methods(read_methods([SHIPPED])), message
    assert drawings.QUESTION_FILE.read_text() == drawings.draw_question(), message


def test_the_drawing_has_every_method():
    drawn = " ".join(texts_of(drawings.METHODS_FILE.read_text())).replace(",", "").split()
    assert set(methods.__all__) <= set(drawn)


def test_a_new_method_is_drawn_at_the_place_that_its_docstring_names(tmp_path):
    drawn = texts_of(drawings.draw_methods(read_new_method(tmp_path, "keys and values of the last layer")))
    assert drawn[drawn.index("Gained") - 1] == "Keys and values of the layers"


def test_a_method_whose_docstring_names_no_place_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="Gained enters 'between the lines', which matches no place"):
        drawings.draw_methods(read_new_method(tmp_path, "between the lines"))


def test_the_place_of_a_method_is_the_field_of_its_prompt(method, backbone):
    """Compares what docstrings state with what the methods compute."""
    described = {described.name: described for described in read_methods([SHIPPED])}
    places = drawings.places_of(described[method.cls.__name__])
    if drawings.NO_PLACE[0] in places:
        pytest.skip("the places are those of the parts")
    prompt = method.on(backbone).prompt(batch_of(backbone.codec))
    fields = {"tokens": prompt.tokens, "shift": prompt.shift, "kv": prompt.kv or None, "hidden": prompt.hidden or None}
    assert {place.value for place in places} == {name for name, value in fields.items() if value is not None}


@pytest.mark.parametrize("file", [drawings.METHODS_FILE, drawings.QUESTION_FILE], ids=lambda file: file.stem)
def test_texts_are_inside_the_drawing_and_do_not_overlap_in_the_widest_font(file):
    boxes = []
    for element in ElementTree.parse(file).iter(f"{SVG}text"):
        width = len(element.text) * drawings.SIZE * drawings.CHARACTER
        x, y = float(element.get("x")), float(element.get("y"))
        left = x - {"start": 0, "middle": width / 2, "end": width}[element.get("text-anchor")]
        assert left >= 0, element.text
        assert left + width <= drawings.WIDTH, element.text
        for other, other_left, other_right, other_y in boxes:
            apart = left + width <= other_left or other_right <= left or abs(y - other_y) >= drawings.SIZE
            assert apart, (element.text, other)
        boxes.append((element.text, left, left + width, y))


@pytest.mark.parametrize("file", [drawings.METHODS_FILE, drawings.QUESTION_FILE], ids=lambda file: file.stem)
def test_a_drawing_has_an_alternative_text_and_no_color(file):
    root = ElementTree.parse(file).getroot()
    assert root.find(f"{SVG}title").text
    assert len(root.find(f"{SVG}desc").text) > 100
    colors = {element.get(name) for element in root.iter() for name in ("fill", "stroke")} - {None, "none"}
    for color in colors:
        assert color[1:3] == color[3:5] == color[5:7], f"{color} is not a shade of gray"
