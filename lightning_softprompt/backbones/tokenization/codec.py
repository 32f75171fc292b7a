"""Converts the pieces of a row to tokens, and rows to the tensors of a batch: the part that all families share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from hashlib import sha256
from itertools import count
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from lightning_softprompt.backbones.tokenization.control_tokens import ControlTokens, Tokens, merge_spans
from lightning_softprompt.backbones.tokenization.word_alignment import label_tensor, shift_words, words_starting_at
from lightning_softprompt.core.types import (
    IGNORE,
    NO_TOKEN,
    Answer,
    Batch,
    Encoded,
    Example,
    Label,
    PastAnswer,
    Piece,
    Slot,
    Text,
)

RULES = 2  # version of the tokenization rules below
TruncationSide = Literal["end", "start", "middle"]
StartToken = Literal["auto", "bos", "tokenizer", "none"]


class RowLengthError(ValueError):
    """A row that does not fit even without its truncatable text.

    Args:
        surplus: Number of tokens by which it exceeds the maximum.
        truncatable: Number of its tokens that may be truncated.
    """

    def __init__(self, surplus: int, truncatable: int) -> None:
        super().__init__(
            f"a row exceeds max_tokens by {surplus} tokens and only {truncatable} are truncatable; increase "
            f"max_tokens or add columns to `truncate`"
        )
        self.surplus = surplus


class Token(NamedTuple):
    """A token of a row: whether it may be truncated, the words that begin with it, and whether it is predicted."""

    id: int
    truncatable: bool = False
    words: tuple[int, ...] = ()
    is_target: bool = False


Run = list[Token]  # a stretch of text between slots


class Codec(ABC):
    """Converts text to tokens and back, in the format of a family.

    It is small and picklable, so that data workers can use it without the weights.

    Args:
        tokenizer: The backbone's tokenizer. It must be a fast one, which reports the position of each token in the
            text.
        padding_side: The side on which shorter rows of a batch are padded. The logits do not depend on it.

    Raises:
        ValueError: If the tokenizer is not a fast one.
    """

    answer_location: Literal["end", "inside", "decoder"] = "end"  # where a row has its answer: after or in the input
    reads_images = False  # whether rows have images, which texts are compared with

    def __init__(self, tokenizer: PreTrainedTokenizerBase, padding_side: str = "right") -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} does not report the positions of its tokens; a fast tokenizer is required"
            )
        self.tokenizer = tokenizer
        self.padding_side = padding_side
        self.control_tokens = ControlTokens(tokenizer)
        self.pad_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)

    @abstractmethod
    def assemble(self, before: Sequence[int], after: Sequence[int], answer: Sequence[int]) -> tuple[list[int], range]:
        """The input tokens of a row, and the range of the answer among them.

        Args:
            before: Tokens before the answer.
            after: Tokens after the answer.
            answer: Tokens of the answer.
        """

    @property
    def start(self) -> tuple[int, ...]:
        """Special tokens at the start of every row, as the tokenizer adds them."""
        return self._special_tokens[0]

    def with_start(self, start_token: StartToken) -> Codec:
        """A copy of the codec with another start token.

        Raises:
            ValueError: If the family always uses the start tokens of its tokenizer.
        """
        if start_token == "auto":
            return self
        raise ValueError(f"start_token={start_token} requires a causal backbone; other families use their tokenizer's")

    @property
    def remark(self) -> str | None:
        """A note on the format of rows for the log of a run, or None."""
        return None

    def opening(self, before: Sequence[Run]) -> tuple[int, ...]:
        """Special tokens at the start of a row; empty if its text already begins with them.

        Args:
            before: The runs of text before the answer.
        """
        count = len(self.start)
        first_tokens = [token.id for run in before for token in run[:count]]
        return () if tuple(first_tokens[:count]) == self.start else self.start

    @property
    def end(self) -> tuple[int, ...]:
        """Special tokens at the end of every row, as the tokenizer adds them."""
        return self._special_tokens[1]

    @cached_property
    def _special_tokens(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tokens that the tokenizer adds before and after a text."""
        row, text = self.tokenizer("a")["input_ids"], self.ids("a")
        first = next((i for i in range(len(row)) if row[i : i + len(text)] == text), 0)
        return tuple(row[:first]), tuple(row[first + len(text) :])

    @property
    def stop(self) -> tuple[int, ...]:
        """The tokens at the end of a target that stop generation."""
        return () if self.tokenizer.eos_token_id is None else (self.tokenizer.eos_token_id,)

    @property
    def placeholder(self) -> int:
        """The token id in place of soft tokens; not the padding id, from which some models count positions."""
        tokenizer = self.tokenizer
        choices = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, 0, 1)
        return next(i for i in choices if i is not None and i != self.pad_id)

    def ids(self, text: str) -> list[int]:
        """The tokens of a text from data: spellings of control tokens remain text."""
        return self.control_tokens.tokenize(text)[0]

    def template_ids(self, text: str) -> list[int]:
        """The tokens of a text from a configuration, which may contain control tokens."""
        return self.control_tokens.tokenize(text, ((0, len(text)),))[0]

    def tokenize(self, pieces: Sequence[Text]) -> Tokens:
        """The tokens of consecutive texts, and the span of each token.

        The texts are tokenized as one, since a token may span several of them.
        """
        spans: list[tuple[int, int]] = []
        start = 0
        for piece in pieces:
            spans += [(start + first, start + last) for first, last in piece.template_spans]
            start += len(piece.text)
        text = "".join(piece.text for piece in pieces)
        return self.control_tokens.tokenize(text, merge_spans(spans))

    def decode(self, ids: Tensor) -> list[str]:
        """[B, U] -> B texts, without special tokens and padding."""
        ids = ids.masked_fill(ids < 0, self.pad_id)
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def encode(
        self,
        pieces: Sequence[Piece],
        target: str,
        max_tokens: int | None = None,
        append_eos: bool = False,
        truncation_side: TruncationSide = "end",
        target_tokens: int | None = None,
    ) -> Encoded:
        """One row in tokens.

        Args:
            pieces: The pieces of the row, from its template.
            target: The target; empty if it is unknown.
            max_tokens: Maximum tokens of input and target together. Truncatable text is shortened to fit.
            append_eos: Whether the target ends with the token that stops generation.
            truncation_side: Whether the end, the start or the middle of the truncatable text is removed.
            target_tokens: Number of tokens to reserve for the target, so that truncation of the input does not depend
                on the target. Longer targets are truncated.

        Raises:
            RowLengthError: If the row does not fit even without its truncatable text.
            ValueError: If the family cannot attend to one of its soft blocks, if it cannot predict earlier answers, or
                if none of its labeled words has a token.
        """
        index = next(i for i, piece in enumerate(pieces) if isinstance(piece, Answer))
        place = cast(Answer, pieces[index])
        answer = self._answer_tokens(place, target, append_eos)[:target_tokens] if target else []
        before = self._runs(pieces[:index])
        after = self._runs(self.pieces_after_answer(pieces[index + 1 :]))
        opening = self.opening(before)
        surplus = 0
        if max_tokens is not None:
            text_tokens = sum(len(run) for run in (*before, *after))
            other_tokens = len(opening) + len(self.end) + self._reserved_tokens(answer, target_tokens)
            surplus = max(0, text_tokens + other_tokens - max_tokens)
        runs = self._truncate([*before, None, *after], surplus, truncation_side)
        words = sum(len(piece.words) for piece in pieces if isinstance(piece, Text))
        row = self._join_runs(opening, runs, answer, words)._replace(num_truncated=surplus)
        if words:
            self.check_words(row)
        return row

    def _answer_tokens(self, place: Answer, target: str, append_eos: bool) -> list[int]:
        return [*self.ids(place.glue + target), *(self.closing_ids(place.closing) if append_eos else ())]

    def closing_ids(self, closing: str) -> Sequence[int]:
        """The tokens that end an answer: those of a text, or the token that stops generation if it is empty."""
        return self.template_ids(closing) if closing else self.stop

    def _reserved_tokens(self, answer: list[int], target_tokens: int | None) -> int:
        """The number of tokens that a row sets aside for its answer."""
        in_input = len(self.assemble((), (), answer)[0])
        reserved = max(len(answer), in_input)
        return reserved if target_tokens is None else reserved + target_tokens - len(answer)

    def check_words(self, row: Encoded) -> None:
        """Refuses a row whose labeled words cannot be scored.

        Raises:
            ValueError: If none of them has a token, or if they cannot attend to a soft block.
        """
        if max(row.words) == NO_TOKEN:
            raise ValueError(
                f"none of the {len(row.words)} words of a row has a token after {row.num_truncated} tokens were "
                "truncated; increase max_tokens"
            )

    def pieces_after_answer(self, pieces: Sequence[Piece]) -> Sequence[Piece]:
        """The pieces after the answer to which the answer can attend: all, if attention is bidirectional."""
        return pieces

    def _runs(self, pieces: Sequence[Piece]) -> list[Run]:
        """The tokens of each stretch of text between slots."""
        runs: list[list[Text | PastAnswer]] = [[]]
        for piece in pieces:
            if isinstance(piece, Slot):
                runs.append([])
            else:
                runs[-1].append(piece)  # type: ignore[arg-type]
        return [self._run_tokens(run) for run in runs]

    def _run_tokens(self, run: Sequence[Text | PastAnswer]) -> Run:
        """The tokens of a stretch of text. Earlier answers divide it, and each part is tokenized separately."""
        tokens: Run = []
        texts: list[Text] = []
        for piece in run:
            if isinstance(piece, PastAnswer):
                tokens += [*self._tokens(texts), *self._past_answer_tokens(piece)]
                texts = []
            else:
                texts.append(piece)
        return tokens + self._tokens(texts)

    def _past_answer_tokens(self, answer: PastAnswer) -> Run:
        """The tokens of an earlier answer, including those that end it.

        Raises:
            ValueError: If they have a loss, and the family is not a decoder.
        """
        if answer.has_loss and self.answer_location != "end":
            raise ValueError("only decoders predict several answers of a row; this backbone predicts the last one")
        ids = self.ids(answer.text)
        if answer.closing or self.answer_location == "end":  # EOS would end the input of an encoder
            ids = [*ids, *self.closing_ids(answer.closing)]
        return [Token(id, is_target=answer.has_loss) for id in ids]

    def _tokens(self, run: Sequence[Text]) -> Run:
        """A token is truncatable only if it lies within truncatable text."""
        ids, token_spans = self.tokenize(run)
        truncatable: list[tuple[int, int]] = []
        words: list[tuple[int, int]] = []
        start = 0
        for piece in run:
            if piece.truncatable:
                truncatable.append((start, start + len(piece.text)))
            words += [(start + first, start + last) for first, last in piece.words]
            start += len(piece.text)
        may_truncate = [any(a <= first and last <= b for a, b in truncatable) for first, last in token_spans]
        first_words = words_starting_at(token_spans, words)
        return [Token(*token) for token in zip(ids, may_truncate, first_words, strict=True)]

    def _truncate(self, runs: Sequence[Run | None], surplus: int, side: TruncationSide) -> list[Run | None]:
        truncatable = sum(token.truncatable for run in runs if run is not None for token in run)
        if surplus > truncatable:
            raise RowLengthError(surplus, truncatable)
        first = {"end": truncatable - surplus, "start": 0, "middle": (truncatable - surplus + 1) // 2}[side]
        removed = range(first, first + surplus)
        index = count()  # of the next truncatable token
        return [
            None if run is None else [token for token in run if not (token.truncatable and next(index) in removed)]
            for run in runs
        ]

    def _join_runs(self, opening: Sequence[int], runs: Sequence[Run | None], answer: list[int], words: int) -> Encoded:
        """Joins runs of text, with a slot between consecutive runs on the same side of the answer.

        Args:
            opening: Special tokens at the start.
            runs: The runs; None is the position of the answer.
            answer: Tokens of the answer.
            words: Number of labeled words.
        """
        sides: list[list[int]] = [[*opening], []]
        slots: list[tuple[int, int]] = []  # side of the answer, number of tokens of that side before the slot
        first_tokens: dict[int, tuple[int, int]] = {}  # the same for the first token of each word
        past_answers: list[int] = []  # positions of the predicted tokens of earlier answers, which precede the answer
        side, is_first = 0, True
        for run in runs:
            if run is None:
                side, is_first = 1, True
                continue
            if not is_first:
                slots.append((side, len(sides[side])))
            for position, token in enumerate(run, len(sides[side])):
                first_tokens |= dict.fromkeys(token.words, (side, position))
                past_answers += [position] if token.is_target else []
            sides[side] += [token.id for token in run]
            is_first = False
        sides[1] += self.end
        word_positions = [first_tokens.get(word, (0, NO_TOKEN)) for word in range(words)]
        row = self._assemble_row(sides[0], sides[1], answer, slots, word_positions)
        past_targets = [row.ids[position] for position in past_answers]
        return row._replace(answers=(*past_answers, *row.answers), targets=(*past_targets, *row.targets))

    def _assemble_row(
        self,
        before: list[int],
        after: list[int],
        answer: Sequence[int],
        slots: Sequence[tuple[int, int]],
        words: Sequence[tuple[int, int]],
    ) -> Encoded:
        """Assembles a row; positions of slots and words are a side of the answer and an index within that side."""
        ids, answers = self.assemble(before, after, answer)
        offset = len(before) + len(answers)  # of the tokens after the answer
        slot_positions = tuple(index + side * offset for side, index in slots)
        word_positions = tuple(index + side * offset for side, index in words)
        targets = tuple(answer) or (IGNORE,) * len(answers)
        return Encoded(tuple(ids), tuple(answers), targets, slot_positions, word_positions)

    def with_answer(self, row: Encoded, answer: Sequence[int]) -> Encoded:
        """The same row with another answer. Earlier answers of a dialogue become a part of its text.

        Raises:
            ValueError: If other tokens are between the tokens of its answer, as in corrupted text.
        """
        first = last = len(row.ids)
        if row.answers:
            first, last = self.answer_span(row)
        slots = [(0, slot) if slot <= first else (1, slot - last) for slot in row.slots]
        words = [(0, word) if word < first else (1, word - last) for word in row.words]
        changed = self._assemble_row(list(row.ids[:first]), list(row.ids[last:]), answer, slots, words)
        is_before = row.second_start <= first
        second_start = row.second_start if is_before else row.second_start + len(changed.ids) - len(row.ids)
        return changed._replace(second_start=second_start)

    def answer_span(self, row: Encoded) -> tuple[int, int]:
        """Start and end of the answer among the input tokens of a row that has one.

        Raises:
            ValueError: If other tokens are between its tokens.
        """
        first, end = row.answers[0], row.answers[-1] + 1
        if end - first > len(row.answers):
            raise ValueError("a row whose targets are scattered over its text cannot have another answer")
        return first, end

    def candidates(self, batch: Batch, answers: Sequence[Sequence[int]]) -> Batch:
        """Every row with every answer: B rows and C answers give B * C rows, grouped by row."""
        return self.with_answers(batch, [answers] * len(batch))

    def with_answers(self, batch: Batch, answers: Sequence[Sequence[Sequence[int]]]) -> Batch:
        """Every row with each of its own answers, grouped by row.

        Args:
            batch: The rows.
            answers: Token ids of the answers of each row.
        """
        rows = []
        for row, answers_of_row in zip(batch.require_encoded(), answers, strict=True):
            rows += [self.with_answer(row, answer) for answer in answers_of_row]
        counts = torch.tensor([len(answers_of_row) for answers_of_row in answers], device=batch.input_ids.device)
        task_ids = None if batch.task_ids is None else batch.task_ids.repeat_interleave(counts)
        return self.collate(rows, task_ids=task_ids).to(batch.input_ids.device)

    def without_answers(self, batch: Batch) -> Batch:
        """The rows without their answers, as the input of generation."""
        rows = [self.with_answer(row, ()) for row in batch.require_encoded()]
        return self.collate(rows, task_ids=batch.task_ids).to(batch.input_ids.device)

    def collate(
        self,
        rows: Sequence[Encoded],
        labels: Sequence[Label | None] | None = None,
        task_ids: Tensor | None = None,
        row_ids: Sequence[int] | None = None,
        examples: Sequence[Example] | None = None,
    ) -> Batch:
        """Pads rows to one batch. The number of slots is the smallest one of any row.

        Args:
            rows: The rows.
            labels: Their classes.
            task_ids: [B] the number of each row's task.
            row_ids: Index of each row in its split.
            examples: The rows as text.
        """
        ids = [torch.tensor(row.ids, dtype=torch.long) for row in rows]
        mask = self._pad([torch.ones_like(row, dtype=torch.bool) for row in ids], False)
        offset = torch.zeros(len(rows), dtype=torch.long)  # columns of padding before each row
        if self.padding_side == "left":
            offset = mask.shape[1] - mask.sum(1)
        answers = torch.zeros_like(mask)
        for b, row in enumerate(rows):
            answers[b, [position + int(offset[b]) for position in row.answers]] = True
        targets = [torch.tensor(row.targets, dtype=torch.long) for row in rows]
        words = shift_words(rows, offset)
        num_slots = min(len(row.slots) for row in rows)
        slots = torch.tensor([row.slots[:num_slots] for row in rows], dtype=torch.long)
        return Batch(
            input_ids=self._pad(ids, self.pad_id),
            mask=mask,
            source=mask & ~answers,
            targets=pad_sequence(targets, batch_first=True, padding_value=IGNORE),
            slots=slots + offset[:, None],
            labels=None if labels is None else label_tensor(labels, words),
            task_ids=task_ids,
            encoded=tuple(rows),
            examples=None if examples is None else tuple(examples),
            words=words,
            row_ids=() if row_ids is None else tuple(row_ids),
        )

    def _pad(self, rows: list[Tensor], value: float) -> Tensor:
        return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=self.padding_side)

    @property
    def fingerprint(self) -> str:
        """A hash of everything that determines how text becomes tokens, used as a key of cached data sets."""
        rules = self.tokenizer.backend_tokenizer.to_str()  # type: ignore[attr-defined]
        parts = (type(self).__name__, RULES, self.start, self.end, self.stop, rules)
        return sha256("|".join(map(str, parts)).encode()).hexdigest()[:16]
