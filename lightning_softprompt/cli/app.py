"""The run commands: `fit`, `validate`, `test` and `predict`, put together from one config a noun by LightningCLI."""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
import warnings
from argparse import HelpFormatter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning
import rich
import yaml
from jsonargparse import Namespace, strip_meta
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningCLI
from torch import distributed

from lightning_softprompt.backbones.requirements import require_of_copy
from lightning_softprompt.callbacks.algorithms.warm_start import WarmStart
from lightning_softprompt.callbacks.recovery.final_checkpoint import lacks_metric
from lightning_softprompt.callbacks.recovery.process_watch import LOST, lost_connection
from lightning_softprompt.callbacks.recovery.run_settings import RunSettings
from lightning_softprompt.callbacks.reporting.record_lines import ReaderGoneError
from lightning_softprompt.checkpoints.atomic_io import AtomicCheckpointIO
from lightning_softprompt.checkpoints.hyperparameters import to_plain
from lightning_softprompt.checkpoints.prompt_file import SEED, load_checkpoint, read_prompt
from lightning_softprompt.checkpoints.registry import resolve_class_paths
from lightning_softprompt.checkpoints.run_settings import SETTINGS, refuse_changes, refuse_incomplete
from lightning_softprompt.cli.commands import TRACEBACK_HINT, TRACEBACK_VARIABLE
from lightning_softprompt.cli.parser import Parser, why_not_made
from lightning_softprompt.cli.plugins import import_plugins
from lightning_softprompt.cli.run_config import config_beside, read_run_config
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.data.datamodule import SoftPromptDataModule
from lightning_softprompt.data.saved_classes import fill_classes, lacks_classes
from lightning_softprompt.distributed.strategy import refuse_untested_strategy
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.runs.run_checks import refuse_callbacks, refuse_options
from lightning_softprompt.runs.run_settings import CommandSettings
from lightning_softprompt.runs.run_spec import RunSpec
from lightning_softprompt.system.atomic_files import expand_home
from lightning_softprompt.system.plain_yaml import read_yaml
from lightning_softprompt.system.printable import PrintableFormatter, one_line, printable
from lightning_softprompt.system.trust import parse_trust_options, trust_modules
from lightning_softprompt.training.monitors import (
    refuse_monitor,
    refuse_monitors,
    refuse_unvalidated,
    validation_metrics,
    watched,
)
from lightning_softprompt.training.replicas import Replicas, ReplicaSpec
from lightning_softprompt.training.session import Session
from lightning_softprompt.training.trainer import NOISE, TRAINER_DEFAULTS

log = logging.getLogger(__name__)
Refuses = Callable[[Mapping[str, Any]], None]
TELLS_USERS = (str(Path(__file__).parents[1]), str(Path(lightning.__file__).parent))  # whose errors are meant for users
FOR_USERS = (ValueError, RuntimeError, MisconfigurationException)
COMPILER = ("torch._dynamo", "torch._inductor")  # modules whose errors a machine without a working compiler raises
CHATTER = (
    "`Trainer(limit_",  # the data module says what is scored
    "Loading `train_dataloader` to estimate",
    "GPU available",
    "TPU available",
    "💡",
    "`weights_only` was not set",
    "You are using",
)
FORMAT_WARNING = warnings.formatwarning  # Lightning's, which is imported above
LAUNCHED = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what Lightning's launcher sets
OF_SOME_COMMANDS = ("verbose", "return_predictions")  # options that a config of the run can do without
PLAIN_TEXT = {"markup": False, "emoji": False}  # names of metrics in tables are no markup


