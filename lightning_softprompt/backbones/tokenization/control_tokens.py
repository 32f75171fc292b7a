"""Keeps text from rows from spelling control tokens: `<|im_end|>` is a token in a template, and text in a document.

Tokenizers convert the spelling of a special token to the token, wherever it comes from. Text from rows must not control
the model. So a row whose data spells such a token is tokenized by a copy of the tokenizer with other spellings of the
special tokens: with a private character on both sides, which only tokens from the template get. All ids, flags and
rules stay the same, and text that spells no special token is not affected.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any, final

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from lightning_softprompt.core.types import Spans

PRIVATE = range(0xE000, 0xF900)  # code points for private use; a text never contains all of them
Tokens = tuple[list[int], list[tuple[int, int]]]  # token ids, and the span of each token in the text


def merge_spans(spans: Spans | Sequence[tuple[int, int]]) -> Spans:
    """Merges adjacent spans of an ordered sequence.

    >>> merge_spans([(0, 2), (2, 5), (6, 7)])
    ((0, 5), (6, 7))
    """
    merged: list[tuple[int, int]] = []
    for start, end in spans:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return tuple(merged)


@final
class ControlTokens:
    """Tokenizes text in which only some spans may contain control tokens.

    Args:
        tokenizer: A fast tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._copy = lru_cache(maxsize=2)(self._respell_tokenizer)

    def __getstate__(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["tokenizer"])  # type: ignore[misc]

    @cached_property
    def spellings(self) -> dict[int, str]:
        """The spelling of each special token by its id. White space and single characters are ordinary text."""
        added = self.tokenizer.added_tokens_decoder.items()
        spellings = {id: str(token.content) for id, token in added if token.special}
        named = zip(self.tokenizer.all_special_ids, self.tokenizer.all_special_tokens, strict=True)
        spellings |= {id: str(spelling) for id, spelling in named}
        return {id: spelling for id, spelling in spellings.items() if len(spelling.strip()) > 1}

    def tokenize(self, text: str, allowed: Spans = ()) -> Tokens:
        """The tokens of a text, without special tokens at its start and end.

        Args:
            text: The text.
            allowed: Spans from a template, which may contain control tokens.
        """
        if not text:  # most rows have empty stretches, and each call of a tokenizer takes time
            return [], []
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, spans = encoding["input_ids"], encoding["offset_mapping"]
        special = [(id, start, end) for id, (start, end) in zip(ids, spans, strict=True) if id in self.spellings]
        if any(self._is_from_data(id, text[start:end], start, allowed) for id, start, end in special):
            return self._tokenize_respelled(text, allowed)
        return ids, spans

    def spells(self, text: str) -> bool:
        """Whether a text spells a control token."""
        return self._pattern.search(text) is not None

    def _is_from_data(self, id: int, spelled: str, position: int, allowed: Spans) -> bool:
        """Whether a special token comes from data. The unknown token may also stand for other characters."""
        if id == self.tokenizer.unk_token_id and spelled.strip() != self.spellings[id]:
            return False
        # Some tokens include the white space around them.
        start, end = position + len(spelled) - len(spelled.lstrip()), position + len(spelled.rstrip())
        return not any(first <= start and end <= last for first, last in allowed)

    def _tokenize_respelled(self, text: str, allowed: Spans) -> Tokens:
        private = next(chr(code) for code in PRIVATE if chr(code) not in text)
        parts, origins = [], []  # the respelled text, and the position in `text` of each of its characters
        end = 0
        for first, last in self._find_allowed(text, allowed):
            parts += [text[end:first], private, text[first:last], private]
            origins += [*range(end, first), first, *range(first, last), last]
            end = last
        parts.append(text[end:])
        origins += range(end, len(text) + 1)
        encoded = self._copy(private).encode("".join(parts), add_special_tokens=False)
        return encoded.ids, [(origins[start], origins[stop]) for start, stop in encoded.offsets]

    def _find_allowed(self, text: str, allowed: Spans) -> Iterator[tuple[int, int]]:
        for first, last in allowed:
            yield from (match.span() for match in self._pattern.finditer(text, first, last))

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.spellings.values(), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def _respell_tokenizer(self, private: str) -> Tokenizer:
        """The tokenizer with a private character on both sides of each special token's spelling."""
        backend: Any = self.tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        rules = json.loads(backend.to_str())
        names = {spelling: f"{private}{spelling}{private}" for spelling in self.spellings.values()}
        for token in rules["added_tokens"]:
            if token["content"] in names:
                token |= {"content": names[token["content"]], "normalized": False}
        rules |= {"model": _respell_model(rules["model"], names), "padding": None, "truncation": None}
        return Tokenizer.from_str(json.dumps(rules))


def _respell_model(model: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The model of a tokenizer, which no longer makes special tokens of characters.

    Its vocabulary maps pieces to ids, or lists pieces with their scores.
    """
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        pieces: object = {names.get(piece, piece): id for piece, id in vocabulary.items()}
    else:
        pieces = [[names.get(piece, piece), score] for piece, score in vocabulary]
    changed = {**model, "vocab": pieces}
    if isinstance(model.get("unk_token"), str):
        changed["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        changed["merges"] = [merge for merge in model["merges"] if not _makes(merge, names)]
    return changed


def _makes(merge: str | Sequence[str], names: dict[str, str]) -> bool:
    """Whether a merge of two pieces makes or takes one of the names."""
    left, _, right = merge.partition(" ") if isinstance(merge, str) else (merge[0], "", merge[1])
    return left in names or right in names or left + right in names
