"""Rows with passages: how a passage is written, and how many of them fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from string import Formatter
from typing import NamedTuple, final

from lightning_softprompt.backbones.codec import Codec
from lightning_softprompt.data.showing import Asked, Candidate, Showing
from lightning_softprompt.template import Template
from lightning_softprompt.types import Encoded, Shown

PASSAGES = "passages"  # the place of all passages in a template
NAMES = ("number", "title", "heading", "text", "document")


@final
class PassageTemplate:
    r"""How one passage is written, such as `"[{number}] {heading}{text}\n"`.

    Args:
        text: The template. `{number}` counts the passages of a row from 1, `{heading}` is the title with a colon, or
            nothing where there is none, `{document}` the id of the document.

    Raises:
        ValueError: If it names anything else, or lacks `{text}`.

    >>> PassageTemplate("[{number}] {heading}{text}\n").written(2, Shown("d7", "It barks."), "Dogs")
    '[2] Dogs: It barks.\n'
    """

    def __init__(self, text: str) -> None:
        try:
            parsed = [(name, spec or conversion) for _, name, spec, conversion in Formatter().parse(text)]
        except ValueError as error:
            raise ValueError(f"passage {text!r} cannot be read: {error}; write a literal brace twice") from None
        names = [name for name, _ in parsed if name is not None]
        if "soft" in names:
            raise ValueError(
                f"passage {text!r} cannot hold {{soft}}, since rows show different numbers of passages and all rows "
                f"have the same slots; put it before or behind {{{PASSAGES}}} in the template"
            )
        if "text" not in names or set(names) - set(NAMES) or any(extra for _, extra in parsed):
            raise ValueError(f"passage {text!r} must name {{text}}, and may name {', '.join(NAMES)}, all plainly")
        self.text = text

    def written(self, number: int, shown: Shown, title: str) -> str:
        """A passage as a row says it."""
        heading = f"{title}: " if title else ""
        return self.text.format(number=number, title=title, heading=heading, text=shown.text, document=shown.document)


class Written(NamedTuple):
    """A row with its passages.

    Args:
        example: As text.
        encoded: In tokens.
        dropped: How many passages found no room.
        cut: Whether the one that is left was cut.
    """

    example: Asked
    encoded: Encoded
    dropped: int
    cut: bool


@final
@dataclass(frozen=True)
class RowWriter:
    """Writes as many passages as fit, the first candidates before the others, whole. One alone is cut if it must be.

    Picklable, for data workers.

    Args:
        codec: Counts tokens.
        template: How a row is written, in which nothing but passages gives way.
        passage: How one of them is written.
        showing: Puts them in order.
        max_tokens: Most tokens of a row without the soft ones.
        closed: Whether the target ends with the token that stops generation.
        target_tokens: Tokens of them that are set aside for the target.
        cite: Whether targets name the passages of gold documents behind the answer, by number.
    """

    codec: Codec
    template: Template
    passage: PassageTemplate
    showing: Showing
    max_tokens: int
    closed: bool
    target_tokens: int | None
    cite: bool = False

    def write(self, asked: Asked, candidates: Sequence[Candidate]) -> Written:
        """The row.

        Raises:
            ValueError: If it does not fit even without passages.
        """
        kept = list(candidates)
        while True:
            example = self._with(asked, kept)
            encoded = self._encoded(example)
            if not encoded.cut:
                break
            kept = self._fewer(kept, encoded.cut)
        texts = {candidate.passage.id: candidate.passage.text for candidate in candidates}
        cut = any(candidate.passage.text != texts[candidate.passage.id] for candidate in kept)
        return Written(example, encoded, len(candidates) - len(kept), cut)

    def _encoded(self, example: Asked) -> Encoded:
        pieces = self.template.pieces(example.fields)
        return self.codec.encode(pieces, example.target, self.max_tokens, self.closed, "end", self.target_tokens)

    def _with(self, asked: Asked, candidates: Sequence[Candidate]) -> Asked:
        arranged = self.showing.arranged(candidates, asked.gold)
        shown = [Shown(c.passage.document, c.passage.text, c.rank) for c in arranged]
        titles = [c.passage.title for c in arranged]
        said = [self.passage.written(n, *of) for n, of in enumerate(zip(shown, titles, strict=True), start=1)]
        fields = {**asked.fields, PASSAGES: "".join(said)}
        return replace(self._citing(asked, shown), fields=fields, passages=tuple(shown))

    def _citing(self, asked: Asked, shown: Sequence[Shown]) -> Asked:
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
            said = self.passage.written(len(left) + 1, Shown(last.document, last.text), last.title)
            surplus -= len(self.codec.ids(said))
        return left

    def _shorter(self, candidate: Candidate, surplus: int) -> list[Candidate]:
        passage = candidate.passage
        coded = self.codec.tokenizer(passage.text, add_special_tokens=False, return_offsets_mapping=True)
        ends = [0, *(end for _, end in coded["offset_mapping"][:-surplus])]
        text = passage.text[: ends[-1]].rstrip()
        return [replace(candidate, passage=replace(passage, text=text))] if text else []