class SoftPromptCLI(LightningCLI):
    """LightningCLI with one backbone for model and data, a folder for each run, and no option that loses silently."""

    _resumed: Refuses | None = None  # settings that differ from those of the checkpoint
    _same: Path | None = None  # the folder of the run that `--ckpt_path last` goes on with

    def add_arguments_to_parser(self, parser: Parser) -> None:  # type: ignore[override]
        """Adds what no single class owns, and the links: backbone to both sides, classes and scoring to the model."""
        parser.add_argument("--backbone", type=BackboneSpec, default=BackboneSpec(), help="The frozen language model.")
        parser.add_argument("--run", type=RunSpec, default=RunSpec(), help="Where the run leaves its files.")
        parser.add_argument(
            "--replicas",
            type=int | ReplicaSpec,
            default=1,
            help="Trains so many prompts on the same batches, each as if alone; a mapping says how they differ.",
        )
        parser.add_argument(
            "--init_from",
            type=str | None,
            default=None,
            help="Starts from the prompt in this prompt.safetensors or checkpoint; all else begins anew.",
        )
        parser.add_argument(
            "--trust",
            metavar="MODULE",
            type=str | None,
            default=None,
            help="Checkpoints, prompts and the configs beside them may name classes of this module too; may be given "
            "several times.",
        )
        parser.link_arguments("backbone", "model.init_args.backbone")
        parser.link_arguments("backbone", "data.init_args.backbone")
        parser.link_arguments("data.classes", "model.init_args.classes", apply_on="instantiate")
        parser.link_arguments("data.classes_by_task", "model.init_args.classes_by_task", apply_on="instantiate")
        parser.link_arguments("data.evaluation", "model.init_args.evaluation", apply_on="instantiate")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> Parser:
        """Makes safe loading of checkpoints the default, and of predictions that they are written, not kept."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        written = {"return_predictions": False} if subcommand == "predict" else {}
        parser.set_defaults({"weights_only": True, **written})
        return parser  # type: ignore[return-value]

    def parse_arguments(self, parser: Parser, args: Sequence[str]) -> None:  # type: ignore[override]
        """Parses what `main` was given; the process's own arguments are never looked at."""
        Parser.words = tuple(args)
        _check_configs(args)
        self.config = parser.parse_args(list(args))

    def _parse_ckpt_path(self) -> None:
        """Leaves the config as it was given; Lightning would let the checkpoint's values beat the command line's."""

    def before_instantiate_classes(self) -> None:
        """Refuses options that contradict each other or the checkpoint."""
        config = self.config if self.subcommand is None else self.run_config
        if empty := [option for option in ("ckpt_path", "init_from") if config.get(option) == ""]:
            raise ValueError(f"--{empty[0]} is empty; give a file, or leave the option out")
        if config.get("ckpt_path") == "last":
            self._find_last(config)
        if self.subcommand != "fit":
            take_saved_classes(config)
        if not config.get("ckpt_path"):
            return
        if config.get("init_from"):
            raise ValueError("--ckpt_path continues a run and --init_from starts a new one; give one of them")
        training = self.subcommand == "fit"
        seed = config.seed_everything if training else None
        given = strip_meta(config.model)  # without the names of the files that it was read from
        model = {**to_plain(given.as_dict()), "replicas": replica_spec(config.replicas).count}
        path = Path(config.ckpt_path)
        checkpoint = self._load_checkpoint(path, training)
        refuse_contradiction(model, checkpoint, path, training, seed)
        if training:
            self._resumed = self._comparison(checkpoint, path, RunSpec(**config.run.as_dict()))

    @staticmethod
    def _load_checkpoint(path: Path, training: bool) -> dict[str, Any]:
        """A checkpoint, refused where it lacks what the command needs."""
        if path.suffix == ".safetensors":
            raise ValueError(
                f"{path} is a prompt, not a checkpoint: it holds no state of a training. Give it as --init_from {path}"
            )
        checkpoint = load_checkpoint(path)
        if training:
            refuse_incomplete(checkpoint, path)
        return checkpoint

    @staticmethod
    def _comparison(checkpoint: Mapping[str, Any], path: Path, run: RunSpec) -> Refuses | None:
        """Refuses settings that differ from those of a checkpoint; None where it has none."""
        if SETTINGS in checkpoint:
            return partial(refuse_changes, checkpoint[SETTINGS], accepted=run.accepted_changes, path=path)
        log.warning(
            "%s was written by an earlier version, which kept no digests of data and settings: whether they are those "
            "of its run is not checked", path,
        )  # fmt: skip
        return None

    def _find_last(self, config: Namespace) -> None:
        """Puts the checkpoint that was written last in the place of `last`; a training without one begins anew."""
        run = RunSpec(**config.run.as_dict())
        found = run.last_checkpoint()
        if found is None and self.subcommand != "fit":
            raise ValueError(f"--ckpt_path last: no run in {run.experiment_folder} has a checkpoint yet")
        told = "no checkpoint yet, so a new run begins" if found is None else str(found)
        log.info("--ckpt_path last, in %s: %s", run.experiment_folder, told)
        config.ckpt_path = None if found is None else str(found)
        if found is not None and config.get("init_from"):
            log.info("--init_from is where it began; it goes on from its own checkpoint")
            config.init_from = None
        self._same = None if found is None or self.subcommand != "fit" else found.parents[1]

    @property
    def run_config(self) -> Namespace:
        """The values of the command."""
        return self.config[self.subcommand]  # type: ignore[no-any-return]

    def _refuse_what_cannot_run(self) -> None:
        """Refuses options of Trainer, callbacks, optimizer and schedule before a run is made."""
        made = self.config_init[self.subcommand]
        callbacks = _listed(made.trainer.callbacks)
        refuse_options(str(self.subcommand), made.trainer.as_dict())
        refuse_callbacks(callbacks)
        if self.subcommand != "fit":
            return
        names = self.model.names if isinstance(self.model, Replicas) else ()
        known = validation_metrics(self.datamodule.evaluation, names)
        refuse_monitors(callbacks, known)
        plateau = self.model.watched_by_schedule()
        if made.trainer.limit_val_batches == 0:
            refuse_unvalidated(callbacks, plateau)
        if plateau is not None:
            refuse_monitor("--model.scheduler.monitor", plateau, known)
        if made.run.monitor is not None:
            refuse_monitor("--run.monitor", watched(made.run, self.datamodule.evaluation)[0], known)

    def _check_backbone(self) -> None:
        """Refuses a backbone that the method or the evaluation cannot use."""
        self.model.check_backbone()
        evaluation = self.datamodule.evaluation
        require_of_copy(evaluation.requires, type(evaluation).__name__, self.model.spec)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A Trainer with the run's loggers and callbacks beside those of the config."""
        if self.subcommand is None:
            return super().instantiate_trainer(**kwargs)
        self._check_backbone()  # before a run leaves anything on disk
        replicas = replica_spec(self.config_init[self.subcommand].replicas)
        if replicas.count > 1:
            self.model = Replicas(self.model, replicas)
        self._refuse_what_cannot_run()
        if self.run_config.trainer.fast_dev_run:
            warm = [] if self.run_config.init_from is None else [WarmStart(Path(self.run_config.init_from))]
            return super().instantiate_trainer(callbacks=warm, **kwargs)
        config, made = self.run_config, self.config_init[self.subcommand]
        trainer, given = made.trainer, _listed(made.trainer.callbacks)
        parser = self._parser(self.subcommand)
        dumped = parser.dump(config)
        settings = CommandSettings(yaml.safe_load(dumped), self.datamodule, str(self.subcommand))
        if self._resumed is not None:
            self._resumed(settings.of_config if settings.prepares else settings.kept)
        checked = RunSettings(settings, self._resumed if settings.prepares else None)
        resumed = None if config.get("ckpt_path") is None else Path(config.ckpt_path)
        self.session = Session(
            made.run, str(self.subcommand), self.model, self.datamodule, checked, self._same, resumed
        )
        save = partial(parser.save, _reusable(config), skip_none=False, overwrite=True, multifile=False)
        if self.session.prints:
            kwargs["enable_progress_bar"] = False  # standard output is for the predictions
        elif trainer.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in given):
            given.append(RichProgressBar(console_kwargs=PLAIN_TEXT))
        start = self.session.starting(save, dumped)
        callbacks = [start, *given, *self.session.callbacks(config.init_from, config.get("ckpt_path"), dumped)]
        loggers = [*_listed(trainer.logger), *self.session.loggers]
        trainer_made = super().instantiate_trainer(callbacks=callbacks, logger=loggers, **kwargs)
        refuse_untested_strategy(trainer_made.strategy)
        if type(trainer_made.strategy.checkpoint_io) is TorchCheckpointIO:  # none was asked for
            trainer_made.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer_made

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs the command; a training that ends for want of a monitored metric leaves its prompt all the same."""
        try:
            super()._run_subcommand(subcommand)
        except Exception as error:
            if subcommand == "fit" and hasattr(self, "session") and lacks_metric(error):
                self.session.conclude()
            raise

    def after_fit(self) -> None:
        """Leaves the best prompt as a file of its own."""
        if hasattr(self, "session"):
            self.session.conclude()


def _reusable(config: Namespace) -> Namespace:
    """The config without how this run started: another run that starts from it is another run, of any command."""
    kept = config.clone()
    kept.ckpt_path = kept.init_from = kept.run.name = kept.run.accept_changes = None
    for name in OF_SOME_COMMANDS:
        kept.pop(name, None)
    return kept


def _check_configs(argv: Sequence[str]) -> None:
    """Refuses a config that cannot be read, by its name.

    Raises:
        ValueError: Naming the file.
    """
    for flag, value in pairwise(word for arg in argv for word in arg.split("=", 1)):
        is_config = flag in ("-c", "--config") and "\n" not in value and len(value) < 1000 and Path(value).is_file()
        if is_config and not isinstance(read_yaml(Path(value)), Mapping):
            raise ValueError(f"{value} holds no settings; a config has values by option")


def replica_spec(given: Any) -> ReplicaSpec:
    """How many prompts are trained, and how they differ, from a number or a mapping."""
    if isinstance(given, Namespace):
        return ReplicaSpec(**{**given.as_dict(), "inits": None if given.inits is None else list(given.inits)})
    return given if isinstance(given, ReplicaSpec) else ReplicaSpec(given)


def take_saved_classes(config: Namespace) -> None:
    """Gives data that names no classes those of the checkpoint or prompt, so that no training rows are read for them.

    Raises:
        ValueError: If the file cannot be read.
    """
    path = config.get("ckpt_path") or config.get("init_from")
    if path and lacks_classes(config.data, classes_option):
        fill_classes(config.data, read_prompt(Path(path)).method, classes_option)


def classes_option(class_path: str) -> str | None:
    """The argument of a data module that names its classes, if they can be inferred."""
    module, _, name = class_path.rpartition(".")  # parsing has imported it
    return getattr(getattr(sys.modules.get(module), name, None), "classes_option", None)


def refuse_contradiction(
    model: dict[str, Any], checkpoint: Mapping[str, Any], path: Path, training: bool, seed: int | None = None
) -> None:
    """Refuses a checkpoint whose method or arguments are not those of the command.

    Args:
        model: Class path and arguments of the command.
        checkpoint: What is to be resumed or tested.
        path: Its file, for messages.
        training: Whether training goes on, so that optimizer and objective count too.
        seed: The command's, where random numbers go on.

    Raises:
        ValueError: Naming what differs.
    """
    saved = {"replicas": 1, **checkpoint.get("hyper_parameters", {}), "seed_everything": checkpoint.get(SEED, seed)}
    arguments = {"replicas": model.get("replicas", 1), **model.get("init_args", {})}
    given = {"_class_path": model["class_path"], **arguments, "seed_everything": seed}
    saved, given = resolve_class_paths(to_plain(saved)), resolve_class_paths(to_plain(given))
    skip = (
        set() if training else {"seed_everything", "optimizer", "scheduler", "objective", "penalty_weights", "readout"}
    )
    skip |= {
        "_instantiator",
        "classes",
        "classes_by_task",
        "evaluation",
        "backbone",
    }  # the data's; the backbone goes by its fingerprint
    differ = [k for k in sorted({*saved, *given} - skip) if saved.get(k) != given.get(k)]
    if differ:
        lines = ", ".join(f"{k.removeprefix('_')} was {saved.get(k)!r} and is {given.get(k)!r}" for k in differ)
        raise ValueError(
            f"{path} does not fit the command: {lines}. Give the options of its run (--config config.yaml of its "
            f"folder), or start a new run from its prompt with --init_from"
        )


def refuse_linked(argv: Sequence[str]) -> None:
    """Refuses options that would be overwritten by what they are linked to.

    Raises:
        ValueError: Naming the option and the one to give instead.
    """
    for word in argv:
        if found := re.match(r"--(model|data)\.(?:init_args\.)?(backbone|classes|classes_by_task|evaluation)\b", word):
            noun = "backbone" if found[2] == "backbone" else "data"
            raise ValueError(f"{word.partition('=')[0]} comes from --{noun}, which model and data share; set it there")


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [] if value in (None, False, True) else [value]


def with_run_config(argv: Sequence[str]) -> list[str]:
    """Takes settings from the config of a checkpoint's own run if the command names no config and no model."""
    words = [word for arg in argv for word in arg.split("=", 1)]
    if {"-c", "--config", "--model"} & set(words):
        return list(argv)
    for flag, given in pairwise(words):
        if flag not in ("--ckpt_path", "--init_from"):
            continue
        value = _last_of(words) if flag == "--ckpt_path" and given == "last" else given
        if value is None:
            continue
        if found := config_beside(Path(value)):
            return [argv[0], "--config", _settings_of(found, argv[0]), *argv[1:]]
        if not Path(value).exists():
            raise ValueError(f"{flag}: there is no file {value}")
    return list(argv)


