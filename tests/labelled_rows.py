"""Rows of texts and labels for tests of classification."""

LABELS = {"negative": "bad", "positive": ["good", "great"]}
WORDS = ["warm", "funny", "dull", "sad", "long"]


def make_rows(labels):
    """Returns a row with a text of one to five words for each label."""
    rows = []
    for i, label in enumerate(labels):
        num_words = 1 + i % len(WORDS)
        rows.append({"text": " ".join(WORDS[:num_words]), "label": label})
    return rows


def labels_of(data, split="train"):
    """Returns the class of each example of a split."""
    return [example.label for example in data.split(split).examples]
