"""A small corpus, questions about it, and readers of the examples that a data module creates from them."""

from lightning_softprompt.retrieval.search.settings import IndexSettings

TEXTS = {
    "dog": "the dog is sad . it never ends",
    "story": "a dog film",
    "film": "a warm and funny film",
    "well": "all is well that ends well",
    "text": "one text",
    "long": "a long long long text",
}
LEXICAL = IndexSettings(encoder=None)
ROW = {"question": "is the dog sad", "answers": ["sad", "very sad", "sad"], "positive_ids": ["dog"]}  # finds dog, story
FILM = {"question": "what film ?", "answers": ["warm", "funny"], "positive_ids": ["film"]}  # finds film, story


def documents_of(example):
    """Returns the document of each passage of an example."""
    return [passage.document for passage in example.passages]


def first_example(module, split="test"):
    """Returns the first example of a split."""
    return module.split(split).examples[0]


def examples_by_epoch(module, num_epochs=3):
    """Returns the training examples of each epoch, in the order of their row ids."""
    loader, epochs = module.train_dataloader(), []
    for epoch in range(num_epochs):
        loader.batch_sampler.set_epoch(epoch)
        examples = {}
        for batch in loader:
            examples |= dict(zip(batch.row_ids, batch.examples, strict=True))
        epochs.append([examples[row] for row in sorted(examples)])
    return epochs
