"""The readout of a task with classes if none is set."""

import logging

from tiny import CLASSES

from lightning_softprompt.core.types import Classes
from lightning_softprompt.readouts.default import default_readout
from lightning_softprompt.readouts.label_words import LabelWords
from lightning_softprompt.readouts.ranked import RankedChoices


def test_single_tokens_are_read_as_label_words(load, caplog):
    caplog.set_level(logging.INFO, "lightning_softprompt")
    assert isinstance(default_readout(load("llama").codec, CLASSES), LabelWords)
    assert not caplog.records


def test_longer_words_are_ranked_and_logged(load, caplog):
    caplog.set_level(logging.INFO, "lightning_softprompt")
    classes = Classes({"bad": [" bad"], "best": [" very good"]})
    assert isinstance(default_readout(load("llama").codec, classes), RankedChoices)
    assert "Label word ' very good' has several tokens: RankedChoices" in caplog.text
