"""Draws the pictures of the guide: where each method enters the model, and how a question becomes an answer.

    python docs/drawings.py

The methods are placed by the line `Enters:` of their docstrings. A line that names none of `PLACES` is an error.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from lightning_softprompt.cli.commands.methods import SHIPPED, Method, read_methods

GUIDE = Path(__file__).resolve().parent / "guide"
METHODS_FILE = GUIDE / "methods" / "places.svg"
QUESTION_FILE = GUIDE / "tasks" / "question.svg"

WIDTH = 760  # of a drawing, about the width of the text of a page in pixels
SIZE = 13  # of the font
LINE = 17  # height of a line of text
CHARACTER = 0.6  # width of a character relative to the size of the font, in the widest font of FONTS
FONTS = "Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"
PAPER, INK, PALE, MIDDLE = "#ffffff", "#1a1a1a", "#ededed", "#8a8a8a"  # pages may be dark, so the paper is drawn, too
CELL = (20, 22)  # width and height of a token


@dataclass(frozen=True)
class Place:
    """A place where a method changes the computation of the backbone.

    Args:
        title: Name of the place.
        pattern: Regular expression that the line `Enters:` of its methods contains.
        value: The field of `SoftPrompt` with the values; None if the method changes weights.
    """

    title: str
    pattern: str
    value: str | None = None


PLACES = (  # in the order of their numbers in the drawing
    Place(
        "Soft tokens, the same for every row",
        r"^(?!.*(input-dependent|per task)).*(soft tokens|word embeddings)",
        "tokens",
    ),
    Place("Soft tokens from the row", r"soft tokens.*input-dependent", "tokens"),
    Place("Soft tokens of the task of the row", r"soft tokens.*per task", "tokens"),
    Place("Shift of the embeddings of the text", r"embeddings of the input", "shift"),
    Place("Keys and values of the layers", r"keys and values", "kv"),
    Place("Low-rank changes of linear layers", r"linear layers"),
    Place("Soft tokens between layers, before layer k", r"hidden states before layer k", "hidden"),
    Place("All weights of the backbone", r"all weights"),
    Place("Embeddings and head rows of new tokens", r"rows of the embedding table"),
)
NO_PLACE = (  # listed below the places
    Place("Same as the methods that they contain", r"same as"),
    Place("No change, for comparison", r"nowhere"),
    Place("Soft tokens of images, after the patches", r"image tower, after the patches", "image"),
)
OPTIONS = (  # of every method, at the end of the list
    ("Readout", "label words, ranked candidates or a trained head"),
    ("Objective and penalties", "cross-entropy or distillation; norms of soft tokens and other penalties"),
)


def places_of(method: Method) -> list[Place]:
    """Returns the places where a method enters.

    Raises:
        ValueError: If its line `Enters:` names no place.
    """
    enters = method.labels["Enters"]
    places = [place for place in (*PLACES, *NO_PLACE) if re.search(place.pattern, enters)]
    if not places:
        titles = "; ".join(place.pattern for place in (*PLACES, *NO_PLACE))
        raise ValueError(f"{method.name} enters {enters!r}, which matches no place of docs/drawings.py ({titles})")
    return places


class Canvas:
    """An SVG drawing on white paper, with text as text.

    Args:
        height: Its height; the width is WIDTH.
        title: Title for screen readers.
        description: What the drawing shows, for screen readers.
    """

    def __init__(self, height: float, title: str, description: str) -> None:
        self.height = height
        self._root = ElementTree.Element(
            "svg",
            {
                "xmlns": "http://www.w3.org/2000/svg",
                "viewBox": f"0 0 {WIDTH} {height:g}",
                "width": f"{WIDTH}",
                "height": f"{height:g}",
                "role": "img",
                "aria-labelledby": "title description",
                "font-family": FONTS,
                "font-size": f"{SIZE}",
            },
        )
        self._add("title", id="title").text = title
        self._add("desc", id="description").text = description
        self.box(0.5, 0.5, WIDTH - 1, height - 1, fill=PAPER, stroke="#cccccc")

    def _add(self, tag: str, **attributes: str | float) -> ElementTree.Element:
        named = {name.replace("_", "-"): value for name, value in attributes.items()}
        texts = {name: value if isinstance(value, str) else f"{value:g}" for name, value in named.items()}
        return ElementTree.SubElement(self._root, tag, texts)

    def box(
        self, x: float, y: float, width: float, height: float, fill: str = PAPER, stroke: str = INK, dash: str = "none"
    ) -> None:
        """Draws a rectangle with round corners."""
        self._add("rect", x=x, y=y, width=width, height=height, rx=4, fill=fill, stroke=stroke, stroke_dasharray=dash)

    def text(self, x: float, y: float, text: str, anchor: str = "start", bold: bool = False, color: str = INK) -> None:
        """Writes a line of text whose baseline is at y."""
        weight = "bold" if bold else "normal"
        self._add("text", x=x, y=y, text_anchor=anchor, font_weight=weight, fill=color).text = text

    def lines(self, x: float, y: float, text: str, width: float, anchor: str = "start") -> float:
        """Writes text in lines of a width, the first one at y; returns the y of the line after the last one."""
        for line in wrap(text, width):
            self.text(x, y, line, anchor)
            y += LINE
        return y

    def label(self, x: float, y: float, width: float, height: float, title: str, text: str = "") -> None:
        """Draws a box with a bold title and text, centered.

        Raises:
            ValueError: If the text does not fit.
        """
        lines = wrap(text, width - 8) if text else []
        if (1 + len(lines)) * LINE > height or len(title) * SIZE * CHARACTER > width:
            raise ValueError(f"the text of {title!r} does not fit into its box")
        self.box(x, y, width, height)
        top = y + (height - (1 + len(lines)) * LINE) / 2 + SIZE
        self.text(x + width / 2, top, title, "middle", bold=True)
        for number, line in enumerate(lines, 1):
            self.text(x + width / 2, top + number * LINE, line, "middle")

    def arrow(self, *points: tuple[float, float], dash: str = "none") -> None:
        """Draws a line through points with a head at the last one."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self._add("polyline", points=path, fill="none", stroke=INK, stroke_width=1.3, stroke_dasharray=dash)
        start, end = complex(*points[-2]), complex(*points[-1])
        along = (end - start) / abs(end - start)
        base = end - 8 * along
        side = 4j * along  # at a right angle to the line
        corners = [f"{corner.real:g},{corner.imag:g}" for corner in (end, base + side, base - side)]
        self._add("polygon", points=" ".join(corners), fill=INK)

    def number(self, x: float, y: float, number: int) -> None:
        """Draws a number in a circle with center x, y."""
        self._add("circle", cx=x, cy=y, r=10, fill=PAPER, stroke=INK, stroke_width=1.5)
        self.text(x, y + 4.5, str(number), "middle", bold=True)

    def cells(self, x: float, y: float, kinds: str) -> float:
        """Draws a row of tokens: `s` a trained one, `t` one of the text, a space a gap; returns the x of its end."""
        width, height = CELL
        for kind in kinds:
            if kind != " ":
                self._add(
                    "rect", x=x, y=y, width=width, height=height, fill=INK if kind == "s" else PAPER, stroke=MIDDLE
                )
            x += width if kind != " " else width / 2
        return x

    def svg(self) -> str:
        """Returns the file."""
        ElementTree.indent(self._root)
        return ElementTree.tostring(self._root, encoding="unicode") + "\n"


