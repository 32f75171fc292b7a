"""What W&B gets about a run besides its metrics: a description of the run, and the best validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, cast, final

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from lightning_softprompt import __version__
from lightning_softprompt.callbacks.reporting.run_files import RunFiles
from lightning_softprompt.checkpoints.prompt_file import WANDB_RUN
from lightning_softprompt.methods.optimizers import trainable_parameters
from lightning_softprompt.methods.trainer_hooks import TrainerHooks
from lightning_softprompt.runs.loggers import wandb_loggers
from lightning_softprompt.runs.wandb_artifacts import find_source, link_prompts, log_source
from lightning_softprompt.runs.wandb_identity import find_prompt_artifacts
from lightning_softprompt.system.git import read_commit

PACKAGES = ("torch", "transformers", "lightning")
SPLITS: Mapping[TrainerFn, Sequence[str]] = {
    TrainerFn.FITTING: ("train", "validation"),
    TrainerFn.VALIDATING: ("validation",),
    TrainerFn.TESTING: ("test",),
    TrainerFn.PREDICTING: (),
}


@final
class WandbReport(Callback):
    """Adds a description of the run to its W&B config, and the best validation of a training to its W&B summary.

    The source files of a training's classes that are not of this package are an artifact of type `plug-in`.

    Checkpoints store the id of the W&B run, which a resumed training and an evaluation continue.

    Args:
        wandb_id: Id of the W&B run; None if the run is not logged to W&B.
        files: The callback that determines the best validation.
        uses_init: Whether the run starts from the initial parameters of the method. If these come from prompt files,
            the run is linked to the prompts.
    """

    def __init__(self, wandb_id: str | None, files: RunFiles, uses_init: bool = True) -> None:
        self.wandb_id, self.files, self.uses_init = wandb_id, files, uses_init

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the id of the W&B run."""
        if self.wandb_id is not None:
            checkpoint[WANDB_RUN] = {"id": self.wandb_id}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Describe a training, and log the source files of its classes that are not of this package."""
        self._describe(trainer, pl_module)
        if trainer.is_global_zero:
            for logger in wandb_loggers(trainer):
                log_source(logger.experiment, find_source(list_parts(trainer, pl_module)))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Describe `validate`; a training is described at its start."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._describe(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Describe `test`."""
        self._describe(trainer, pl_module)

    @rank_zero_only
    def _describe(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loggers = wandb_loggers(trainer)
        if not loggers:
            return
        module = cast(TrainerHooks, pl_module)
        config = describe_run(trainer, module)
        rows = count_rows(trainer)
        sources = find_sources(module) if self.uses_init else []
        for logger in loggers:
            # an evaluation and a resumed training continue the run, so they replace values of the earlier command
            logger.experiment.config.update({**config, **rows}, allow_val_change=True)
            link_prompts(logger.experiment, sources)

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add parameters, rows, time and the best validation to the summary."""
        loggers = wandb_loggers(trainer)
        if not loggers:
            return
        report = self.files.report
        summary = {name: report[name] for name in ("trainable_parameters", "frozen_parameters", "seconds")}
        best = report["best"]
        if best is not None:
            summary |= {
                "best_metric": best["metric"],
                "best_value": best["value"],
                "best_step": best["global_step"],
                "best_epoch": best["epoch"],
            }
        for logger in loggers:
            logger.experiment.summary.update({**summary, **count_rows(trainer)})


def list_parts(trainer: Trainer, module: LightningModule) -> list[object]:
    """Returns the objects whose classes a user can write: of the method, the data and the callbacks."""
    parts = [*module.modules(), _data(trainer), *trainer.callbacks]  # type: ignore[attr-defined]
    attributes = [value for method in cast(TrainerHooks, module).methods for value in vars(method).values()]
    return [*parts, *attributes]


def find_sources(module: TrainerHooks) -> list[str]:
    """Returns the W&B artifacts of the prompts from which the initial parameters come, each once."""
    paths = [path for method in module.methods for path in method.prompt_sources]
    names = [name for path in dict.fromkeys(paths) for name in find_prompt_artifacts(path)]
    return list(dict.fromkeys(names))


def describe_run(trainer: Trainer, module: TrainerHooks) -> dict[str, Any]:
    """Returns what the W&B config has besides the options: method, data, sizes, fingerprint, versions and commit."""
    trainable = sum(parameter.numel() for parameter in trainable_parameters(module).values())
    total = sum(parameter.numel() for parameter in module.parameters())
    method = module.methods[0]
    versions = {"lightning_softprompt": __version__, **{name: version(name) for name in PACKAGES}}
    description = {
        "method": type(method).__name__,
        "data_module": type(_data(trainer)).__name__,
        "dataset": name_dataset(_data(trainer).path),
        "n_trainable": trainable,
        "n_frozen": total - trainable,
        "backbone_fingerprint": method.loaded.fingerprint(),
        "versions": versions,
    }
    commit = read_commit()
    return description if commit is None else {**description, "git_commit": commit}


def count_rows(trainer: Trainer) -> dict[str, int]:
    """Returns the number of rows of each split that the command reads, such as `rows_train`."""
    splits = SPLITS[cast(TrainerFn, trainer.state.fn)]
    if trainer.limit_val_batches == 0:
        splits = [name for name in splits if name != "validation"]
    return {f"rows_{name}": len(_data(trainer).split(name)) for name in splits}


def name_dataset(path: str | None) -> str | None:
    """Returns the short name of a data set: the last part of its path or of its name on a hub.

    >>> name_dataset("data/sst2/"), name_dataset("org/questions"), name_dataset(None)
    ('sst2', 'questions', None)
    """
    return None if path is None else Path(path).name


class _HasSplits(Protocol):
    path: str | None

    def split(self, name: str) -> Sized: ...


def _data(trainer: Trainer) -> _HasSplits:
    return cast(_HasSplits, trainer.datamodule)  # type: ignore[attr-defined]
