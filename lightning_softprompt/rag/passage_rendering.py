"""Rows with passages: how a passage is written, and how many of them fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, zip_longest
from string import Formatter
from typing import NamedTuple, final

from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.template import SOFT, Template
from lightning_softprompt.core.types import Encoded, ShownPassage, Spans, Text
from lightning_softprompt.rag.passage_selection import Candidate, PassageSelector, QaExample

PASSAGES = "passages"  # the place of all passages in a template
NAMES = ("number", "title", "heading", "text", "document")


@final
class PassageTemplate:
    r"""How one passage is written, such as `"[{number}] {heading}{text}\n"`.

    Args:
        text: The template. `{number}` counts the passages of a row from 1, `{heading}` is the title with a colon, or
            nothing where there is none, `{document}` the id of the document, `{soft}` a slot.

    Raises:
        ValueError: If it names anything else, or lacks `{text}`.

    >>> PassageTemplate("[{number}] {heading}{text}\n").written(2, ShownPassage("d7", "It barks."), "Dogs")
    '[2] Dogs: It barks.\n'
    >>> PassageTemplate("{soft}{text}\n").opened("{passages}{question}{target}", 2)
    '{passage_1_0}{soft}{passage_1_1}{passage_2_0}{soft}{passage_2_1}{question}{target}'
    """

    def __init__(self, text: str) -> None:
        self.text, self.stretches = text, [""]  # between slots
        try:
            parsed = list(Formatter().parse(text))
        except ValueError as error:
            raise ValueError(f"passage {text!r} cannot be read: {error}; write a literal brace twice") from None
        for literal, name, spec, conversion in parsed:
            if spec or conversion or name not in (None, SOFT, *NAMES):
                raise ValueError(f"passage {text!r} must name {{text}}, and may name {', '.join(NAMES)}, all plainly")
            self.stretches[-1] += _literal(literal) + (f"{{{name}}}" if name in NAMES else "")
            self.stretches += [""] if name == SOFT else []
        if "text" not in [name for _, name, *_ in parsed]:
            raise ValueError(f"passage {text!r} must name {{text}}")

    def written(self, number: int, shown: ShownPassage, title: str) -> str:
        """A passage as a row says it."""
        return "".join(self._written(number, shown, title))

    def _written(self, number: int, shown: ShownPassage, title: str) -> list[str]:
        said = self._values(number, shown, title)
        return [stretch.format(**said) for stretch in self.stretches]

    def template_spans(self, passages: Sequence[tuple[ShownPassage, str]], count: int) -> dict[str, Spans]:
        """Where the template itself wrote the columns of `fields`, in which control tokens are meant."""
        each = [self._spans(n, *passage) for n, passage in enumerate(passages, start=1)]
        if len(self.stretches) > 1:
            return dict(zip(self.columns(count), chain(*each), strict=False))
        lengths = [len(self.written(n, *passage)) for n, passage in enumerate(passages, start=1)]
        starts = accumulate(lengths, initial=0)
        moved = ((start + a, start + b) for start, (spans,) in zip(starts, each, strict=False) for a, b in spans)
        return {PASSAGES: tuple(moved)}

    def _spans(self, number: int, shown: ShownPassage, title: str) -> list[Spans]:
        """The spans of each stretch: what of it is not the value of a name."""
        said = self._values(number, shown, title)
        found: list[Spans] = []
        for stretch in self.stretches:
            spans, end = [], 0
            for literal, name, *_ in Formatter().parse(stretch):
                spans.append((end, end + len(literal)))
                end += len(literal) + (0 if name is None else len(str(said[name])))
            found.append(tuple(spans))
        return found

    @staticmethod
    def _values(number: int, shown: ShownPassage, title: str) -> dict[str, object]:
        heading = f"{title}: " if title else ""
        return {"number": number, "title": title, "heading": heading, "text": shown.text, "document": shown.document}

    def columns(self, count: int) -> tuple[str, ...]:
        """The columns that hold so many passages: one for all, or one for each stretch between slots."""
        if len(self.stretches) == 1:
            return (PASSAGES,)
        return tuple(f"passage_{n}_{i}" for n in range(1, count + 1) for i in range(len(self.stretches)))

    def opened(self, template: str, count: int) -> str:
        """A row's template with the slots of so many passages, which all rows have: those with fewer too."""
        stretches = len(self.stretches)
        places = [f"{{{name}}}" for name in self.columns(count)]
        each = ["{soft}".join(places[i : i + stretches]) for i in range(0, len(places), stretches)]
        parsed = Formatter().parse(template)
        return "".join(
            _literal(literal) + ("" if name is None else "".join(each) if name == PASSAGES else f"{{{name}}}")
            for literal, name, *_ in parsed
        )

    def fields(self, passages: Sequence[tuple[ShownPassage, str]], count: int) -> dict[str, str]:
        """What the columns hold, by the passages of a row with their titles."""
        said = [self._written(n, *passage) for n, passage in enumerate(passages, start=1)]
        if len(self.stretches) == 1:
            return {PASSAGES: "".join(chain(*said))}
        return dict(zip_longest(self.columns(count), chain(*said), fillvalue=""))


