"""The command reports the loss along the line between two prompts."""

import json
import logging
import shlex

import pytest
import torch
from row_files import write_rows

from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.checkpoints.backbone_identity import backbone_identity
from lightning_softprompt.checkpoints.prompt_file import SavedPrompt, write_prompt
from lightning_softprompt.cli.commands.analysis import interpolate
from lightning_softprompt.cli.dry_parse import parse_run
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.data.classification import ClassificationDataModule
from lightning_softprompt.methods import PromptTuning
from lightning_softprompt.system.errors import CommandError

LABELS = {"negative": "bad", "neutral": "one", "positive": "good"}
TEMPLATE = "{soft}{text} it is{target}"


@pytest.fixture
def ends(tiny_folder, tmp_path, rows):
    """Two prompts, the options of their run, and a function that returns the loss of soft tokens on its rows."""
    folder = tmp_path / "mood"
    folder.mkdir()
    for split in ("train", "validation"):
        write_rows(folder / f"{split}.jsonl", rows)
    name = str(tiny_folder("llama"))
    module = PromptTuning(length=3, backbone=BackboneSpec(name=name))
    backbone = load_backbone(module.spec)
    tokens = [torch.randn(3, backbone.hidden_size) for _ in range(2)]
    paths = []
    for number, values in enumerate(tokens):
        path = tmp_path / f"{number}.safetensors"
        write_prompt(path, SavedPrompt({"tokens": values}, backbone_identity(backbone), {}))
        paths.append(str(path))
    options = [
        f"--backbone.name={name}", "--model=PromptTuning", "--model.length=3", "--data=ClassificationDataModule",
        f"--data.path={folder}", f"--data.template={TEMPLATE}", f"--data.labels={json.dumps(LABELS)}",
        "--data.batch_size=2", "--trainer.accelerator=cpu",
    ]  # fmt: skip
    data = ClassificationDataModule(
        TEMPLATE, LABELS, path=str(folder), batch_size=2, backbone=module.spec, cache=False
    )  # fmt: skip
    data.setup("validate")
    module = PromptTuning(length=3, backbone=module.spec, classes=data.classes, evaluation=data.evaluation)
    module.attach(backbone)

    @torch.no_grad()
    def loss(tokens):
        module.tokens.copy_(tokens)
        each = [(float(module.objective(module.lm(), batch).loss), len(batch)) for batch in data.val_dataloader()]
        return sum(value * size for value, size in each) / sum(size for _, size in each)

    return tokens, paths, options, loss


def test_messages_of_libraries_are_hidden_as_in_a_run(ends, monkeypatch):
    _, paths, options, _ = ends
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    monkeypatch.setattr(logger, "filters", [])
    assert interpolate.main([*paths, "--points", "2", *options]) == 0
    record = logger.makeRecord(logger.name, logging.INFO, "file", 1, "GPU available: False, used: False", (), None)
    assert not logger.filter(record)


def test_every_point_of_the_line_has_the_loss_of_its_prompt(ends, tmp_path, capsys):
    (one, other), paths, options, loss = ends
    out, plot = tmp_path / "out" / "line.json", tmp_path / "out" / "line.png"
    assert interpolate.main([*paths, "--points", "5", "--out", str(out), "--plot", str(plot), *options]) == 0
    points = json.loads(out.read_text())
    assert [point["t"] for point in points] == [0.0, 0.25, 0.5, 0.75, 1.0]
    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    losses = [loss((1 - t) * one + t * other) for t in shares]
    assert [point["loss"] for point in points] == pytest.approx(losses, abs=1e-5)
    assert len(set(losses)) == 5
    rise = losses[-1] - losses[0]
    highest = max(value - losses[0] - t * rise for t, value in zip(shares, losses, strict=True))
    output, error = capsys.readouterr()
    assert float(output.split("loss barrier: ")[1].split()[0]) == pytest.approx(highest, abs=1e-4)
    mean = (losses[0] + losses[-1]) / 2
    described = f"{highest / mean:.1%}".replace("%", " %") + " of the mean loss of both prompts"
    assert (described if highest > 0 else "does not rise") in output
    assert plot.read_bytes().startswith(b"\x89PNG")
    average = parse_run(shlex.split(error.splitlines()[-1].removeprefix("Next: "))[1:])  # the suggested command
    assert torch.allclose(_initial_tokens(average.module), (one + other) / 2)


def _initial_tokens(module):
    module.configure_model()
    return module.tokens.detach()


def test_prompts_that_cannot_be_interpolated_are_refused(ends, tmp_path):
    _, paths, options, _ = ends
    with pytest.raises(CommandError, match=r"0\.safetensors has .*set --model and its sizes"):
        interpolate.main([*paths, *options, "--model.length=4"])
    with pytest.raises(CommandError, match="no prompt at"):
        interpolate.main([paths[0], str(tmp_path / "none.safetensors"), *options])
    with pytest.raises(CommandError, match="--points must be at least 2"):
        interpolate.main([*paths, "--points", "1", *options])
