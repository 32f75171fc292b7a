"""Where the numbers of a run go: `metrics.csv` in its folder, and W&B."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only

from lightning_softprompt.system.atomic_files import write_file
from lightning_softprompt.system.hosts import wandb as wandb_host

if TYPE_CHECKING:
    from wandb import Run

log = logging.getLogger(__name__)
Summary = Sequence[tuple[str, Literal["min", "max"]]]

STEP = "trainer/global_step"
CACHES = {  # where W&B keeps files of all runs on Linux, by the variable that names another place
    "WANDB_CACHE_DIR": "~/.cache/wandb",
    "WANDB_CONFIG_DIR": "~/.config/wandb",
    "WANDB_DATA_DIR": "~/.local/share/wandb",
}
PATIENCE = 10.0  # seconds that a run waits for W&B's server before it goes on offline
LAST_PATIENCE = 300.0  # seconds that it waits at its end, for what is still to be sent; what is not stays on the disk


def make_loggers(
    folder: Path,
    name: str,
    project: str,
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto",
    summary: Summary = (("val/loss", "min"),),
) -> list[MetricsFile | WandbRun]:
    """The loggers of a run. They open their files when the first value comes, not before.

    Args:
        folder: The run's folder, which gets `metrics.csv` and `wandb/`.
        name: The run's name on W&B.
        project: The run's project on W&B.
        wandb: `auto` is what `WANDB_MODE` says, else online where W&B knows an API key, else offline; `online` demands
            a key. An offline run is kept under `folder` and says how to send it.
        summary: Metrics whose best value W&B shows for the run, each with what is best.
    """
    mode = os.environ.get("WANDB_MODE", "auto") if wandb == "auto" else wandb
    if mode == "disabled":
        return [MetricsFile(folder)]
    run = WandbRun(folder, name, project, mode, summary)
    run.refuse_without_key()
    return [MetricsFile(folder), run]


@rank_zero_only
def rank_zero_info(line: str) -> None:
    """Tells the user, once for all processes, by the package's own logger, which nobody mutes."""
    log.info(line)


def is_logging_step(trainer: Trainer, step: int) -> bool:
    """Whether values are logged after optimizer step `step`, the first being 1."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and step > 0 and step % every == 0


def logged_step(trainer: Trainer) -> int:
    """The step that Lightning logs a validation's metrics at: that of the last optimizer step, the first being 0."""
    return max(trainer.global_step - 1, 0)


def metrics_files(trainer: Trainer) -> list[MetricsFile]:
    """Those of the Trainer's loggers that write `metrics.csv`."""
    return [logger for logger in trainer.loggers if isinstance(logger, MetricsFile)]


def wandb_loggers(trainer: Trainer) -> list[WandbLogger]:
    """Those of the Trainer's loggers that can take tables and histograms."""
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]


class MetricsFile(CSVLogger):
    """Writes `metrics.csv` right into a run's folder; a resumed run goes on with the file it finds."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, name="", version="")
        self.held = False  # whether nothing is written yet

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """What writes the file."""
        if self.held:
            return cast("ExperimentWriter", DummyLogger().experiment)
        if self._experiment is None:
            self._experiment = _Appending(self.save_dir)
        return cast("ExperimentWriter", self._experiment)

    @rank_zero_only
    def go_on(self, step: int) -> None:
        """Drops the rows of an optimizer step and of those after it, the first being 0: they come again."""
        path = Path(self.save_dir, ExperimentWriter.NAME_METRICS_FILE)
        if path.is_file():
            keys, rows = _read(path)
            _write(path, keys, [row for row in rows if int(row["step"]) < step])


class _Appending(ExperimentWriter):
    """Lightning's writer, kept from deleting the metrics that it finds, and from losing them where it is killed."""

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
    """The columns of a table, and its rows, without a last one that broke off."""
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    reader = csv.DictReader(StringIO(f"{whole}\n" if whole else ""))
    return list(reader.fieldnames or []), list(reader)


def _write(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
    """The table, or no file where it is empty."""
    if not rows:
        path.unlink()
        return
    table = StringIO(newline="")
    writer = csv.DictWriter(table, fieldnames=columns)
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, table.getvalue().encode())


