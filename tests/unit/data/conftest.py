import pytest
from labelled_rows import LABELS

from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.data.classification import ClassificationDataModule


@pytest.fixture
def make_data(tiny_folder):
    """Returns a function that creates a classification data module with the tokenizer of a Llama, without weights.

    Test files of other data modules replace this fixture.
    """
    spec = BackboneSpec(name=str(tiny_folder("llama")))

    def make_data(**arguments):
        defaults = {"template": "{text} it was {target}", "labels": LABELS, "cache": False}
        return ClassificationDataModule(backbone=spec, **defaults | arguments)

    return make_data
