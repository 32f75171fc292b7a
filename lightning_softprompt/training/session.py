"""One run: its folder, loggers, callbacks and saved prompt."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback

from lightning_softprompt import __version__
from lightning_softprompt.callbacks.algorithms.head_fit import HeadFit
from lightning_softprompt.callbacks.algorithms.warm_start import WarmStart
from lightning_softprompt.callbacks.recovery.best_checkpoint import BestCheckpoint
from lightning_softprompt.callbacks.recovery.final_checkpoint import FinalCheckpoint
from lightning_softprompt.callbacks.recovery.final_validation import FinalValidation
from lightning_softprompt.callbacks.recovery.nan_guard import NumericGuard
from lightning_softprompt.callbacks.recovery.oom_retry import Halving
from lightning_softprompt.callbacks.recovery.patience import Patience
from lightning_softprompt.callbacks.recovery.preemption import Preemption, Termination
from lightning_softprompt.callbacks.recovery.process_watch import ProcessWatch
from lightning_softprompt.callbacks.recovery.resume import RngState
from lightning_softprompt.callbacks.recovery.run_settings import RunSettings
from lightning_softprompt.callbacks.recovery.run_start import RunStart
from lightning_softprompt.callbacks.reporting.case_report import CaseReport
from lightning_softprompt.callbacks.reporting.parameter_summary import ParameterSummary
from lightning_softprompt.callbacks.reporting.predictions import (
    TEST_TABLE_ROWS,
    PredictionTable,
    PredictionWriter,
    TestPredictions,
)
from lightning_softprompt.callbacks.reporting.prompt_watch import PromptWatch
from lightning_softprompt.callbacks.reporting.result_summary import ResultSummary
from lightning_softprompt.callbacks.reporting.rollout_report import RolloutReport
from lightning_softprompt.callbacks.reporting.run_files import RunFiles
from lightning_softprompt.callbacks.reporting.start_summary import StartSummary
from lightning_softprompt.callbacks.reporting.throughput import Throughput
from lightning_softprompt.callbacks.reporting.token_gradients import TokenGradients
from lightning_softprompt.callbacks.reporting.training_sample import TrainingSample
from lightning_softprompt.callbacks.reporting.wandb_report import WandbReport
from lightning_softprompt.checkpoints.prompt_file import SavedPrompt, read_prompt, split_replicas
from lightning_softprompt.data.datamodule import SoftPromptDataModule
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.reports.prediction_file import PREDICTIONS as TEST_PREDICTIONS
from lightning_softprompt.runs.loggers import MetricsFile, Summary, WandbMode, WandbRun, make_loggers, resolve_mode
from lightning_softprompt.runs.run_spec import RunSpec, make_folder
from lightning_softprompt.runs.wandb_artifacts import log_prompt
from lightning_softprompt.runs.wandb_identity import default_tags, find_wandb_id, identify_run
from lightning_softprompt.system.atomic_files import refuse_special_file
from lightning_softprompt.system.dotted_names import flatten
from lightning_softprompt.training.monitors import choose_monitor
from lightning_softprompt.training.prompt_files import count_validation_rows, write_prompt_files
from lightning_softprompt.training.replicas import Replicas

log = logging.getLogger(__name__)
PREDICTIONS = "predictions.jsonl"
PREDICTION_OPTIONS = ("backbone", "model", "data", "replicas", "seed_everything", "trainer.precision")
ROW_OPTIONS = {"data.path", "data.predict", "data.num_workers", "data.cache", "data.on_bad_row"}  # no effect on a row


class Session:
    """The loggers, callbacks and files that this package adds to a Trainer for one run.

    Args:
        run: Where files go.
        command: `fit`, `validate`, `test` or `predict`.
        module: The method, or its replicas.
        data: The data module.
        settings: Saves the settings of the run and compares them with those of the checkpoint.
        folder: The folder of a run that is resumed in its own folder; None makes a new one.
        resumed: The checkpoint that a run is resumed from or evaluates, if any.
        init_from: The prompt or checkpoint that initializes the method, if any.

    Attributes:
        folder: Folder of the run's files, created when the run begins.
        has_folder: Whether the run has a folder; `predict` has none if its predictions are written elsewhere.
    """

    def __init__(
        self,
        run: RunSpec,
        command: str,
        module: SoftPromptModule | Replicas,
        data: SoftPromptDataModule,
        settings: RunSettings,
        folder: Path | None = None,
        resumed: Path | None = None,
        init_from: Path | None = None,
    ) -> None:
        self.settings, self.resumed = settings, resumed
        self.source = resumed or init_from
        self.run, self.command, self.module, self.data = run, command, module, data
        self.monitor, self.mode = choose_monitor(run, data.evaluation)
        self.folder = run.name_folder(folder, command == "fit", resumed)
        self.prints = run.predictions == "-" or (run.predictions is None and data.sources["predict"] == "-")
        self.has_folder = command != "predict" or not (self.prints or run.predictions)
        summary: Summary = ((self.monitor, self.mode), ("val/loss", "min"))
        # predictions have a W&B run only to be linked to the prompt, and only if the prompt is there
        has_wandb = command != "predict" or find_wandb_id(resumed, init_from) is not None
        wandb: WandbMode = run.wandb if has_wandb else "disabled"
        self.wandb_id: str | None = None
        self.loggers = self._create_loggers(wandb, summary, init_from) if self.has_folder else []

    def _create_loggers(
        self, mode: WandbMode, summary: Summary, init_from: Path | None
    ) -> list[MetricsFile | WandbRun]:
        """Create the loggers, and choose the W&B run that the command starts or continues."""
        if resolve_mode(mode) == "disabled":
            return make_loggers(self.folder, self.folder.name, self.run.project, mode, summary)
        method = self.module.methods[0]
        tags = default_tags(type(method).__name__, type(self.data).__name__, method.spec.name)
        identity = identify_run(self.run, self.command, self.folder.name, tags, self.resumed, init_from)
        self.wandb_id = identity.id
        sections = self.data.evaluation.sections
        return make_loggers(self.folder, self.folder.name, self.run.project, mode, summary, identity, sections)

    def create_start(self, save_config: Callable[[Path], None], config: str) -> RunStart:
        """Create the callback that begins the run; before it, no files are written and nothing is sent to W&B.

        Args:
            save_config: Writes the config of the run to a file.
            config: The config for the loggers.
        """
        for logger in self.loggers:
            logger.is_disabled = True
        return RunStart(partial(self._begin, save_config, config))

    def _begin(self, save_config: Callable[[Path], None], config: str) -> None:
        if not self.has_folder:
            return
        make_folder(self.folder, self.command, wandb_id=self.wandb_id, source=self.source)
        log.info("Run folder: %s", self.folder)
        save_config(self.config_file)
        for logger in self.loggers:
            logger.is_disabled = False
            logger.log_hyperparams(yaml.safe_load(config))

    def finish(self, failed: bool = False) -> None:
        """Finish the W&B run at the end of the command.

        Args:
            failed: Whether the command failed.
        """
        for logger in self.loggers:
            if isinstance(logger, WandbRun):
                logger.finish(failed, self._trial_state(failed))

    def _trial_state(self, failed: bool) -> dict[str, Any]:
        """Number and state of the trial of a search; empty for other runs. A trial needs a validation to succeed."""
        if self.run.trial is None:
            return {}
        is_complete = not failed and any(callback.best_model_path for callback in self.best.values())
        return {"trial/number": self.run.trial, "trial/state": "COMPLETE" if is_complete else "FAIL"}

    @property
    def _scores_training(self) -> bool:
        """Whether the folder is that of a training whose prompt is evaluated."""
        return self.command != "fit" and self.last.is_file() and (self.folder / "config.yaml").is_file()

    @property
    def config_file(self) -> Path:
        """The config file; an evaluation in the folder of a training does not replace the config of the training."""
        name = f"config_{self.command}.yaml" if self._scores_training else "config.yaml"
        return self.folder / name

    def callbacks(self, init_from: str | None, ckpt_path: str | None, config: str) -> list[Callback]:
        """Create the callbacks of the command."""
        untrained = self.module.trains and not self.module.trained
        if self.command != "fit" and init_from is None and ckpt_path is None and untrained:
            log.warning("No --ckpt_path or --init_from given: evaluating an untrained prompt")
        for method in self.module.methods:
            method.has_trained_values = init_from is not None or ckpt_path is not None
        start: list[Callback] = [] if init_from is None else [WarmStart(Path(init_from))]
        of_command = [self._writer(config)] if self.command == "predict" else self._reports()
        watch = ProcessWatch(self.run.process_timeout)
        stop: list[Callback] = [] if self.command == "fit" else [Termination()]
        fit: list[Callback] = [HeadFit()] if self.command == "fit" else []  # after the prompt was loaded
        return [watch, *stop, self.settings, *start, *fit, *of_command]

    def _writer(self, config: str) -> PredictionWriter:
        """Create the writer of predictions, which resumes a run that was killed unless a file is named."""
        if self.prints:
            return PredictionWriter("-")
        if self.run.predictions:
            if Path(self.run.predictions).is_dir():
                raise ValueError(
                    f"run.predictions must be a file, but {self.run.predictions} is a folder; give "
                    f"{Path(self.run.predictions, PREDICTIONS)}"
                )
            _refuse_special_predictions(self.run.predictions)
            return PredictionWriter(Path(self.run.predictions), prediction_settings(config))
        earlier = sorted(self.folder.parent.glob(f"*/{PREDICTIONS}.part"), reverse=True)
        return PredictionWriter(self.folder / PREDICTIONS, prediction_settings(config), earlier)

    def _reports(self) -> list[Callback]:
        files = RunFiles(self.folder, self.monitor, self.mode)
        summary = ResultSummary(self.folder, self.monitor, self.mode)  # the last one: it names the files of the others
        # a prompt or checkpoint replaces the initial parameters; a resumed training has started from them
        uses_init = self.source is None or (self.command == "fit" and self.resumed is not None)
        report = WandbReport(self.wandb_id, files, uses_init)
        if self.command == "test":
            predictions = [TestPredictions(self.folder / TEST_PREDICTIONS), PredictionTable("test", TEST_TABLE_ROWS)]
            return [files, report, *predictions, *self._cases(), summary]
        training = self._training_callbacks() if self.command == "fit" else []
        scores_sample = self.command == "fit" and self.run.train_sample > 0
        sample: list[Callback] = [TrainingSample(self.run.train_sample)] if scores_sample else []
        table = PredictionTable("val", self.run.table_rows)
        return [*sample, files, report, table, *training, summary]

    def _cases(self) -> list[Callback]:
        """The page of cases, if the evaluation ranks rows."""
        ranking = self.data.evaluation.case_ranking
        return [] if ranking is None else [CaseReport(self.folder / "test_cases.html", ranking, self._description)]

    @property
    def _description(self) -> str:
        """What is tested, in a line."""
        method, source = self.module.methods[0], self.source or "untrained"
        return f"{type(method).__name__} ({source}), {type(self.data).__name__}, {method.spec.name}"

    @property
    def last(self) -> Path:
        """The checkpoint to resume from."""
        return self.folder / "checkpoints" / "last.ckpt"

    def _training_callbacks(self) -> list[Callback]:
        checkpoints = [Preemption(self.last), *self.best.values(), FinalCheckpoint(self.last, self.run.keep_last)]
        guard = NumericGuard(self.folder / "bad_rows.jsonl", self.run.skip_bad_steps)
        optional: list[Callback] = [Halving()] if self.run.halve_on_oom else []
        if self.run.early_stopping:
            optional.append(Patience(self.monitor, self.mode, self.run.early_stopping))
        reports: list[Callback] = [ParameterSummary(), StartSummary(), Throughput(), PromptWatch()]
        reports.append(RolloutReport(self.folder, self.run.table_rows))
        if self.run.watch == "tokens":
            reports.append(TokenGradients())
        return [FinalValidation(), *reports, guard, *optional, RngState(), *checkpoints]

    def _checkpoint(self, name: str, metric: str) -> BestCheckpoint:
        return BestCheckpoint(self.folder / "checkpoints", name, metric, self.mode, self.resumed)

    @cached_property
    def best(self) -> dict[str, BestCheckpoint]:
        """The callbacks that save the best checkpoints of the run and of each replica, by name of the prompt file."""
        best = {"prompt": self._checkpoint("best", self.monitor)}
        for name in self.module.replica_names:
            best[name] = self._checkpoint(f"best_{name}", f"{self.monitor}/{name}")
        return best

    def conclude(self) -> None:
        """Write the best prompt of a training as `prompt.safetensors`, or that of each replica."""
        if not self.module.trainer.is_global_zero:
            return
        is_validated = any(callback.best_model_path for callback in self.best.values())
        if not self.last.is_file() and not is_validated:
            if self.resumed is not None:
                raise ValueError(
                    f"{self.resumed} is of step {self.module.trainer.global_step}, after which this run has no step "
                    f"left, so {self.folder} has no prompt; raise --trainer.max_steps or --trainer.max_epochs, or take "
                    f"the prompt from the checkpoint with --init_from {self.resumed}"
                )
            raise ValueError(
                f"the training stopped before its first step, so {self.folder} has no prompt; see --trainer.max_time "
                f"and the callbacks that stop a training"
            )
        best = {}
        for name, callback in self.best.items():
            best[name] = read_prompt(Path(callback.best_model_path or self.last))
        kind = "best prompt" if is_validated else "last prompt (no validation was run)"
        if self.module.replica_names:
            best = {name: split_replicas(best[name])[k] for k, name in enumerate(self.module.replica_names)}
        rows = count_validation_rows(self.data, self.module.trainer.limit_val_batches)
        for name, prompt in best.items():
            path = self.folder / f"{name}.safetensors"
            write_prompt_files(prompt, path, self.config_file, rows)
            log.info("Saved %s: %s", kind, path)
            self._log_artifact(path, prompt)

    def _log_artifact(self, path: Path, prompt: SavedPrompt) -> None:
        """Log a prompt file as an artifact of the W&B run."""
        report = json.loads((self.folder / "metrics.json").read_text())
        best = report.get("best") or {}
        metadata = {
            "method": str(prompt.method["_class_path"]).rpartition(".")[2],
            "length": prompt.method.get("length"),
            "backbone": prompt.backbone["name"],
            "backbone_fingerprint": prompt.backbone["fingerprint"],
            "metric": best.get("metric"),
            "value": best.get("value"),
            "step": best.get("global_step"),
        }
        for logger in self.loggers:
            if isinstance(logger, WandbRun) and logger.has_started:
                log_prompt(logger.experiment, path, metadata)


def _refuse_special_predictions(path: str) -> None:
    try:
        refuse_special_file(Path(path))
    except ValueError as error:
        raise ValueError(f"run.predictions: {error}, or - for standard output") from None


def prediction_settings(config: str) -> dict[str, Any]:
    """Returns the options of a run that determine the prediction for a row, as plain values by name."""
    options = flatten(yaml.safe_load(config))
    names = [name for name in options if name.startswith(PREDICTION_OPTIONS) and name not in ROW_OPTIONS]
    return {"version": __version__, **{name: options[name] for name in names}}
