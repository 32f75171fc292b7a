"""The losses of ten seeded training steps of every method config, on every backbone family that the method supports.

They are recorded in `losses.json`. A change of the code that is not meant to change results leaves them as they are.
After a change that is, record them again and say in the commit why they differ:

    RECORD_LOSSES=1 python -m pytest tests/regression
"""

import json
import logging
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import tiny
import yaml
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from lightning_softprompt.checkpoints.backbone_identity import backbone_identity
from lightning_softprompt.checkpoints.prompt_file import SavedPrompt, write_prompt
from lightning_softprompt.cli.commands.configs import configs_folder
from lightning_softprompt.cli.parsing.parser import Parser
from lightning_softprompt.cli.plugins import import_plugins
from lightning_softprompt.methods.base import SoftPromptModule

RECORDED = Path(__file__).with_name("losses.json")
RECORDS = "RECORD_LOSSES" in os.environ
STEPS = 10
LABELS = (0, 1, 1, 0)
SMALL = {  # sizes that fit a backbone of width 32, two layers and 48 positions
    "length": 3, "rank": 2, "bottleneck": 4, "width": 8, "max_tokens": 5, "pieces": 4, "layer": 1, "blocks": [2, 2],
    "tokens": ["good", "film"],
}  # fmt: skip
TEMPLATE = {"p_tuning": "{soft}{text}{soft} it was {target}", "cartridge": "{text}{soft} it was {target}"}
FAMILIES_OF = {
    "context_aware": tiny.CAUSAL,
    "cartridge": tiny.CAUSAL,
    "late_prompt_tuning": (*tiny.CAUSAL, *tiny.MASKED),
    **dict.fromkeys(("coop", "cocoop", "vpt", "maple"), tiny.CONTRASTIVE),
}
UNTRAINED = ("bare", "in_context")
CONFIGS = sorted(path for path in (configs_folder() / "method").glob("*.yaml") if path.stem not in UNTRAINED)
CASES = [(path, family) for path in CONFIGS for family in FAMILIES_OF.get(path.stem, tiny.FAMILIES)]


class LossRecorder(Callback):
    """Records the loss of each step in full precision."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


def shrink(arguments, prompt_file, corpus):
    """Returns the arguments of a config with the sizes of a tiny backbone and with existing files."""
    small = {name: SMALL.get(name, value) for name, value in arguments.items()}
    if isinstance(small.get("layers"), int):
        small["layers"] = 2
    if "corpus" in small:
        small["corpus"] = str(corpus)
    if small.get("init", {}).get("class_path") == "FromText":
        small["init"]["init_args"]["text"] = "is this film good ?"
    if "parts" in small:
        for part in small["parts"]:
            part["init_args"] = shrink(part["init_args"], prompt_file, corpus)
    for source in (*small.get("sources", ()), small.get("init", {})):
        if source.get("class_path") == "FromCheckpoint":
            source["init_args"]["path"] = str(prompt_file)
    return small


def build(config, classes):
    """Returns the method of a config, built as on the command line."""
    import_plugins()
    parser = Parser()
    parser.add_subclass_arguments(SoftPromptModule, "model", fail_untyped=False)
    arguments = {**config["init_args"], "classes": {**asdict(classes), "demonstrations": list(classes.demonstrations)}}
    parsed = parser.parse_object({"model": {**config, "init_args": arguments}})
    return parser.instantiate_classes(parsed).model


def batch_of_rows(codec, template, rows):
    """Returns some of the tiny rows, each with the index of its class."""
    if codec.reads_images:
        return tiny.image_batch(codec, labels=LABELS).only(range(4)[rows])
    return tiny.batch_of(codec, template, tiny.TEXTS[rows], tiny.TARGETS[rows], labels=LABELS[rows])


def write_losses(losses):
    """Writes one line for each case, so that a difference shows which cases changed."""
    lines = [f"{json.dumps(name)}: {json.dumps(values)}" for name, values in sorted(losses.items())]
    RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n")


@pytest.mark.parametrize(("path", "family"), CASES, ids=lambda value: getattr(value, "stem", value))
def test_losses_are_the_recorded_ones(path, family, load, classes, tmp_path):
    backbone = load(family)
    source = tmp_path / "source.safetensors"
    write_prompt(
        source, SavedPrompt({"tokens": backbone.word_embeddings[5:8].clone()}, backbone_identity(backbone), {})
    )
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("it is a sad story about a dog that never ends well")
    config = yaml.safe_load(path.read_text())
    config["init_args"] = shrink(config["init_args"], source, corpus)
    if backbone.codec.reads_images:
        classes = replace(classes, template="{soft}a story about {target} .")
    module = build(config, classes)
    module.attach(backbone, seed=0)
    template = TEMPLATE.get(path.stem, tiny.TEMPLATES["front"])
    halves = (slice(0, 2), slice(2, 4))
    batches = [batch_of_rows(backbone.codec, template, rows) for rows in halves]
    recorder = LossRecorder()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = Trainer(
        accelerator="cpu", precision="64-true", max_steps=STEPS, max_epochs=-1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[recorder],
    )  # fmt: skip
    trainer.fit(module, DataLoader(batches, batch_size=None))
    assert len(recorder.losses) == STEPS
    name = f"{path.stem} on {family}"
    recorded = json.loads(RECORDED.read_text()) if RECORDED.is_file() else {}
    if RECORDS:
        write_losses({**recorded, name: recorder.losses})
    else:
        assert recorder.losses == pytest.approx(recorded[name], rel=1e-6)
