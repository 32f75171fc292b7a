"""Settings of an index. Two indexes of the same corpus and settings return the same results."""

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
    """Settings for building an index.

    Args:
        size: Maximum words or tokens of a passage.
        overlap: Maximum words or tokens that a passage shares with the previous one.
        unit: Unit of size and overlap: `words`, or the name of a model whose tokens are counted.
        whole: Unit that is not split if it fits into a passage: sentences, paragraphs or nothing.
        language: Language of the stemmer for lexical search; `none` disables stemming.
        k1: Term frequency saturation of BM25.
        b: Length normalization of BM25.
        encoder: Name or folder of a sentence encoder for dense search; None builds an index for lexical search only.
        store: Vector store: `flat` compares a question with all vectors and is exact; `ivf` and `hnsw` compare it with
            some (FAISS); `qdrant` is a vector database, embedded or on a server.
        url: Address of a Qdrant server; None stores its data in the index folder, for one process at a time.

    Raises:
        ValueError: If a value is not supported.
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
            raise ValueError(f"url is the address of a Qdrant server, but store is {self.store!r}; set store to qdrant")
        if not (self.k1 >= 0 and 0 <= self.b <= 1):
            raise ValueError(f"BM25 requires k1 >= 0 and b from 0 to 1, got k1={self.k1} and b={self.b}")
        Chunking(self.size, self.overlap)

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> IndexSettings:
        """Reads settings from a manifest.

        Raises:
            ValueError: If one is missing or unknown.
        """
        known = {field.name for field in fields(cls)}
        if set(values) != known:
            raise ValueError(f"expected the settings {sorted(known)}, got {sorted(values)}")
        return cls(**values)

    def plain(self) -> dict[str, Any]:
        """Returns the settings as plain values by name."""
        return asdict(self)

    def chunking(self) -> Chunking:
        """Returns how texts are split into passages.

        Raises:
            ValueError: If the model whose tokens are counted cannot be loaded.
        """
        return Chunking(self.size, self.overlap, self.whole, self._units())

    def _units(self) -> Units:
        if self.unit == WORDS:
            return find_words
        from lightning_softprompt.retrieval.search.encoder import load_token_units

        return load_token_units(self.unit)
