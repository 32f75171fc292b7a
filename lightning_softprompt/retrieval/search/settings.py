"""What an index is made with; two indexes of the same corpus and settings find the same."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from lightning_softprompt.retrieval.passages.chunking import Chunking, Units, Whole, find_words

Store = Literal["flat", "ivf", "hnsw", "qdrant"]
STORES = ("flat", "ivf", "hnsw", "qdrant")
WHOLE = ("sentences", "paragraphs", "nothing")
WORDS = "words"


@dataclass(frozen=True)
class IndexSettings:
    """What an index is made with.

    Args:
        size: Words or tokens of a passage, at most.
        overlap: How many of them a passage shares with the one before, at most.
        unit: `words`, or the name of a model whose tokens are counted.
        whole: What is kept whole where it fits: sentences, paragraphs or nothing.
        language: Whose word stems lexical search goes by; `none` takes words as they are.
        k1: How much a word that occurs often in a passage counts (BM25).
        b: How much long passages are held back (BM25).
        encoder: Name or folder of a sentence encoder for dense search; None makes an index for lexical search alone.
        store: Where vectors are searched: `flat` compares with all, exactly; `ivf` and `hnsw` with some (FAISS);
            `qdrant` is a vector database, embedded or served.
        url: Address of a Qdrant server; None keeps its data inside the index, for one process at a time.

    Raises:
        ValueError: If a value is none of these.
    """

    size: int = 200
    overlap: int = 40
    unit: str = WORDS
    whole: Whole = "sentences"
    language: str = "english"
    k1: float = 1.5
    b: float = 0.75
    encoder: str | None = "all-minilm-l6-v2"
    store: Store = "flat"
    url: str | None = None

    def __post_init__(self) -> None:
        if self.whole not in WHOLE:
            raise ValueError(f"whole must be one of {', '.join(WHOLE)}, got {self.whole!r}")
        if self.store not in STORES:
            raise ValueError(f"store must be one of {', '.join(STORES)}, got {self.store!r}")
        if self.url is not None and self.store != "qdrant":
            raise ValueError(f"url is that of a Qdrant server, but the store is {self.store!r}; say store qdrant")
        if not (self.k1 >= 0 and 0 <= self.b <= 1):
            raise ValueError(f"BM25 wants k1 >= 0 and b from 0 to 1, got k1 {self.k1} and b {self.b}")
        Chunking(self.size, self.overlap)

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> IndexSettings:
        """Settings out of a manifest.

        Raises:
            ValueError: If one is missing or unknown.
        """
        known = {field.name for field in fields(cls)}
        if set(values) != known:
            raise ValueError(f"wanted the settings {sorted(known)}, got {sorted(values)}")
        return cls(**values)

    def plain(self) -> dict[str, Any]:
        """Names and values."""
        return asdict(self)

    def chunking(self) -> Chunking:
        """How texts are cut.

        Raises:
            ValueError: If the model whose tokens are counted cannot be loaded.
        """
        return Chunking(self.size, self.overlap, self.whole, self._units())

    def _units(self) -> Units:
        if self.unit == WORDS:
            return find_words
        from lightning_softprompt.retrieval.search.encoder import load_token_units

        return load_token_units(self.unit)
