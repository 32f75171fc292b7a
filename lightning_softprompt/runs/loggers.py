"""The loggers of a run: `metrics.csv` in its folder, and W&B."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from io import StringIO
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, cast

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only

from lightning_softprompt.runs.wandb_artifacts import link_prompts
from lightning_softprompt.runs.wandb_identity import WandbIdentity
from lightning_softprompt.runs.wandb_summary import restore_summary, save_summary
from lightning_softprompt.system.atomic_files import write_file
from lightning_softprompt.system.hosts import wandb as wandb_host

if TYPE_CHECKING:
    from wandb import Run

log = logging.getLogger(__name__)
Summary = Sequence[tuple[str, Literal["min", "max"]]]
WandbMode = Literal["auto", "online", "offline", "disabled"]
Sections = Mapping[str, Collection[str]]  # names of metrics by section

STEP = "trainer/global_step"
INTERVAL_SUFFIXES = ("", "_low", "_high")  # a metric and the ends of its interval
CACHES = {  # folders that W&B shares between runs on Linux, by the variable that overrides them
    "WANDB_CACHE_DIR": "~/.cache/wandb",
    "WANDB_CONFIG_DIR": "~/.config/wandb",
    "WANDB_DATA_DIR": "~/.local/share/wandb",
}
PATIENCE = 10.0  # seconds to wait for W&B's server before the run continues offline
LAST_PATIENCE = 300.0  # seconds to wait at the end for uploads; the rest stays on disk


def make_loggers(
    folder: Path,
    name: str,
    project: str,
    wandb: WandbMode = "auto",
    summary: Summary = (("val/loss", "min"),),
    identity: WandbIdentity | None = None,
    sections: Sections = MappingProxyType({}),
) -> list[MetricsFile | WandbRun]:
    """Create the loggers of a run. They open their files when the first value is logged.

    Args:
        folder: The run's folder, which gets `metrics.csv` and `wandb/`.
        name: The run's name on W&B.
        project: The run's project on W&B.
        wandb: `auto` uses `WANDB_MODE`, or else online if W&B has an API key and offline otherwise; `online` requires a
            key. An offline run is stored in `folder`, and the command to upload it is printed.
        summary: Metrics whose best value W&B shows for the run, each with its mode.
        identity: Which W&B run to log to, and its group, job type, tags and notes (default: a new run).
        sections: Metrics, without their stage, that W&B shows apart from the others, by the name of their section.
    """
    mode = resolve_mode(wandb)
    if mode == "disabled":
        return [MetricsFile(folder)]
    run = WandbRun(folder, name, project, mode, summary, identity, sections)
    run.refuse_without_key()
    return [MetricsFile(folder), run]


def resolve_mode(wandb: WandbMode) -> str:
    """The mode of W&B: that of the option, or of `WANDB_MODE` if the option is `auto`."""
    return os.environ.get("WANDB_MODE", "auto") if wandb == "auto" else wandb


@rank_zero_only
def rank_zero_info(line: str) -> None:
    """Log a line once for all processes with the package's logger, which is never filtered."""
    log.info(line)


def is_logging_step(trainer: Trainer, step: int) -> bool:
    """Whether values are logged after optimizer step `step`, starting at 1."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and step > 0 and step % every == 0


def validation_log_step(trainer: Trainer) -> int:
    """The step at which Lightning logs validation metrics: the last optimizer step, starting at 0."""
    return max(trainer.global_step - 1, 0)


def metrics_files(trainer: Trainer) -> list[MetricsFile]:
    """The Trainer's loggers that write `metrics.csv`."""
    return [logger for logger in trainer.loggers if isinstance(logger, MetricsFile)]


def wandb_loggers(trainer: Trainer) -> list[WandbLogger]:
    """The Trainer's loggers that accept tables and histograms."""
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]


class MetricsFile(CSVLogger):
    """Writes `metrics.csv` to the run folder; a resumed run appends to the existing file."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, name="", version="")
        self.is_disabled = False  # whether writing is still disabled

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer of the file."""
        if self.is_disabled:
            return cast("ExperimentWriter", DummyLogger().experiment)
        if self._experiment is None:
            self._experiment = _AppendingWriter(self.save_dir)
        return cast("ExperimentWriter", self._experiment)

    def log_hyperparams(self, params: Any = None) -> None:
        """Write nothing, because the run folder contains them in `config.yaml`."""

    @rank_zero_only
    def truncate(self, step: int) -> None:
        """Drop the rows from an optimizer step on, starting at 0, because a resumed run logs them again."""
        path = Path(self.save_dir, ExperimentWriter.NAME_METRICS_FILE)
        if path.is_file():
            keys, rows = _read(path)
            _write(path, keys, [row for row in rows if int(row["step"]) < step])


