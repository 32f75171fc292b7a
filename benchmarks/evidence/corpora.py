"""Corpora for continued pre-training: medical text, general text, and cloze questions about rare medical terms.

medical  Answers of MedQuAD and abstracts of PubMedQA.
general  Articles of WikiText-2.
cloze    Windows of the medical test text around a rare term, in groups: the text itself first, then the text with other
         rare terms of similar length and the same ending in place of the term. The answer of a model is the likeliest.
         A term is rare if it occurs 5 to 50 times in the medical training text, never in the general text, and has
         several tokens.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from pretraining_tables import CANDIDATES
from question_sets import read_rows, write_rows

from lightning_softprompt.backbones.loading import load_tokenizer
from lightning_softprompt.core.backbone_spec import BackboneSpec

SEED = 0
DOCUMENT_BYTES = 320  # of a document of validation and test: one window
TRAIN_DOCUMENTS = 400
VALIDATION_DOCUMENTS = 24
TEST_DOCUMENTS = 50
QUESTIONS = 30
LEFT, RIGHT = 120, 30  # characters around a term
TERM = re.compile(r"\b[a-z]{7,}\b")
RARE = range(5, 51)  # occurrences in the medical training text


def write_corpora(data: Path, folder: Path) -> None:
    """Writes the corpora to a folder, as JSON lines with a column `text`, unless they exist.

    Args:
        data: Folder of all data sets.
        folder: Folder of the corpora, with a folder for each.
    """
    medical = {split: read_medical(data, split) for split in ("train", "validation", "test")}
    general = {
        "train": read_articles(data, ["train"]),
        "validation": read_articles(data, ["train"])[:VALIDATION_DOCUMENTS],
        "test": read_articles(data, ["validation", "test"]),
    }
    sizes = {"train": TRAIN_DOCUMENTS, "validation": VALIDATION_DOCUMENTS, "test": TEST_DOCUMENTS}
    for name, corpus in (("medical", medical), ("general", general)):
        for split, size in sizes.items():
            documents = corpus[split][:size]
            texts = documents if split == "train" else [shorten(text) for text in documents]
            write_texts(folder / name / f"{split}.jsonl", texts)
    write_texts(folder / "medical_all.jsonl", medical["train"])
    write_texts(folder / "general_all.jsonl", general["train"])
    questions = cloze_questions(medical["train"], medical["test"], general["train"])
    for split in sizes:
        write_texts(folder / "cloze" / f"{split}.jsonl", questions)


def read_medical(data: Path, split: str) -> list[str]:
    """Reads the medical documents of a split in random order, one of each source in turn."""
    answers = [row["answers"][0] for row in read_rows(data / "qa/medquad" / f"{split}.jsonl")]
    abstracts = [row["context"] for row in read_rows(data / "qa/pubmedqa" / f"{split}.jsonl")]
    generator = random.Random(SEED)
    generator.shuffle(answers)
    generator.shuffle(abstracts)
    return [text for pair in zip(answers, abstracts, strict=False) for text in pair]


def read_articles(data: Path, splits: Iterable[str]) -> list[str]:
    """Reads the articles of splits; an article is the text of its paragraphs."""
    articles: dict[str, list[str]] = {}
    for split in splits:
        for row in read_rows(data / "lm/wikitext2" / f"{split}.jsonl"):
            articles.setdefault(row["doc"], []).append(row["text"])
    return ["\n".join(paragraphs) for paragraphs in articles.values()]


def shorten(text: str) -> str:
    """Returns the beginning of a document, up to a white space.

    >>> shorten("a short text")
    'a short text'
    """
    if len(text.encode()) <= DOCUMENT_BYTES:
        return text
    return text.encode()[:DOCUMENT_BYTES].decode(errors="ignore").rpartition(" ")[0]


def cloze_questions(train: Sequence[str], test: Sequence[str], general: Sequence[str]) -> list[str]:
    """Returns the texts of all questions, `CANDIDATES` for each, of which the first is the right one."""
    counts = Counter(word for text in train for word in TERM.findall(text))
    known = {word for text in general for word in TERM.findall(text)}
    tokenizer = load_tokenizer(BackboneSpec())
    terms = []
    for word, count in sorted(counts.items()):
        is_rare = count in RARE and word not in known
        if is_rare and len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) > 1:
            terms.append(word)
    rare, generator = set(terms), random.Random(SEED)
    used: set[str] = set()
    texts: list[str] = []
    for document in test:
        for match in TERM.finditer(document, LEFT):
            term = match[0]
            if term not in rare or term in used or len(document) < match.end() + RIGHT:
                continue
            used.add(term)
            similar = [word for word in terms if are_similar(word, term)]
            if len(similar) < CANDIDATES - 1:
                continue
            left = document[match.start() - LEFT : match.start()].partition(" ")[2]
            right = document[match.end() : match.end() + RIGHT].rpartition(" ")[0]
            texts += [f"{left}{word}{right}" for word in [term, *generator.sample(similar, CANDIDATES - 1)]]
            break  # one question per document
        if len(texts) == QUESTIONS * CANDIDATES:
            break
    return texts


def are_similar(word: str, term: str) -> bool:
    """Whether two different words have the same ending and almost the same length."""
    return word != term and abs(len(word) - len(term)) <= 1 and word[-2:] == term[-2:]


def write_texts(path: Path, texts: Sequence[str]) -> None:
    """Writes documents as JSON lines, unless the file exists."""
    write_rows(path, [{"text": text} for text in texts])