class WandbRun(WandbLogger):
    """A W&B run that never asks, and never ends a training because the server is out of reach.

    Args:
        folder: The run's folder, which gets `wandb/`.
        name: The run's name.
        project: The run's project.
        mode: As for `make_loggers`, or what `WANDB_MODE` may say.
        summary: Metrics whose best value is shown for the run, each with what is best.
    """

    def __init__(self, folder: Path, name: str, project: str, mode: str, summary: Summary) -> None:
        super().__init__(name=name, project=project, save_dir=folder, log_model=False)
        self._mode = mode
        self._summary = summary
        self._lost = False  # whether W&B takes nothing more
        self.held = False  # whether the run does not start yet

    @property
    @rank_zero_experiment
    def experiment(self) -> Run:
        """The run, started when it is first asked for."""
        if self.held:
            return cast("Run", DummyLogger().experiment)
        if self._experiment is None:
            self._experiment = run = self._start()
            self._define_metrics(run)
        return cast("Run", self._experiment)

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Adds to the run's config, once it has started."""
        if not self.held:
            super().log_hyperparams(params)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:  # type: ignore[override]
        """Logs, or tells once that W&B takes nothing more: no training ends for that."""
        if self._lost:
            return
        _ = self.experiment
        try:
            super().log_metrics(metrics, step)
        except Exception as error:  # whatever its own process, or the way to it, died of
            self._lost = True
            log.warning("W&B takes nothing more (%r): the run goes on without it, and metrics.csv has all", error)

    def refuse_without_key(self) -> None:
        """Refuses a run that must be online where W&B knows no API key.

        Raises:
            ValueError: With what W&B lacks.
        """
        if self._mode in ("auto", "offline", "dryrun") or "WANDB_MODE" in os.environ:
            return
        if problem := no_credentials():
            raise ValueError(
                f"W&B was to run {self._mode}, but {problem}; run `wandb login`, or choose auto or offline"
            )

    def _start(self) -> Run:
        if self._mode in ("offline", "dryrun"):
            return self._start_offline("as asked")
        if problem := no_credentials():
            return self._start_offline(problem)
        host = wandb_host()
        if host.state() == "not reachable":  # asked for 2 seconds; W&B itself would wait far longer
            return self._start_offline(f"{host.url} is not reachable")
        return self._start_online()

    def _start_online(self) -> Run:
        import wandb

        try:
            # quiet: W&B would look up the account's name to greet it, another wait where there is no network
            run = self._init(mode="online", init_timeout=PATIENCE, finish_timeout=LAST_PATIENCE, quiet=True)
        except (wandb.Error, TimeoutError) as error:
            return self._start_offline(str(error).partition("\n")[0])
        rank_zero_info(f"W&B: {run.url}")
        return run

    def _start_offline(self, reason: str) -> Run:
        run = self._init(mode="offline", silent=True)
        rank_zero_info(f"W&B is offline ({reason}). To send this run later: wandb sync {run.settings.sync_dir}")
        return run

    def _init(self, mode: Literal["online", "offline"], **settings: Any) -> Run:
        import wandb

        # W&B quietly writes to the temporary folder where this one is missing
        Path(self._wandb_init["dir"]).mkdir(parents=True, exist_ok=True)
        _keep_caches_in(Path(self._wandb_init["dir"], "wandb"))
        # a second training in this process is a second run, not more points of the first: the first is finished
        options = {name: value for name, value in self._wandb_init.items() if value is not None}
        return wandb.init(**options, mode=mode, settings=wandb.Settings(reinit="finish_previous", **settings))

    def _define_metrics(self, run: Run) -> None:
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP, step_sync=True)
        for name, best in self._summary:  # a definition of its own takes a metric out of "*": its axis is said again
            run.define_metric(name, step_metric=STEP, step_sync=True, summary=best)


def _keep_caches_in(folder: Path) -> None:
    """Gives W&B folders of its own below a run's, where it cannot write to those in the home folder.

    It stages tables and images there; without them it would lose them, and write its log to the terminal.
    """
    for variable, default in CACHES.items():
        usual = Path(default).expanduser()
        try:
            usual.mkdir(parents=True, exist_ok=True)
            is_writable = os.access(usual, os.W_OK)
        except OSError:
            is_writable = False
        if not is_writable:
            os.environ.setdefault(variable, str(folder / usual.parent.name))


def no_credentials() -> str | None:
    """Why W&B cannot log in, or None where it can try to. Neither asks the user nor the network."""
    from wandb.errors import AuthenticationError
    from wandb.sdk import wandb_setup
    from wandb.sdk.lib import wbauth

    settings = wandb_setup.singleton().settings
    host = wbauth.HostUrl(settings.base_url, app_url=settings.app_url)
    try:
        found = wbauth.authenticate_session(host=host, source="", prompt=False, verify=False, update_session=False)
    except AuthenticationError as error:
        return str(error)
    return None if found else "no API key is configured"