class _AppendingWriter(ExperimentWriter):
    """Lightning's writer, but it keeps existing metrics, loses none if the process is killed, and writes only them."""

    def save(self) -> None:
        """Write the metrics; Lightning's writer also writes hyperparameters to `hparams.yaml`."""
        super(ExperimentWriter, self).save()

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.is_file():
            self.metrics_keys, rows = _read(path)
            if not path.read_bytes().endswith(b"\n"):
                _write(path, self.metrics_keys, rows)

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        _write(path, fieldnames, _read(path)[1])


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Read the columns and rows of a table, without an incomplete last row."""
    complete, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    reader = csv.DictReader(StringIO(f"{complete}\n" if complete else ""))
    return list(reader.fieldnames or []), list(reader)


def _write(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
    """Write the table; without rows, delete the file."""
    if not rows:
        path.unlink()
        return
    table = StringIO(newline="")
    writer = csv.DictWriter(table, fieldnames=columns)
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, table.getvalue().encode())


class WandbRun(WandbLogger):
    """A W&B run that never prompts the user, and never stops a training because the server is unreachable.

    Args:
        folder: The run's folder, which gets `wandb/`.
        name: The run's name.
        project: The run's project.
        mode: As in `make_loggers`, or a value of `WANDB_MODE`.
        summary: Metrics whose best value is shown for the run, each with its mode.
        identity: The W&B run, whose name replaces `name` (default: a new run).
        sections: As in `make_loggers`.
    """

    def __init__(
        self,
        folder: Path,
        name: str | None,
        project: str,
        mode: str,
        summary: Summary,
        identity: WandbIdentity | None = None,
        sections: Sections = MappingProxyType({}),
    ) -> None:
        options: Mapping[str, Any] = {}
        if identity is not None:
            name, options = identity.name, identity.init_options
        super().__init__(name=name, project=project, save_dir=folder, log_model=False, **options)
        self._folder = folder
        self._mode = mode
        self._summary = summary
        self._section_of = {
            f"{metric}{suffix}": section
            for section, metrics in sections.items()
            for metric in metrics
            for suffix in INTERVAL_SUFFIXES
        }
        self._continues = identity is not None and identity.continues
        self._earlier_folder = None if identity is None else identity.earlier_folder
        self._sources = () if identity is None else identity.sources
        self._lost = False  # whether W&B has failed
        self.is_disabled = False  # whether the start of the run is still disabled

    @property
    @rank_zero_experiment
    def experiment(self) -> Run:
        """The run, started at first use."""
        if self.is_disabled:
            return cast("Run", DummyLogger().experiment)
        if self._experiment is None:
            self._experiment = run = self._start()
            self._define_metrics(run)
            link_prompts(run, self._sources)
        return cast("Run", self._experiment)

    @property
    def has_started(self) -> bool:
        """Whether the W&B run exists in this process and accepts values."""
        return self._experiment is not None and not self.is_disabled and not self._lost

    @rank_zero_only
    def finish(self, failed: bool = False, summary: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Finish the run, so that its console log has no lines of later runs of this process.

        Args:
            failed: Whether the command failed.
            summary: Values for the summary of the run that are known at its end.
        """
        if not self.has_started:
            return
        run = cast("Run", self._experiment)
        folders = [self._folder] if self._earlier_folder is None else [self._folder, self._earlier_folder]
        try:
            run.summary.update(dict(summary))
            save_summary(run, folders)
            run.finish(exit_code=1 if failed else 0)
        except Exception as error:  # any failure of its process or the connection to it
            log.warning("W&B failed at the end of the run (%r); metrics.csv has all metrics", error)
        self._experiment = None
        self.is_disabled = True  # nothing may start the run again

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Add to the run's config, once it has started."""
        if not self.is_disabled:
            super().log_hyperparams(params)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:  # type: ignore[override]
        """Log metrics; if W&B fails, warn once and continue without it."""
        if self._lost:
            return
        _ = self.experiment
        try:
            super().log_metrics(self._names_on_wandb(metrics), step)
        except Exception as error:  # any failure of its process or the connection to it
            self._lost = True
            log.warning("W&B failed (%r): the run continues without it; metrics.csv has all metrics", error)

    def _names_on_wandb(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """The metrics as W&B shows them; monitored metrics keep their names.

        W&B makes a section of panels for each prefix. Metrics of single classes, of which there are four per class, get
        the prefix `val_by_class/` or `test_by_class/`. Metrics of retrieval get `val_retrieval/` or `test_retrieval/`,
        so that `precision@1` of passages is apart from `precision` of words. `cross_entropy` is left out where it
        equals the loss, which it does unless the objective is another one; metrics.csv and metrics.json have both.
        """
        monitored = {name for name, _ in self._summary}
        shown = {}
        for name, value in metrics.items():
            stage, _, metric = name.partition("/")
            if name not in monitored:
                if metric == "cross_entropy" and value == metrics.get(f"{stage}/loss"):
                    continue
                of_replica = self._section_of.get(metric.rpartition("/")[0])
                section = self._section_of.get(metric, of_replica)
                if section is not None:
                    name = f"{stage}_{section}/{metric}"
            shown[name] = value
        return shown

    def refuse_without_key(self) -> None:
        """Refuse a run that must be online if W&B has no API key.

        Raises:
            ValueError: Naming what is missing.
        """
        if self._mode in ("auto", "offline", "dryrun") or "WANDB_MODE" in os.environ:
            return
        if problem := no_credentials():
            raise ValueError(f"W&B mode is {self._mode}, but {problem}; run `wandb login`, or use auto or offline")

    def _start(self) -> Run:
        if self._mode in ("offline", "dryrun"):
            return self._start_offline("as requested")
        if problem := no_credentials():
            return self._start_offline(problem)
        host = wandb_host()
        if host.state() == "not reachable":  # checked for 2 seconds; W&B itself would wait much longer
            return self._start_offline(f"{host.url} is not reachable")
        return self._start_online()

    def _start_online(self) -> Run:
        import wandb

        try:
            # without `quiet`, W&B looks up the account's name, another wait if there is no network
            run = self._init(mode="online", init_timeout=PATIENCE, finish_timeout=LAST_PATIENCE, quiet=True)
        except (wandb.Error, TimeoutError) as error:
            wandb.teardown()  # its process still has the run that failed, and refuses another one with the same id
            return self._start_offline(str(error).partition("\n")[0])
        rank_zero_info(f"W&B: {run.url}")
        return run

    def _start_offline(self, reason: str) -> Run:
        run = self._init(mode="offline", silent=True)
        if self._earlier_folder is not None:
            restore_summary(run, self._earlier_folder)
        after = " after the earlier parts of the run" if self._continues else ""
        rank_zero_info(
            f"W&B is offline ({reason}). To upload this run later{after}: wandb sync {run.settings.sync_dir}"
        )
        return run

    def _init(self, mode: Literal["online", "offline"], **settings: Any) -> Run:
        import wandb

        # W&B silently writes to the temporary folder if this one is missing
        Path(self._wandb_init["dir"]).mkdir(parents=True, exist_ok=True)
        _redirect_caches(Path(self._wandb_init["dir"], "wandb"))
        # a second training in this process is a new run, so the first one is finished
        options = {name: value for name, value in self._wandb_init.items() if value is not None}
        if mode == "offline" and not self._continues:
            options.pop("resume", None)  # the upload of a later part keeps the config and the steps of earlier parts
        return wandb.init(**options, mode=mode, settings=wandb.Settings(reinit="finish_previous", **settings))

    def _define_metrics(self, run: Run) -> None:
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP, step_sync=True)
        for name, best in self._summary:  # an explicit definition excludes a metric from "*", so its axis is repeated
            run.define_metric(name, step_metric=STEP, step_sync=True, summary=best)


def _redirect_caches(folder: Path) -> None:
    """Redirect W&B's shared folders into a run folder if those in the home folder are not writable.

    W&B stages tables and images there. Without these folders it would lose them, and log to the terminal.
    """
    for variable, default in CACHES.items():
        default_path = Path(default).expanduser()
        try:
            default_path.mkdir(parents=True, exist_ok=True)
            is_writable = os.access(default_path, os.W_OK)
        except OSError:
            is_writable = False
        if not is_writable:
            os.environ.setdefault(variable, str(folder / default_path.parent.name))


def no_credentials() -> str | None:
    """The reason why W&B cannot log in, or None. Uses neither prompts nor the network."""
    from wandb.errors import AuthenticationError
    from wandb.sdk import wandb_setup
    from wandb.sdk.lib import wbauth

    settings = wandb_setup.singleton().settings
    host = wbauth.HostUrl(settings.base_url, app_url=settings.app_url)
    try:
        session = wbauth.authenticate_session(host=host, source="", prompt=False, verify=False, update_session=False)
    except AuthenticationError as error:
        return str(error)
    return None if session else "no API key is configured"