def _literal(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


class RenderedRow(NamedTuple):
    """A row with its passages.

    Args:
        example: As text.
        encoded: In tokens.
        dropped: How many passages found no room.
        cut: Whether the one that is left was cut.
    """

    example: QaExample
    encoded: Encoded
    dropped: int
    cut: bool


@final
@dataclass(frozen=True)
class PassageRenderer:
    """Writes as many passages as fit, the first candidates before the others, whole. One alone is cut if it must be.

    Picklable, for data workers.

    Args:
        codec: Counts tokens.
        template: How a row is written, in which nothing but passages gives way.
        passage: How one of them is written.
        showing: Puts them in order.
        max_tokens: Most tokens of a row without the soft ones.
        append_eos: Whether the target ends with the token that stops generation.
        target_tokens: Tokens of them that are set aside for the target.
        cite: Whether targets name the passages of gold documents behind the answer, by number.
    """

    codec: Codec
    template: Template
    passage: PassageTemplate
    showing: PassageSelector
    max_tokens: int
    append_eos: bool
    target_tokens: int | None
    cite: bool = False

    def write(self, asked: QaExample, candidates: Sequence[Candidate]) -> RenderedRow:
        """The row.

        Raises:
            ValueError: If it does not fit even without passages.
        """
        kept = list(candidates)
        while True:
            example = self._with(asked, kept)
            encoded = self._encoded(example)
            if not encoded.num_truncated:
                break
            kept = self._fewer(kept, encoded.num_truncated)
        cut = len(kept) == 1 and kept[0].passage.text != candidates[0].passage.text
        return RenderedRow(example, encoded, len(candidates) - len(kept), cut)

    def _encoded(self, example: QaExample) -> Encoded:
        pieces = self.template.pieces(example.fields, template_spans=example.template_spans)
        return self.codec.encode(pieces, example.target, self.max_tokens, self.append_eos, "end", self.target_tokens)

    def _with(self, asked: QaExample, candidates: Sequence[Candidate]) -> QaExample:
        arranged = self.showing.arranged(candidates, asked.gold)
        shown = [ShownPassage(c.passage.document, c.passage.text, c.rank) for c in arranged]
        titles = [c.passage.title for c in arranged]
        passages, count = list(zip(shown, titles, strict=True)), self.showing.count
        fields = {**asked.fields, **self.passage.fields(passages, count)}
        means_control = self.codec.control_tokens.spells(self.passage.text)
        spans = self.passage.template_spans(passages, count) if means_control else {}
        return replace(self._citing(asked, shown), fields=fields, passages=tuple(shown), template_spans=spans)

    def _citing(self, asked: QaExample, shown: Sequence[ShownPassage]) -> QaExample:
        if not self.cite:
            return asked
        gold = [number for number, passage in enumerate(shown, start=1) if passage.document in asked.gold]
        cited = "".join(f" [{number}]" for number in gold)
        return replace(asked, target=asked.target.removesuffix(asked.cited) + cited, cited=cited)

    def _fewer(self, kept: Sequence[Candidate], surplus: int) -> list[Candidate]:
        """Without the last ones, until that many tokens are gone; a single one is made shorter."""
        if len(kept) == 1:
            return self._shorter(kept[0], surplus)
        left = list(kept)
        while surplus > 0 and len(left) > 1:
            last = left.pop().passage
            said = self.passage.written(len(left) + 1, ShownPassage(last.document, last.text), last.title)
            surplus -= len(self.codec.ids(said))
        return left

    def _shorter(self, candidate: Candidate, surplus: int) -> list[Candidate]:
        passage = candidate.passage
        _, places = self.codec.tokenize([Text(passage.text)])
        ends = [0, *(end for _, end in places[:-surplus])]
        text = passage.text[: ends[-1]].rstrip()
        return [replace(candidate, passage=replace(passage, text=text))] if text else []
