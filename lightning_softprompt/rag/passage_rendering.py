"""Renders rows with passages: the text of each passage, and how many passages fit into a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from string import Formatter
from typing import NamedTuple, final

from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.template import SOFT, Template
from lightning_softprompt.core.types import Encoded, ShownPassage, Spans, Text
from lightning_softprompt.rag.passage_selection import Candidate, PassageSelector, QaExample

PASSAGES = "passages"  # the template column of all passages
NAMES = ("number", "title", "heading", "text", "document")


@final
class PassageTemplate:
    r"""The text of one passage, such as `"[{number}] {heading}{text}\n"`.

    Args:
        text: The template. `{number}` counts the passages of a row from 1, `{heading}` is the title followed by a
            colon (empty without a title), `{document}` is the id of the document, `{soft}` marks soft tokens.

    Raises:
        ValueError: If the template contains another name, or lacks `{text}`.

    >>> PassageTemplate("[{number}] {heading}{text}\n").render(2, ShownPassage("d7", "It barks."), "Dogs")
    '[2] Dogs: It barks.\n'
    >>> PassageTemplate("{soft}{text}\n").expand("{passages}{question}{target}", 2)
    '{passage_1_0}{soft}{passage_1_1}{passage_2_0}{soft}{passage_2_1}{question}{target}'
    """

    def __init__(self, text: str) -> None:
        self.text, self.segments = text, [""]  # segments between slots
        try:
            parsed = list(Formatter().parse(text))
        except ValueError as error:
            raise ValueError(f"invalid passage template {text!r}: {error}; double literal braces") from None
        for literal, name, spec, conversion in parsed:
            if spec or conversion or name not in (None, SOFT, *NAMES):
                raise ValueError(f"passage template {text!r} may contain only {', '.join(NAMES)}, without format specs")
            self.segments[-1] += _escape_braces(literal) + (f"{{{name}}}" if name in NAMES else "")
            self.segments += [""] if name == SOFT else []
        if "text" not in [name for _, name, *_ in parsed]:
            raise ValueError(f"passage template {text!r} must contain {{text}}")

    def render(self, number: int, passage: ShownPassage, title: str) -> str:
        """Returns the text of a passage."""
        return "".join(self.render_segments(number, passage, title))

    def render_segments(self, number: int, passage: ShownPassage, title: str) -> list[str]:
        """Returns the text of a passage between slots."""
        values = self._values(number, passage, title)
        return [segment.format(**values) for segment in self.segments]

    def template_spans(self, passages: Sequence[tuple[ShownPassage, str]], count: int) -> dict[str, Spans]:
        """Returns the parts of `fields` that come from the template, in which control tokens are recognized."""
        spans_by_passage = [self.segment_spans(n, *passage) for n, passage in enumerate(passages, start=1)]
        if len(self.segments) > 1:
            return dict(zip(self.columns(count), chain(*spans_by_passage), strict=False))
        start = 0
        shifted: list[tuple[int, int]] = []
        for number, (passage, (spans,)) in enumerate(zip(passages, spans_by_passage, strict=True), start=1):
            shifted += [(start + begin, start + end) for begin, end in spans]
            start += len(self.render(number, *passage))
        return {PASSAGES: tuple(shifted)}

    def segment_spans(self, number: int, passage: ShownPassage, title: str) -> list[Spans]:
        """Returns the spans of each segment that are literal text of the template."""
        values = self._values(number, passage, title)
        all_spans: list[Spans] = []
        for segment in self.segments:
            spans, end = [], 0
            for literal, name, *_ in Formatter().parse(segment):
                spans.append((end, end + len(literal)))
                end += len(literal) + (0 if name is None else len(str(values[name])))
            all_spans.append(tuple(spans))
        return all_spans

    @staticmethod
    def _values(number: int, passage: ShownPassage, title: str) -> dict[str, object]:
        return {
            "number": number,
            "title": title,
            "heading": f"{title}: " if title else "",
            "text": passage.text,
            "document": passage.document,
        }

    def columns(self, count: int) -> tuple[str, ...]:
        """Returns the template columns of `count` passages: one for all, or one for each segment between slots."""
        if len(self.segments) == 1:
            return (PASSAGES,)
        return tuple(chain(*(self.columns_of(number) for number in range(1, count + 1))))

    def columns_of(self, number: int) -> tuple[str, ...]:
        """Returns the template columns that contain a passage, one for each of its segments."""
        if len(self.segments) == 1:
            return (PASSAGES,)
        return tuple(f"passage_{number}_{index}" for index in range(len(self.segments)))

    def expand(self, template: str, count: int) -> str:
        """Replaces `{passages}` in the template of rows by the columns and slots of `count` passages.

        All rows have the same slots, including rows with fewer passages.
        """
        size = len(self.segments)
        columns = [f"{{{name}}}" for name in self.columns(count)]
        passages = ["{soft}".join(columns[i : i + size]) for i in range(0, len(columns), size)]
        expanded = ""
        for literal, name, *_ in Formatter().parse(template):
            expanded += _escape_braces(literal)
            if name == PASSAGES:
                expanded += "".join(passages)
            elif name is not None:
                expanded += f"{{{name}}}"
        return expanded

    def fields(self, passages: Sequence[tuple[ShownPassage, str]], count: int) -> dict[str, str]:
        """Returns the values of the template columns for the passages of a row and their titles."""
        rendered = [self.render_segments(n, *passage) for n, passage in enumerate(passages, start=1)]
        if len(self.segments) == 1:
            return {PASSAGES: "".join(chain(*rendered))}
        return dict(zip_longest(self.columns(count), chain(*rendered), fillvalue=""))


def _escape_braces(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


class RenderedRow(NamedTuple):
    """A row with its passages.

    Args:
        example: The row as text.
        encoded: The row as tokens.
        dropped: Number of passages that did not fit.
        cut: Whether the only remaining passage was truncated.
        titles: The title of each passage of the example.
    """

    example: QaExample
    encoded: Encoded
    dropped: int
    cut: bool
    titles: tuple[str, ...] = ()


@final
@dataclass(frozen=True)
class PassageRenderer:
    """Renders rows with as many complete passages as fit; a single passage is truncated if necessary.

    Picklable, so that data workers can use it.

    Args:
        codec: Tokenizes rows.
        template: Text of a row, in which only passages are truncatable.
        passage: Text of a passage.
        selector: Puts passages in order.
        max_tokens: Maximum tokens per row, excluding soft tokens.
        append_eos: Whether the target ends with the token that stops generation.
        target_tokens: Tokens of max_tokens that are reserved for the target.
        cite: Whether targets end with the numbers of the passages of gold documents.
    """

    codec: Codec
    template: Template
    passage: PassageTemplate
    selector: PassageSelector
    max_tokens: int
    append_eos: bool
    target_tokens: int | None
    cite: bool = False

    def render(self, example: QaExample, candidates: Sequence[Candidate]) -> RenderedRow:
        """Renders a row with the first candidates, as many as fit.

        Raises:
            ValueError: If the row does not fit even without passages.
        """
        kept = list(candidates)
        while True:
            rendered = self._add_passages(example, kept)
            encoded = self._encode(rendered)
            if not encoded.num_truncated:
                break
            kept = self._remove_passages(kept, encoded.num_truncated)
        was_cut = len(kept) == 1 and kept[0].passage.text != candidates[0].passage.text
        titles = tuple(candidate.passage.title for candidate in self.selector.arrange(kept, example.gold))
        return RenderedRow(rendered, encoded, len(candidates) - len(kept), was_cut, titles)

    def _encode(self, example: QaExample) -> Encoded:
        pieces = self.template.pieces(example.fields, template_spans=example.template_spans)
        return self.codec.encode(pieces, example.target, self.max_tokens, self.append_eos, "end", self.target_tokens)

    def _add_passages(self, example: QaExample, candidates: Sequence[Candidate]) -> QaExample:
        arranged = self.selector.arrange(candidates, example.gold)
        shown = [ShownPassage(c.passage.document, c.passage.text, c.rank) for c in arranged]
        titles = [candidate.passage.title for candidate in arranged]
        passages, count = list(zip(shown, titles, strict=True)), self.selector.settings.count
        fields = {**example.fields, **self.passage.fields(passages, count)}
        has_control_tokens = self.codec.control_tokens.spells(self.passage.text)
        spans = self.passage.template_spans(passages, count) if has_control_tokens else {}
        example = self._add_citations(example, shown)
        return replace(example, fields=fields, passages=tuple(shown), template_spans=spans)

    def _add_citations(self, example: QaExample, shown: Sequence[ShownPassage]) -> QaExample:
        if not self.cite:
            return example
        numbers = [number for number, passage in enumerate(shown, start=1) if passage.document in example.gold]
        cited = "".join(f" [{number}]" for number in numbers)
        return replace(example, target=example.target.removesuffix(example.cited) + cited, cited=cited)

    def _remove_passages(self, candidates: Sequence[Candidate], surplus: int) -> list[Candidate]:
        """Removes the last passages until `surplus` tokens are removed; truncates a single passage."""
        if len(candidates) == 1:
            return self._truncate(candidates[0], surplus)
        kept = list(candidates)
        while surplus > 0 and len(kept) > 1:
            last = kept.pop().passage
            text = self.passage.render(len(kept) + 1, ShownPassage(last.document, last.text), last.title)
            surplus -= len(self.codec.ids(text))
        return kept

    def _truncate(self, candidate: Candidate, surplus: int) -> list[Candidate]:
        passage = candidate.passage
        _, offsets = self.codec.tokenize([Text(passage.text)])
        ends = [0, *(end for _, end in offsets[:-surplus])]
        text = passage.text[: ends[-1]].rstrip()
        return [replace(candidate, passage=replace(passage, text=text))] if text else []
