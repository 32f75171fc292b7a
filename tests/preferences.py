"""Rows of preferences for tests, and batches of them."""

from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.data.preference import PreferenceDataModule

PAIRS = [
    {"prompt": "a dog is", "chosen": "good", "rejected": "very bad and dull", "gap": 2},
    {"prompt": "it is a sad story about a dog that never ends well", "chosen": "well , it ends", "rejected": "dull"},
    {"prompt": "this film was", "chosen": "funny", "rejected": "long"},
    {"prompt": "a sad film is", "chosen": "very sad indeed", "rejected": "never good"},
    {"prompt": "the story", "chosen": "ends well", "rejected": "was bad"},
]


def make_preferences(folder, **arguments):
    """Returns a data module of pairs with the tokenizer of a tiny model."""
    backbone = BackboneSpec(name=str(folder), padding_side=arguments.pop("padding_side", "right"))
    defaults = {"backbone": backbone, "train": PAIRS, "validation": PAIRS, "cache": False, "batch_size": 4}
    return PreferenceDataModule(**defaults | arguments)


def first_batch(data):
    """Returns the first rows of the training split as a batch."""
    return next(iter(data.build_loader("train", "given")))
