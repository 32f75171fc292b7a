"""Adds whole words to unigram tokenizers, such as those of T5 and XLM-R."""

from __future__ import annotations

from typing import Any

from lightning_softprompt.backbones.tokenization.added_rows import AddedRow
from lightning_softprompt.vocabulary.base import Extension, Selection, select_words
from lightning_softprompt.vocabulary.word_counts import WordCounts

UNKNOWN_PENALTY = 10.0  # the score of an unknown character is that much below the lowest score, as in SentencePiece
PREFERENCE = 1e-4  # added to the score of a path for each token that a new piece saves


class UnigramExtension(Extension):
    """Adds whole words to a unigram tokenizer, which chooses the pieces of a text with the highest sum of scores.

    The score of a new piece is the sum of the scores of the pieces that it replaces, and slightly more. A text is thus
    divided as before, except that a new piece replaces its pieces where the text has them in a row: replacing each
    new token by its base tokens gives the tokens of the base tokenizer, except that neighboring unknown characters can
    be one token or several. A score from the frequency of the word, as in training, would also change how longer words
    are divided.

    Args:
        tokenizer: The tokenizer to extend.

    Raises:
        ValueError: If ids between those of the pieces and of further tokens are unused.
    """

    model_types = ("Unigram",)

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self._pieces: list[list[Any]] = self.rules["model"]["vocab"]  # each with its score
        self._scores = [float(score) for _, score in self._pieces]
        self._lowest = min(self._scores)
        self._reserve_ids()

    def _read_vocabulary(self) -> dict[str, int]:
        return {piece: id for id, (piece, _) in enumerate(self.rules["model"]["vocab"])}

    def _reserve_ids(self) -> None:
        """Lists tokens that are not pieces, such as sentinels, as pieces, since the id of a piece is its index."""
        tokens = {id: token for token, id in self.tokenizer.get_vocab().items()}
        for id in range(len(self._pieces), self.first_id):
            if id not in tokens:
                raise ValueError(f"the tokenizer cannot be extended: it has no token with the id {id}, but higher ids")
            self._pieces.append([tokens[id], self._lowest])

    def _write_token(self, row: AddedRow) -> None:
        unknown_id = self.rules["model"]["unk_id"]
        score = (len(row.base) - 1) * PREFERENCE
        for token in self.tokenizer.backend_tokenizer.model.tokenize(row.token):
            if token.id == unknown_id:
                score += len(token.value) * (self._lowest - UNKNOWN_PENALTY)
            else:
                score += self._scores[token.id]
        self._pieces.append([row.token, score])

    def tokens_of(self, word: str) -> list[str]:
        """See `Extension.tokens_of`."""
        tokens = self.tokenizer.backend_tokenizer.model.tokenize(word)
        return [str(self._pieces[token.id][0]) for token in tokens]  # the value of an unknown token is its text

    def select(self, counts: WordCounts, general: WordCounts | None, selection: Selection) -> None:
        """See `Extension.select`."""
        if selection.unit == "pieces":
            raise ValueError("a Unigram tokenizer has no merges; set --unit words")
        for word in select_words(self, counts, general, selection.min_count, selection.min_documents):
            self.add_word(word, counts.counts[word], selection.rows - len(self.rows))

    def add_word(self, word: str, count: int, limit: int) -> str | None:
        """See `Extension.add_word`."""
        if word in self._bases:
            return "it is a new token already"
        if word in self.vocabulary:
            return "it is a token that the tokenizer does not use, since other pieces have a higher score"
        if limit < 1:
            return "it requires more new tokens than --rows allows"
        base = [self.vocabulary[token] for token in self.tokens_of(word)]
        self._add_row(word, word.replace("\u2581", " "), base, count)
        return None
