"""From the pieces of a row to the tensors of a batch: what all families share of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from hashlib import sha256
from itertools import accumulate, count
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from lightning_softprompt.backbones.tokenization.control_tokens import ControlTokens, Tokens, joined
from lightning_softprompt.backbones.tokenization.word_alignment import numbered, placed_words, words_begun
from lightning_softprompt.core.types import IGNORE, NO_TOKEN, Answer, Batch, Encoded, Example, Label, Piece, Slot, Text

RULES = 2  # of how text becomes tokens; a change of them is another number
Cut = Literal["end", "start", "middle"]
StartToken = Literal["auto", "bos", "tokenizer", "none"]


class Token(NamedTuple):
    """A token of a row that is being written: whether it may be cut, and the words of which it is the first."""

    id: int
    truncatable: bool
    words: tuple[int, ...]


Run = list[Token]  # a stretch of text between slots


class Codec(ABC):
    """A family's reading and writing of text. Small and picklable: data workers get it, weights do not come with it.

    Args:
        tokenizer: The backbone's own; it must be a fast one, which can say where in the text each token stands.
        padding_side: Where shorter rows of a batch are padded. The logits do not depend on it.

    Raises:
        ValueError: If the tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, padding_side: str = "right") -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} cannot say where its tokens stand; a fast tokenizer is wanted"
            )
        self.tokenizer = tokenizer
        self.padding_side = padding_side
        self.control_tokens = ControlTokens(tokenizer)
        self.pad_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)

    @abstractmethod
    def assemble(self, before: Sequence[int], after: Sequence[int], answer: Sequence[int]) -> tuple[list[int], range]:
        """The input tokens of a row, and which of them are the answer's, from what stands around the answer."""

    @property
    def start(self) -> tuple[int, ...]:
        """Special tokens that open every row: those that the tokenizer itself puts there."""
        return self._around[0]

    def with_start(self, start_token: StartToken) -> Codec:
        """The codec with another choice of the token that opens rows.

        Raises:
            ValueError: If the family leaves that to its tokenizer.
        """
        if start_token == "auto":
            return self
        raise ValueError(f"start_token={start_token} is for causal backbones; others begin rows as the tokenizer does")

    @property
    def remark(self) -> str | None:
        """What a run announces of how rows are written."""
        return None

    def opening(self, before: Sequence[Run]) -> tuple[int, ...]:
        """Special tokens that open a row, unless its template begins with them already.

        Args:
            before: The stretches of text before the answer.
        """
        text = [token.id for run in before for token in run[: len(self.start)]]
        return () if tuple(text[: len(self.start)]) == self.start else self.start

    @property
    def end(self) -> tuple[int, ...]:
        """Special tokens that close every row: those that the tokenizer itself puts there."""
        return self._around[1]

    @cached_property
    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        whole, inner = self.tokenizer("a")["input_ids"], self.ids("a")
        first = next((i for i in range(len(whole)) if whole[i : i + len(inner)] == inner), 0)
        return tuple(whole[:first]), tuple(whole[first + len(inner) :])

    @property
    def stop(self) -> tuple[int, ...]:
        """What closes a target, so that generation ends."""
        return () if self.tokenizer.eos_token_id is None else (self.tokenizer.eos_token_id,)

    @property
    def placeholder(self) -> int:
        """The id in place of a soft token. It is not the padding's, from which some models count their positions."""
        tokenizer = self.tokenizer
        choices = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, 0, 1)
        return next(i for i in choices if i is not None and i != self.pad_id)

    def ids(self, text: str) -> list[int]:
        """The tokens of a text from data: control tokens that it spells stay text."""
        return self.control_tokens.tokenize(text)[0]

    def template_ids(self, text: str) -> list[int]:
        """The tokens of a text from a configuration, which may spell control tokens."""
        return self.control_tokens.tokenize(text, ((0, len(text)),))[0]

    def tokenize(self, pieces: Sequence[Text]) -> Tokens:
        """Tokens of texts that follow each other, and where each begins and ends.

        They are tokenized as one text, since words join across pieces.
        """
        starts = accumulate((len(piece.text) for piece in pieces), initial=0)
        placed = zip(pieces, starts, strict=False)
        spans = [(start + a, start + b) for piece, start in placed for a, b in piece.template_spans]
        return self.control_tokens.tokenize("".join(piece.text for piece in pieces), joined(spans))

    def decode(self, ids: Tensor) -> list[str]:
        """[B, U] -> B texts, without special tokens and padding."""
        clean = ids.masked_fill(ids < 0, self.pad_id)
        return [text.strip() for text in self.tokenizer.batch_decode(clean, skip_special_tokens=True)]

    def encode(
        self,
        pieces: Sequence[Piece],
        target: str,
        max_tokens: int | None = None,
        append_eos: bool = False,
        cut: Cut = "end",
        target_tokens: int | None = None,
    ) -> Encoded:
        """One row in tokens.

        Args:
            pieces: The row as its template writes it.
            target: What is to be said; empty where it is not known.
            max_tokens: Most tokens that input and target together may take; text that gives way is cut to fit.
            append_eos: Whether the target ends with the token that stops generation.
            cut: Where text that gives way is cut: at the row's end, its start, or amid what may be cut.
            target_tokens: Tokens that the target is given, however many it has, so that what is read does not depend on
                what is to be said; longer targets are cut.

        Raises:
            ValueError: If the row does not fit even with all of the text that gives way cut, a soft block stands
                where the family could not hear it, or none of the words that have classes has a token.
        """
        place = next(i for i, piece in enumerate(pieces) if isinstance(piece, Answer))
        glue = pieces[place].glue  # type: ignore[union-attr]
        answer = [*(self.ids(glue + target) if target else ()), *(self.stop if append_eos and target else ())]
        answer = answer[:target_tokens]
        before, after = self._runs(pieces[:place]), self._runs(self.heard_after(pieces[place + 1 :]))
        opening = self.opening(before)
        taken = max(len(answer), len(self.assemble((), (), answer)[0])) + len(opening) + len(self.end)
        taken += 0 if target_tokens is None else target_tokens - len(answer)
        room = None if max_tokens is None else max_tokens - taken
        runs = [*before, None, *after]
        surplus = 0 if room is None else max(0, sum(len(run) for run in runs if run is not None) - room)
        words = sum(len(piece.words) for piece in pieces if isinstance(piece, Text))
        row = replace(self._encoded(opening, self._cut(runs, surplus, cut), answer, words), cut=surplus)
        if words:
            self.check_words(row)
        return row

    def check_words(self, row: Encoded) -> None:
        """Refuses a row whose words cannot be scored.

        Raises:
            ValueError: If none of them has a token, or the family would not let them hear a soft block.
        """
        if max(row.words) == NO_TOKEN:
            raise ValueError(
                f"none of its {len(row.words)} words has a token left, {row.cut} tokens were cut; raise max_tokens"
            )

    def heard_after(self, pieces: Sequence[Piece]) -> Sequence[Piece]:
        """What of the pieces behind the answer has a say in it: all, where a family reads both ways."""
        return pieces

    def _runs(self, pieces: Sequence[Piece]) -> list[Run]:
        """One for each stretch of text between slots."""
        runs: list[list[Text]] = [[]]
        for piece in pieces:
            if isinstance(piece, Slot):
                runs.append([])
            else:
                runs[-1].append(piece)  # type: ignore[arg-type]
        return [self._tokens(run) for run in runs]

    def _tokens(self, run: Sequence[Text]) -> Run:
        """A token is cut only if wholly inside a text that gives way."""
        ids, places = self.tokenize(run)
        starts = list(accumulate((len(p.text) for p in run), initial=0))
        spans = [(start, start + len(p.text)) for p, start in zip(run, starts, strict=False) if p.truncatable]
        words = [(start + a, start + b) for p, start in zip(run, starts, strict=False) for a, b in p.words]
        inside = [any(a <= start and end <= b for a, b in spans) for start, end in places]
        begun = words_begun(places, words)
        return [Token(*token) for token in zip(ids, inside, begun, strict=True)]

    def _cut(self, runs: Sequence[Run | None], surplus: int, where: Cut) -> list[Run | None]:
        loose = sum(token.truncatable for run in runs if run is not None for token in run)
        if surplus > loose:
            raise ValueError(
                f"a row must lose {surplus} tokens to fit, but only {loose} of it may be cut; raise max_tokens, or "
                f"name a longer column in truncate"
            )
        first = {"end": loose - surplus, "start": 0, "middle": (loose - surplus + 1) // 2}[where]
        number = count()  # of the next loose token
        gone = range(first, first + surplus)
        return [
            None if run is None else [token for token in run if not (token.truncatable and next(number) in gone)]
            for run in runs
        ]

    def _encoded(self, opening: Sequence[int], runs: Sequence[Run | None], answer: list[int], words: int) -> Encoded:
        """Joins the stretches: a slot stands at each seam but the answer's."""
        sides: list[list[int]] = [[*opening], []]
        slots: list[tuple[int, int]] = []  # side of the answer, tokens of that side before the slot
        begun: dict[int, tuple[int, int]] = {}  # the same of words
        side, seam = 0, False
        for run in runs:
            if run is None:
                side, seam = 1, False
                continue
            if seam:
                slots.append((side, len(sides[side])))
            begun |= {w: (side, at) for at, token in enumerate(run, len(sides[side])) for w in token.words}
            sides[side] += [token.id for token in run]
            seam = True
        sides[1] += self.end
        return self._joined(sides[0], sides[1], answer, slots, [begun.get(w, (0, NO_TOKEN)) for w in range(words)])

    def _joined(
        self,
        before: list[int],
        after: list[int],
        answer: Sequence[int],
        slots: Sequence[tuple[int, int]],
        words: Sequence[tuple[int, int]],
    ) -> Encoded:
        ids, answers = self.assemble(before, after, answer)
        jump = len(before) + len(answers)
        soft, begun = (tuple(at + side * jump for side, at in places) for places in (slots, words))
        targets = tuple(answer) or (IGNORE,) * len(answers)
        return Encoded(tuple(ids), tuple(answers), targets, soft, begun)

    def answered(self, row: Encoded, answer: Sequence[int]) -> Encoded:
        """The same row with another answer."""
        first, last = (row.answers[0], row.answers[-1] + 1) if row.answers else (len(row.ids), len(row.ids))
        slots = [(0, s) if s <= first else (1, s - last) for s in row.slots]
        words = [(0, w) if w < first else (1, w - last) for w in row.words]
        return self._joined(list(row.ids[:first]), list(row.ids[last:]), answer, slots, words)

    def candidates(self, batch: Batch, answers: Sequence[Sequence[int]]) -> Batch:
        """Every row with every answer: B rows and C answers make B * C rows, those of one row side by side."""
        rows = [self.answered(row, answer) for row in self.unpack(batch) for answer in answers]
        tasks = None if batch.task_ids is None else batch.task_ids.repeat_interleave(len(answers))
        return self.collate(rows, task_ids=tasks).to(batch.input_ids.device)

    def questions(self, batch: Batch) -> Batch:
        """The rows without their answers: where generation starts."""
        rows = [self.answered(row, ()) for row in self.unpack(batch)]
        return self.collate(rows, task_ids=batch.task_ids).to(batch.input_ids.device)

    def unpack(self, batch: Batch) -> list[Encoded]:
        """The rows that a batch was collated from, but for targets without loss."""
        return [self._unpacked(batch, b) for b in range(len(batch))]

    @staticmethod
    def _unpacked(batch: Batch, b: int) -> Encoded:
        real = batch.mask[b]
        ids = batch.input_ids[b][real].tolist()
        answers = (~batch.source[b][real]).nonzero()[:, 0].tolist()
        targets = batch.targets[b][batch.targets[b] != IGNORE].tolist()
        before = real.cumsum(0).roll(1)  # real tokens before each position
        before[0] = 0
        total = len(ids)
        slots = [int(before[s]) if s < len(real) else total for s in batch.slots[b].tolist()]
        words = [] if batch.words is None else [w for w in batch.words[b].tolist() if w != IGNORE]
        words = [w if w == NO_TOKEN else int(before[w]) for w in words]
        return Encoded(tuple(ids), tuple(answers), tuple(targets), tuple(slots), tuple(words))

    def collate(
        self,
        rows: Sequence[Encoded],
        labels: Sequence[Label | None] | None = None,
        task_ids: Tensor | None = None,
        row_ids: Sequence[int] | None = None,
        examples: Sequence[Example] | None = None,
    ) -> Batch:
        """Pads rows to one batch. Of slots they keep as many as each row has."""
        ids = [torch.tensor(row.ids, dtype=torch.long) for row in rows]
        mask = self._padded([torch.ones_like(i, dtype=torch.bool) for i in ids], False)
        offset = (
            (mask.shape[1] - mask.sum(1)) if self.padding_side == "left" else torch.zeros(len(rows), dtype=torch.long)
        )
        answers = torch.zeros_like(mask)
        for b, row in enumerate(rows):
            answers[b, [a + int(offset[b]) for a in row.answers]] = True
        targets = [torch.tensor(row.targets, dtype=torch.long) for row in rows]
        words = placed_words(rows, offset)
        fewest = min(len(row.slots) for row in rows)
        return Batch(
            input_ids=self._padded(ids, self.pad_id),
            mask=mask,
            source=mask & ~answers,
            targets=pad_sequence(targets, batch_first=True, padding_value=IGNORE),
            slots=torch.tensor([row.slots[:fewest] for row in rows], dtype=torch.long) + offset[:, None],
            labels=None if labels is None else numbered(labels, words),
            task_ids=task_ids,
            rows=None if row_ids is None else torch.tensor(row_ids, dtype=torch.long),
            examples=None if examples is None else tuple(examples),
            words=words,
        )

    def _padded(self, rows: list[Tensor], value: float) -> Tensor:
        return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=self.padding_side)

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides how text becomes tokens; cached data sets are keyed by it."""
        rules = self.tokenizer.backend_tokenizer.to_str()  # type: ignore[attr-defined]
        parts = (type(self).__name__, RULES, self.start, self.end, self.stop, rules)
        return sha256("|".join(map(str, parts)).encode()).hexdigest()[:16]
