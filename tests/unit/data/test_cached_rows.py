"""When the tokens of rows are read from the cache."""

import pytest
from labelled_rows import LABELS, make_rows

from lightning_softprompt.backbones.tokenization.codec import Codec
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.types import Encoded
from lightning_softprompt.data import token_cache
from lightning_softprompt.data.classification import ClassificationDataModule
from lightning_softprompt.system.cache_dirs import cache_folder


@pytest.fixture
def forbid_tokenization(monkeypatch):
    """Returns a function after whose call each tokenization raises an error."""

    def fail(*_, **__):
        raise AssertionError("tokenized again")

    return lambda: monkeypatch.setattr(Codec, "encode", fail)


def test_rows_are_tokenized_once(make_data, forbid_tokenization):
    rows = make_rows([0, 1, 1])
    first = make_data(test=rows, cache=True, max_tokens=6).split("test")
    forbid_tokenization()
    again = make_data(test=rows, cache=True, max_tokens=6).split("test")
    assert again.encoded == first.encoded
    assert again.examples == first.examples


@pytest.mark.parametrize(
    "change",
    [
        {"template": "{text} it is {target}"},
        {"template": "{text}{soft} it was {target}"},
        {"max_tokens": 7},
        {"truncate": []},
        {"labels": {"negative": "dull", "positive": "good"}},
        {"test": make_rows([1, 1, 1])},
        {"cache": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_change_that_affects_tokens_misses_the_cache(make_data, forbid_tokenization, change):
    arguments = {"test": make_rows([0, 1, 1]), "cache": True, "max_tokens": 10}
    make_data(**arguments).split("test")
    forbid_tokenization()
    with pytest.raises(AssertionError, match="tokenized again"):
        make_data(**{**arguments, **change}).split("test")


def test_another_tokenizer_misses_the_cache(make_data, forbid_tokenization, tiny_folder):
    arguments = {"test": make_rows([0, 1]), "cache": True}
    make_data(**arguments).split("test")
    gpt2 = BackboneSpec(name=str(tiny_folder("gpt2")))
    other = ClassificationDataModule(template="{text} it was {target}", labels=LABELS, backbone=gpt2, **arguments)
    forbid_tokenization()
    with pytest.raises(AssertionError, match="tokenized again"):
        other.split("test")


def test_a_damaged_cache_is_replaced(make_data, forbid_tokenization):
    rows = make_rows([0, 1, 1])
    first = make_data(test=rows, cache=True).split("test")
    (file,) = cache_folder("tokens").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:40])
    assert make_data(test=rows, cache=True).split("test").encoded == first.encoded
    forbid_tokenization()
    assert make_data(test=rows, cache=True).split("test").encoded == first.encoded


def test_unpacking_restores_packed_rows():
    rows = [
        Encoded((1, 2, 3), (2,), (3,), (0, 3), num_truncated=2),
        Encoded((4,), (), (), (1, 1)),
        Encoded((5, 6), (), (7, -100), (0, 1), (1, -1, 1)),
    ]
    assert token_cache.unpack(token_cache.pack(rows)) == rows
