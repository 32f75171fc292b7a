from dataclasses import dataclass

import pytest
import torch

from lightning_softprompt import BackboneSpec, Combined, Init, LoRA, PromptTuning, report_prompt_source
from lightning_softprompt.checkpoints.prompt_sources import collect_sources


@dataclass(frozen=True)
class FromFile(Init):
    """Values from a file, as the initializer of a plug-in."""

    path: str

    def __call__(self, backbone, length):
        report_prompt_source(self.path)
        return torch.zeros(length, backbone.hidden_size)


def test_files_are_collected_once_in_order():
    with collect_sources() as outer:
        report_prompt_source("a")
        with collect_sources() as inner:
            report_prompt_source("b")
        report_prompt_source("c")
        report_prompt_source("a")
    report_prompt_source("d")  # no method is created
    assert (outer, inner) == (["a", "c"], ["b"])


def test_a_failure_ends_the_collection():
    with pytest.raises(OSError, match="missing"), collect_sources() as failed:
        raise OSError("missing")
    report_prompt_source("a")
    assert failed == []


def test_methods_have_the_files_of_their_initializers(tiny_folder):
    spec = BackboneSpec(str(tiny_folder("llama")))
    plain, combined = (
        PromptTuning(length=2, backbone=spec),
        Combined([PromptTuning(length=2, init=FromFile("a"), backbone=spec), LoRA(backbone=spec)], backbone=spec),
    )
    for method, sources in ((plain, []), (combined, ["a"])):
        method.configure_model()
        assert method.prompt_sources == sources