def _last_of(words: Sequence[str]) -> str | None:
    """The checkpoint that `last` means by the options of the run in the command; None where there is none yet."""
    options = {flag: value for flag, value in pairwise(words) if flag.startswith("--run.")}
    places = ("folder", "experiment", "name")
    given: dict[str, Any] = {name: options[f"--run.{name}"] for name in places if f"--run.{name}" in options}
    found = RunSpec(**given).last_checkpoint()
    return None if found is None else str(found)


def _settings_of(path: Path, command: str) -> str:
    """What a command takes from the config of a checkpoint's run.

    Raises:
        ValueError: If the config names classes that it may not name, and the command trains.
    """
    found = read_run_config(path)
    if found.left_out and command == "fit":
        raise ValueError(
            f"{path}, the config of the checkpoint's run, is not taken: {'; '.join(found.left_out.values())}. To take "
            f"it as it is, name it: --config {path}"
        )
    without = f", without its {' and '.join(found.left_out)}" if found.left_out else ""
    log.info("taking %s from %s%s", ", ".join(found.values), path, without)
    return found.text


def make_cli(argv: Sequence[str], cli: type[SoftPromptCLI] = SoftPromptCLI, run: bool = True) -> SoftPromptCLI:
    """The command line of the run commands, which runs what `argv` says."""
    import_plugins()
    names = SoftPromptCLI.subcommands()
    return cli(
        SoftPromptModule,
        SoftPromptDataModule,
        parser_class=Parser,
        parser_kwargs={"prog": "softprompt", **{name: {"prog": f"softprompt {name}"} for name in names}},
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=None,
        seed_everything_default=42,
        trainer_defaults=TRAINER_DEFAULTS,
        args=list(argv),
        run=run,
    )


