"""The readout of a task with classes if none is set."""

from __future__ import annotations

import logging

from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.types import Classes
from lightning_softprompt.readouts.base import Readout
from lightning_softprompt.readouts.class_texts import ClassTexts
from lightning_softprompt.readouts.label_words import LabelWords
from lightning_softprompt.readouts.ranked import RankedChoices
from lightning_softprompt.readouts.ranked_options import RankedOptions

log = logging.getLogger(__name__)


def default_readout(codec: Codec, classes: Classes) -> Readout:
    """Creates `LabelWords`, or `RankedChoices` if a label word has several tokens, and logs the latter.

    Classes without names mean that the rows have options: `RankedOptions` scores them. A backbone that compares images
    with texts has `ClassTexts`.
    """
    if codec.reads_images:
        return ClassTexts(codec, classes)
    if not classes.words:
        return RankedOptions(codec, classes)
    words = [word for words_of_class in classes.words.values() for word in words_of_class]
    long = next((word for word in words if len(codec.ids(word)) > 1), None)
    if long is None:
        return LabelWords(codec, classes)
    log.info(
        "Label word %r has several tokens: RankedChoices scores the whole text of each class, at the cost of one row "
        "per class. A single-token word for each class in data.labels is faster", long,
    )  # fmt: skip
    return RankedChoices(codec, classes)
