"""Small corpora for tests of indexes, and what a search in them returns."""

from lightning_softprompt.retrieval.passages.documents import Document
from lightning_softprompt.retrieval.retriever import Retriever
from lightning_softprompt.retrieval.search.settings import IndexSettings

TEXTS = {
    "film": "a warm and funny film",
    "dog": "the dog is sad . it never ends",
    "story": "a story about a dog and a film",
    "great": "great , very great indeed",
}
LONG = " ".join(f"dull story number {number} . great story number {number} ." for number in range(40))
CHANGES = {  # changes of the corpus, by what they change
    "added": {**TEXTS, "new": "what a wonderful thing . never dull"},
    "changed": {**TEXTS, "dog": "the dog is good . it never ends"},
    "removed": {name: text for name, text in TEXTS.items() if name != "dog"},
    "all": {"new": LONG, "great": "great film", "film": TEXTS["film"], "story": TEXTS["story"]},
}
LEXICAL = IndexSettings(encoder=None)


def make_documents(texts=TEXTS):
    """Returns a document for each text, with a title and the line of its source."""
    documents = []
    for line, (name, text) in enumerate(texts.items(), start=1):
        documents.append(Document(name, name.title(), text, f"corpus.jsonl:{line}"))
    return documents


def search_documents(folder, question, mode="lexical", k=5):
    """Returns the documents that an index retrieves for a question, the best first."""
    (hits,) = Retriever(str(folder), mode).search([question], k)
    return [hit.passage.document for hit in hits]