def wrap(text: str, width: float) -> list[str]:
    """Divides text into lines that fit into a width in any of the fonts."""
    return textwrap.wrap(text, int(width / (SIZE * CHARACTER)), break_long_words=False, break_on_hyphens=False)


def names_at(place: Place, methods: Iterable[Method]) -> str:
    """Returns the names of the methods that enter at a place, in the order of the alphabet."""
    names = []
    for method in methods:
        if place in places_of(method):
            is_trained = "learning rate" in method.defaults or place in NO_PLACE
            names.append(method.name if is_trained else f"{method.name} (not\u00a0trained)")
    return ", ".join(names)


def draw_methods(methods: Sequence[Method]) -> str:
    """Draws the model with a number at each place, and the methods of each number next to it."""
    groups = [(place.title, names_at(place, methods)) for place in (*PLACES, *NO_PLACE)]
    description = ". ".join(f"{title}: {names}" for title, names in groups)
    canvas = Canvas(770, "Where each method enters the model", f"{description}.")
    _draw_model(canvas)
    x, y, width = 388, 34, WIDTH - 388 - 12
    for number, (title, names) in enumerate(groups, 1):
        if number <= len(PLACES):
            canvas.number(x, y - 4.5, number)
        if len(title) * SIZE * CHARACTER > width - 10:
            raise ValueError(f"the title {title!r} is too long")
        canvas.text(x + 20, y, title, bold=True)
        y = canvas.lines(x + 20, y + LINE, names, width - 20) + 11
    canvas.text(x + 20, y, "Options of every method", bold=True)
    for option, text in OPTIONS:
        y = canvas.lines(x + 20, y + LINE, f"{option}: {text}", width - 20) - LINE
    if y > canvas.height:
        raise ValueError(f"the list of methods ends at {y}, below the drawing; increase its height")
    return canvas.svg()


