"""Control tokens that data spells: `<|im_end|>` in a document stays text, in a template it means the token.

Tokenizers turn the spelling of a special token into the token, wherever it comes from. Text from rows must not control
the model, so a row whose data spells such a token is tokenized by a copy of the tokenizer in which special tokens are
spelled differently: with a private character on both sides, which only the template's own tokens get. All ids, flags
and rules stay the same, and text that spells no special token is not affected.
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

PRIVATE = range(0xE000, 0xF900)  # code points for private use, one of which no text at hand contains
Tokens = tuple[list[int], list[tuple[int, int]]]  # ids, and where each begins and ends in the text


def joined(spans: Spans | Sequence[tuple[int, int]]) -> Spans:
    """Spans in order, those that touch as one.

    >>> joined([(0, 2), (2, 5), (6, 7)])
    ((0, 5), (6, 7))
    """
    found: list[tuple[int, int]] = []
    for start, end in spans:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return tuple(found)


@final
class ControlTokens:
    """Tokenizes text in which only some stretches may spell control tokens.

    Args:
        tokenizer: A fast tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._copy = lru_cache(maxsize=2)(self._respelled)

    def __getstate__(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["tokenizer"])  # type: ignore[misc]

    @cached_property
    def spellings(self) -> dict[int, str]:
        """The spelling of each special token by its id. White space and single characters are ordinary text."""
        added = self.tokenizer.added_tokens_decoder.items()
        found = {id: str(token.content) for id, token in added if token.special}
        named = zip(self.tokenizer.all_special_ids, self.tokenizer.all_special_tokens, strict=True)
        found |= {id: str(spelling) for id, spelling in named}
        return {id: spelling for id, spelling in found.items() if len(spelling.strip()) > 1}

    def tokenize(self, text: str, meant: Spans = ()) -> Tokens:
        """Tokens of a text, without those that open and close a row.

        Args:
            text: The text.
            meant: Stretches that a template wrote, in which control tokens are meant.
        """
        coded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, places = coded["input_ids"], coded["offset_mapping"]
        special = [(id, start, end) for id, (start, end) in zip(ids, places, strict=True) if id in self.spellings]
        if any(self._is_data(id, text[start:end], start, meant) for id, start, end in special):
            return self._without_data(text, meant)
        return ids, places

    def spells(self, text: str) -> bool:
        """Whether a text spells a control token."""
        return self._pattern.search(text) is not None

    def _is_data(self, id: int, spelled: str, place: int, meant: Spans) -> bool:
        """Whether data spells a control token: any but the unknown token, which also stands for other characters."""
        if id == self.tokenizer.unk_token_id and spelled.strip() != self.spellings[id]:
            return False
        # some tokens take white space with them
        start, end = place + len(spelled) - len(spelled.lstrip()), place + len(spelled.rstrip())
        return not any(first <= start and end <= last for first, last in meant)

    def _without_data(self, text: str, meant: Spans) -> Tokens:
        private = next(chr(code) for code in PRIVATE if chr(code) not in text)
        parts, origins = [], []  # the respelled text, and where each of its characters comes from
        end = 0
        for first, last in self._meant_tokens(text, meant):
            parts += [text[end:first], private, text[first:last], private]
            origins += [*range(end, first), first, *range(first, last), last]
            end = last
        parts.append(text[end:])
        origins += range(end, len(text) + 1)
        encoded = self._copy(private).encode("".join(parts), add_special_tokens=False)
        return encoded.ids, [(origins[start], origins[stop]) for start, stop in encoded.offsets]

    def _meant_tokens(self, text: str, meant: Spans) -> Iterator[tuple[int, int]]:
        for first, last in meant:
            yield from (found.span() for found in self._pattern.finditer(text, first, last))

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.spellings.values(), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def _respelled(self, private: str) -> Tokenizer:
        """The tokenizer with a private character on both sides of each special token's spelling."""
        backend: Any = self.tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        rules = json.loads(backend.to_str())
        names = {spelling: f"{private}{spelling}{private}" for spelling in self.spellings.values()}
        for token in rules["added_tokens"]:
            if token["content"] in names:
                token |= {"content": names[token["content"]], "normalized": False}
        rules |= {"model": _respelled_model(rules["model"], names), "padding": None, "truncation": None}
        return Tokenizer.from_str(json.dumps(rules))


def _respelled_model(model: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
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
