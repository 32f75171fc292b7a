"""Further measurements of a tested checkpoint, which blocks of `experiments.yaml` name as `measures`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from plan import Job

from lightning_softprompt.__main__ import main as run_command
from lightning_softprompt.analysis.soft_tokens import project_to_words
from lightning_softprompt.checkpoints.folding import fold_task
from lightning_softprompt.checkpoints.prompt_file import read_prompt
from lightning_softprompt.checkpoints.restore import load_method
from lightning_softprompt.cli.commands.analysis.analyze import read_run
from lightning_softprompt.cli.dry_parse import parse_run
from lightning_softprompt.runs.run_spec import last_folder

OTHER_SEED = 1000  # added to the seed of a run for a second run of the same settings
GENERAL_TEXT = "lm/wikitext2"
GENERAL_WINDOWS = 128
WINDOW_BYTES = 512
EXPLAINED_ROWS = 40


@dataclass(frozen=True)
class Run:
    """What a measurement starts from.

    Args:
        job: The job.
        arguments: The options of its commands.
        checkpoint: Its best checkpoint; None without training.
        data: Folder of all data sets.
        folder: Folder of the run.
        test_folder: Folder of the test.
    """

    job: Job
    arguments: Sequence[str]
    checkpoint: Path | None
    data: Path
    folder: Path
    test_folder: Path

    @property
    def source(self) -> list[str]:
        """The option that loads the checkpoint."""
        return [] if self.checkpoint is None else [f"--ckpt_path={self.checkpoint}"]


def run(arguments: Sequence[str]) -> None:
    """Runs a command.

    Raises:
        SystemExit: If it fails.
    """
    code = run_command(list(arguments))
    if code:
        sys.exit(code)


def measure_line(finished: Run) -> dict[str, Any]:
    """Trains a second run with another seed, and measures the validation loss along the line between both."""
    seed = finished.job.seed + OTHER_SEED
    seeds = [f"--seed_everything={seed}", f"--data.seed={seed}"]
    run(["fit", *finished.arguments, *seeds, "--run.experiment=other", "--run.name=train", "--ckpt_path=last"])
    other = last_folder() / "checkpoints" / "best.ckpt"
    points = finished.folder / "line.json"
    run(["interpolate", str(finished.checkpoint), str(other), f"--out={points}", *finished.arguments])
    names = ("t", "loss", finished.job.metric)
    return {"line": [{name: point[name] for name in names} for point in json.loads(points.read_text())]}


def measure_general_text(finished: Run) -> dict[str, Any]:
    """Predicts windows of an encyclopedia with the trained method: what a task has cost in knowledge of other text."""
    if "data.demonstrations" in finished.job.options:
        return {}  # demonstrations are rows of the task's data
    settings = [argument for argument in finished.arguments if not argument.startswith(("--data", "--run.monitor"))]
    corpus = ["--data=configs/data/corpus.yaml", f"--data.path={finished.data / GENERAL_TEXT}"]
    sizes = [f"--data.window={WINDOW_BYTES}", "--data.eval_batch_size=8"]
    limit = f"--trainer.limit_val_batches={GENERAL_WINDOWS // 8}"
    run(["validate", *settings, *corpus, *sizes, limit, *finished.source])
    metrics = json.loads((last_folder() / "metrics.json").read_text())["val"]
    return {"general_text": {name.removeprefix("val/"): value for name, value in metrics.items()}}


def measure_words(finished: Run) -> dict[str, Any]:
    """Validates the prompt, and the prompt with each soft token replaced by its nearest word."""
    assert finished.checkpoint is not None
    parsed = parse_run(["validate", *finished.arguments])
    parsed.module.configure_model()
    backbone = parsed.module.loaded
    method = load_method(read_prompt(finished.checkpoint), finished.checkpoint, backbone)
    prompt = fold_task(method, None)
    assert prompt.tokens is not None
    words = replace(prompt, tokens=project_to_words(backbone, prompt.tokens[0])[None])
    trainer = parsed.make_validation_trainer()
    scores = {}
    for name, variant in (("prompt", prompt), ("nearest words", words)):
        parsed.module.prompt = lambda batch, variant=variant: variant  # type: ignore[method-assign, misc]
        (metrics,) = trainer.validate(parsed.module, parsed.data, verbose=False)
        scores[name] = metrics[f"val/{finished.job.metric}"]
    return {"words": scores}


def measure_passages(finished: Run) -> dict[str, Any]:
    """Leaves out the passages of some test rows in all combinations: which ones the answers depend on."""
    if finished.job.options.get("data.passages.mode") == "closed_book":
        return {}
    run(["explain", str(finished.test_folder), f"--rows={EXPLAINED_ROWS}", "--no-attention"])
    report = json.loads((finished.test_folder / "explain.json").read_text())
    return {"explanation": report["measures"]}


def measure_mixed(finished: Run) -> dict[str, Any]:
    """Counts the answers of the test that mix a relevant passage with another one, the kind of mistake of `analyze`."""
    rows = read_run(finished.test_folder)
    return {"mixed": sum(row.is_mixed for row in rows) / len(rows)}


MEASURES: Mapping[str, Callable[[Run], dict[str, Any]]] = {
    "line": measure_line,
    "general text": measure_general_text,
    "words": measure_words,
    "passages": measure_passages,
    "mixed": measure_mixed,
}