def _draw_model(canvas: Canvas) -> None:
    """Draws the input, the frozen layers, the readout and the loss, from top to bottom."""
    left, width = 20, 320
    middle, right = left + width / 2, left + width

    canvas.label(left, 16, 92, 26, "task")
    canvas.label(right - 204, 16, 204, 26, "text of the row")
    canvas.arrow((left + 28, 42), (left + 28, 98))
    canvas.number(left + 28, 68, 3)
    canvas.arrow((right - 190, 42), (right - 190, 68), (left + 60, 68), (left + 60, 98))
    canvas.number(left + 98, 68, 2)
    canvas.arrow((left + 194, 42), (left + 194, 98))
    canvas.text(left + 202, 74, "template")
    canvas.cells(left + 14, 100, "sss ttttt s ttt")
    canvas.number(left + 44, 136, 1)
    canvas.number(left + 204, 136, 1)
    canvas.text(left + 71, 142, "+", bold=True)
    canvas.cells(left + 84, 126, "sssss")
    canvas.number(left + 134, 161, 4)
    canvas.number(left + 300, 111, 9)

    canvas.arrow((left + 254, 122), (left + 254, 186))
    canvas.box(left, 188, width, 342, fill=PALE)
    canvas.text(left + 14, 208, "backbone (frozen except 8 and 9)", bold=True)
    canvas.number(right - 20, 206, 8)
    _draw_layer(canvas, left + 14, 222, width - 28)
    canvas.text(middle, 368, "\u22ee", "middle", bold=True)
    canvas.cells(left + 114, 380, "ss tttttt")
    canvas.number(left + 100, 391, 7)
    canvas.text(left + 24, 388, "hidden")
    canvas.text(left + 24, 403, "states")
    canvas.arrow((middle + 34, 402), (middle + 34, 424))
    canvas.label(left + 14, 426, width - 28, 30, "layer k")
    canvas.text(middle, 477, "\u22ee", "middle", bold=True)
    canvas.label(left + 14, 490, width - 28, 30, "last layer")

    canvas.arrow((middle, 530), (middle, 554))
    canvas.label(left, 556, width, 30, "readout")
    canvas.arrow((middle, 586), (middle, 610))
    canvas.label(left, 612, width, 30, "objective and penalties")
    canvas.cells(left, 722, "t")
    canvas.text(left + 28, 738, "not trained")
    canvas.cells(left + 120, 722, "s")
    canvas.text(left + 148, 738, "trained, or computed by a trained network")