class CompletionCLI(SoftPromptCLI):
    """Builds the parsers of the run commands, and stops with their completion script before anything is parsed."""

    def parse_arguments(self, parser: Parser, args: Sequence[str]) -> None:  # type: ignore[override]
        """Raises `CompletionScript` for the shell that is the only argument."""
        for each in (parser, *self._subcommand_parsers.values()):
            each.formatter_class = HelpFormatter  # jsonargparse's own needs values that are parsed
        raise CompletionScript(parser.get_completion_script(f"shtab-{args[0]}"))


class CompletionScript(Exception):  # noqa: N818 (no error: it carries the script out of the constructor)
    """A completion script, as its only argument."""


def completion(shell: str) -> str:
    """The completion script of the run commands for `bash` or `zsh`."""
    try:
        make_cli([shell], CompletionCLI)
    except CompletionScript as script:
        return str(script)
    raise AssertionError("CompletionCLI stops before anything runs")


def main(argv: Sequence[str]) -> int:
    """Runs a command; gives its exit code. A user's mistake is told in two lines, without a traceback."""
    quiet()
    argv = expand_home(argv)
    given = list(argv)
    try:
        modules, argv = parse_trust_options(argv)
        refuse_linked(argv)
        with trust_modules(modules), command_line(given):
            make_cli(with_run_config(argv))
    except ReaderGoneError:
        return 0
    except Exception as error:  # libraries raise errors of all kinds for the value of an option
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        lost = lost_connection(error) if isinstance(error, RuntimeError) else None
        sys.stderr.write(f"error: {lost or _reason(error)}\n{TRACEBACK_HINT}\n")
        return 2 if lost is None else LOST
    return 0


