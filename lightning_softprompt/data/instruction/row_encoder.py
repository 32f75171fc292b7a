"""`ChatRowEncoder`: tokenizes the dialogues of a split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from lightning_softprompt.backbones.tokenization.dialogue import DialogueEncoder
from lightning_softprompt.core.chat_format import ChatExample, ChatFormat
from lightning_softprompt.core.types import Encoded, Example
from lightning_softprompt.data.splits.row_encoder import RowEncoder
from lightning_softprompt.data.token_cache import content_key


@dataclass(frozen=True)
class ChatRowEncoder(RowEncoder):
    """Converts dialogues from text to tokens.

    Args:
        chat: The format of the dialogues.
        learns_all: Whether all answers of a dialogue are predicted, not only the last one.
    """

    chat: ChatFormat
    learns_all: bool

    def encode(self, example: Example) -> Encoded:
        """Encodes a row.

        Raises:
            ValueError: If its last turn does not fit into max_tokens.
        """
        encoder = DialogueEncoder(
            self.codec, self.chat, self.max_tokens, self.truncation_side, self.max_target_tokens, self.learns_all
        )
        return encoder.encode(cast(ChatExample, example).turns, example.target)

    def _cache_key(self, examples: Sequence[Example]) -> str:
        """Hashes everything that determines the tokens of the rows."""
        rows = [(cast(ChatExample, example).turns, example.target) for example in examples]
        settings = [self.truncation_side, self.max_tokens, self.max_target_tokens, self.learns_all]
        return content_key([self.codec.fingerprint, self.chat, settings, rows])