def _draw_layer(canvas: Canvas, x: float, y: float, width: float) -> None:
    """Draws the attention and the linear layers of the first layer."""
    canvas.box(x, y, width, 128)
    canvas.text(x + 10, y + 18, "layer 1", bold=True)
    canvas.text(x + 10, y + 44, "attention")
    canvas.cells(x + 100, y + 28, "ss tttttt")
    canvas.number(x + 86, y + 39, 5)
    canvas.text(x + 100, y + 68, "keys and values")
    canvas.text(x + 10, y + 100, "linear")
    canvas.text(x + 10, y + 115, "layers")
    canvas.number(x + 86, y + 103, 6)
    canvas.box(x + 100, y + 88, 66, 30)
    canvas.text(x + 133, y + 108, "W", "middle")
    canvas.text(x + 182, y + 108, "+", "middle", bold=True)
    for position, name in enumerate("BA"):
        canvas.box(x + 198 + 34 * position, y + 88, 30, 30, fill=INK)
        canvas.text(x + 213 + 34 * position, y + 108, name, "middle", color=PAPER)


def draw_question() -> str:
    """Draws how a question becomes an answer and its metrics."""
    description = (
        "Documents are split into passages and indexed. The retriever searches the index for a question by words, by "
        "vectors or by both, and a re-ranker may order the result. Retrieval metrics use all retrieved passages. Some "
        "passages are selected, and the template joins them with the question. The method adds soft tokens. The "
        "frozen backbone computes the answer, and metrics compare it with the correct answers. In training, the "
        "gradients of the loss of the answer change the method only, not the backbone."
    )
    canvas = Canvas(612, "From a question to an answer and its metrics", description)
    a, b, c, width, half, high = 16, 270, 524, 220, 110, 50
    both = b + width - a

    canvas.label(a, 16, width, high, "documents", "data.corpus")
    canvas.arrow((a + width, 41), (b - 1, 41))
    canvas.label(b, 16, width, high, "index of passages", "softprompt index build")
    canvas.arrow((b + half, 66), (b + half, 109))

    canvas.label(a, 110, width, high, "question", "data.path")
    canvas.arrow((a + width, 135), (b - 1, 135))
    canvas.label(b, 110, width, high, "retriever", "lexical, dense or hybrid")
    canvas.arrow((b + width, 135), (c - 1, 135))
    canvas.label(c, 110, width, high, "re-ranker", "optional")
    canvas.arrow((c + half, 110), (c + half, 67))
    canvas.label(c, 16, width, high, "retrieval metrics", "recall@k, hit@k, MRR")

    canvas.arrow((c + half, 160), (c + half, 203))
    canvas.label(c, 204, width, high, "selected passages", "data.passages")
    canvas.arrow((c, 229), (b + width + 1, 229))
    canvas.arrow((a + half, 160), (a + half, 203))
    canvas.label(a, 204, both, high, "template", "{passages}{soft}Question: {question} Answer: {target}")

    canvas.arrow((a + half, 254), (a + half, 287))
    canvas.cells(a, 288, "ttttt ttttt sss tttt tttt")
    canvas.text(a + 105, 327, "passages", "middle")
    canvas.text(a + 330, 327, "question", "middle")
    canvas.text(a + 420, 327, "answer", "middle")
    canvas.label(c, 288, width, high, "method", "computes the soft prompt")
    canvas.arrow((c, 334), (a + 250, 334), (a + 250, 312))
    canvas.arrow((a + half, 334), (a + half, 379))
    canvas.label(a, 380, both, 34, "frozen backbone")

    canvas.arrow((a + half, 414), (a + half, 457))
    canvas.label(a, 458, both, high, "answer", "generated, or one of data.answer_form.choices")
    canvas.arrow((b + width, 397), (c + 50, 397), (c + 50, 457))
    canvas.label(c, 458, width, high, "loss", "in training, of the answer")
    canvas.arrow((c + 150, 458), (c + 150, 340), dash="5 4")
    canvas.text(c + 140, 387, "gradients", "end")

    canvas.arrow((a + half, 508), (a + half, 545))
    canvas.label(a, 546, both, high, "answer metrics", "exact match, F1, precision, recall, ROUGE-L")
    canvas.arrow((b + width, 571), (c - 1, 571))
    canvas.label(c, 546, width, high, "analysis of answers", "softprompt analyze, explain")
    return canvas.svg()


def main() -> None:
    """Writes the drawings."""
    for path, drawing in ((METHODS_FILE, draw_methods(read_methods([SHIPPED]))), (QUESTION_FILE, draw_question())):
        path.parent.mkdir(exist_ok=True)
        path.write_text(drawing, encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