@contextmanager
def command_line(argv: Sequence[str]) -> Iterator[None]:
    """Within it the process's own arguments are those of a run command; later commands start as if it had not run.

    Lightning starts further processes by the arguments; those are to run this command, and not one that runs it among
    others. It leaves its variables and its process group behind, by which the next command would start none.
    """
    arguments, variables = sys.argv, {name: os.environ.get(name) for name in LAUNCHED}
    sys.argv = [*arguments[:1], *argv]
    try:
        yield
        if distributed.is_available() and distributed.is_initialized() and variables["LOCAL_RANK"] is None:
            distributed.destroy_process_group()
    finally:
        sys.argv = arguments
        for name, value in variables.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})


def _reason(error: Exception) -> str:
    """What a user reads of an error, in one line: a message for users, else what happened and where."""
    ours = next((e for e in _chain(error) if isinstance(e, FOR_USERS) and _ours(e)), None)
    if ours is not None or isinstance(error, (OSError, ImportError, MisconfigurationException)):
        return one_line(ours or error)
    if reason := why_not_made(str(error)):
        return one_line(reason)
    if type(error).__module__.startswith(COMPILER):
        told = " ".join(str(error).splitlines()[:2])
        return one_line(f"--backbone.compiled: PyTorch cannot compile the layers here ({told}); set it to false")
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = last.filename.rpartition("site-packages/")[2]
    return f"{type(error).__name__} at {place}:{last.lineno}: {one_line(error)}"


def quiet() -> None:
    """Shows what the package says, and leaves out what the libraries say of how they are used here."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PrintableFormatter("%(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("lightning_softprompt").setLevel(logging.INFO)
    for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.pytorch.{name}").addFilter(_tells)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # an unreachable hub is told once, by us
    warnings.formatwarning = _printable_warning
    rich.reconfigure(**PLAIN_TEXT)
    for noise in NOISE:
        warnings.filterwarnings("ignore", message=noise)


def _printable_warning(*given: Any, **options: Any) -> str:
    """A warning as printable text: its message may quote names from files."""
    return printable(FORMAT_WARNING(*given, **options))


def _tells(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(CHATTER)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came of; jsonargparse wraps those of constructors."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _ours(error: BaseException) -> bool:
    """Whether an error's message is meant for the user."""
    return traceback.extract_tb(error.__traceback__)[-1].filename.startswith(TELLS_USERS)
