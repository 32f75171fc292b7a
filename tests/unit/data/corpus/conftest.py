"""Data modules of documents on tiny backbones."""

import pytest

import lightning_softprompt as sp


@pytest.fixture
def data_of(tiny_folder):
    def make(family="llama", **options):
        spec = sp.BackboneSpec(name=str(tiny_folder(family)))
        return sp.CorpusDataModule(backbone=spec, **{"window": 24, **options})

    return make
