"""The run commands `fit`, `validate`, `test` and `predict`: a LightningCLI with one config per component."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace, strip_meta
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningCLI

from lightning_softprompt.callbacks.algorithms.warm_start import WarmStart
from lightning_softprompt.callbacks.recovery.final_checkpoint import lacks_metric
from lightning_softprompt.callbacks.recovery.process_watch import LOST, describe_lost_connection
from lightning_softprompt.callbacks.recovery.run_settings import RunSettings
from lightning_softprompt.callbacks.reporting.progress_bar import StepProgressBar
from lightning_softprompt.callbacks.reporting.record_lines import ReaderGoneError
from lightning_softprompt.checkpoints.atomic_io import AtomicCheckpointIO
from lightning_softprompt.checkpoints.hyperparameters import to_plain
from lightning_softprompt.cli.commands import TRACEBACK_HINT, TRACEBACK_VARIABLE
from lightning_softprompt.cli.errors import PLAIN_TEXT, configure_output, describe_error, is_restore_error
from lightning_softprompt.cli.next_steps import command_line, suggest
from lightning_softprompt.cli.option_checks import (
    as_list,
    check_backbone,
    check_options,
    refuse_linked,
    refuse_unreadable_configs,
    replica_spec,
    unescape_templates,
)
from lightning_softprompt.cli.parsing.config_changes import complete_length, reusable_config, use_last_checkpoint
from lightning_softprompt.cli.parsing.parser import Parser, set_run_folder
from lightning_softprompt.cli.parsing.shared_options import add_shared_options, set_command_defaults
from lightning_softprompt.cli.plugins import import_plugins
from lightning_softprompt.cli.resume_checks import (
    SettingsCheck,
    evaluate_prompt_file,
    load_checked_checkpoint,
    refuse_contradiction,
    settings_check,
    take_saved_classes,
    with_run_config,
)
from lightning_softprompt.cli.run_hints import commands_after_evaluation, commands_after_fit
from lightning_softprompt.data.datamodule import SoftPromptDataModule
from lightning_softprompt.distributed.process_arguments import set_process_arguments
from lightning_softprompt.distributed.strategy import refuse_untested_strategy
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.renamed_options import rename_words
from lightning_softprompt.runs.loggers import rank_zero_info
from lightning_softprompt.runs.run_settings import CommandSettings
from lightning_softprompt.runs.run_spec import RunSpec, new_name
from lightning_softprompt.system.atomic_files import expand_home
from lightning_softprompt.system.trust import parse_trust_options, trust_modules
from lightning_softprompt.training.lr_range_test import CURVE, find_lr
from lightning_softprompt.training.monitors import choose_monitor
from lightning_softprompt.training.precision import keep_batches
from lightning_softprompt.training.replicas import Replicas
from lightning_softprompt.training.session import Session
from lightning_softprompt.training.trainer import TRAINER_DEFAULTS


class SoftPromptCLI(LightningCLI):
    """LightningCLI with one backbone for model and data, a folder per run, and no silently overridden option."""

    _settings_check: SettingsCheck | None = None  # refuses settings that differ from those of the checkpoint
    _resumed_folder: Path | None = None  # folder of the run that `--ckpt_path last` resumes

    def add_arguments_to_parser(self, parser: Parser) -> None:  # type: ignore[override]
        """Add the options that several classes share, and links: backbone to model and data, classes to the model."""
        add_shared_options(parser)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> Parser:
        """Load checkpoints safely by default, and write predictions instead of returning them."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        set_command_defaults(parser, subcommand)
        return parser  # type: ignore[return-value]

    def parse_arguments(self, parser: Parser, args: Sequence[str]) -> None:  # type: ignore[override]
        """Parse the arguments of `main`, never those of the process."""
        Parser.words = tuple(args)
        refuse_unreadable_configs(args)
        self.config = parser.parse_args(list(args))

    def _parse_ckpt_path(self) -> None:
        """Keep the config: Lightning would override the command line with the checkpoint's values."""

    def before_instantiate_classes(self) -> None:
        """Refuse options that contradict each other or the checkpoint."""
        config = self.config if self.subcommand is None else self.run_config
        if empty := [option for option in ("ckpt_path", "init_from") if config.get(option) == ""]:
            raise ValueError(f"--{empty[0]} is empty; pass a file, or omit the option")
        if config.get("ckpt_path") == "last":
            self._resumed_folder = use_last_checkpoint(config, self.subcommand == "fit")
        if self.subcommand == "fit":
            complete_length(config)
        else:
            evaluate_prompt_file(config)
            take_saved_classes(config)
        if not config.get("ckpt_path"):
            return
        if config.get("init_from"):
            raise ValueError("--ckpt_path resumes a run and --init_from starts a new one; use one of them")
        training = self.subcommand == "fit"
        seed = config.seed_everything if training else None
        arguments = strip_meta(config.model).as_dict()  # without the names of the files that it was read from
        model = {**to_plain(arguments), "replicas": replica_spec(config.replicas).count}
        path = Path(config.ckpt_path)
        checkpoint = load_checked_checkpoint(path, training)
        refuse_contradiction(model, checkpoint, path, training, seed)
        if training:
            self._settings_check = settings_check(checkpoint, path, RunSpec(**config.run.as_dict()))

    @property
    def run_config(self) -> Namespace:
        """The values of the command."""
        return self.config[self.subcommand]  # type: ignore[no-any-return]

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Create a Trainer with the run's loggers and callbacks in addition to those of the config."""
        if self.subcommand is None:
            return super().instantiate_trainer(**kwargs)
        check_backbone(self.model, self.datamodule)  # before the run writes anything
        config, objects = self.run_config, self.config_init[self.subcommand]
        replicas = replica_spec(objects.replicas)
        if replicas.count > 1:
            self.model = Replicas(self.model, replicas)
        check_options(self.subcommand, objects, self.model, self.datamodule)
        if config.trainer.fast_dev_run:
            warm_start = [] if config.init_from is None else [WarmStart(Path(config.init_from))]
            return super().instantiate_trainer(callbacks=warm_start, **kwargs)
        if config.get("find_lr"):
            objects.run.experiment_folder.mkdir(parents=True, exist_ok=True)  # for the checkpoint of the tuner
            kwargs |= {"logger": False, "enable_checkpointing": False}
            return super().instantiate_trainer(default_root_dir=objects.run.experiment_folder, **kwargs)
        text = self._parser(self.subcommand).dump(config)
        self.session = self._create_session(objects.run, text)
        callbacks = as_list(objects.trainer.callbacks)
        if self.session.prints:
            kwargs["enable_progress_bar"] = False  # standard output is for the predictions
        elif objects.trainer.enable_progress_bar is not False and not _has_progress_bar(callbacks):
            callbacks.append(StepProgressBar(self.session.monitor, PLAIN_TEXT))
        start = self.session.create_start(self._config_writer(), text)
        of_session = self.session.callbacks(config.init_from, config.get("ckpt_path"), text)
        loggers = [*set_run_folder(as_list(objects.trainer.logger), self.session.folder), *self.session.loggers]
        trainer = super().instantiate_trainer(callbacks=[start, *callbacks, *of_session], logger=loggers, **kwargs)
        refuse_untested_strategy(trainer.strategy)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # the config names no other
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        keep_batches(trainer.strategy)
        return trainer

    def _create_session(self, run: RunSpec, text: str) -> Session:
        """Create the session of the run, after its settings are compared with those of the checkpoint.

        Args:
            run: The options of the run.
            text: The config of the command as YAML.
        """
        command = str(self.subcommand)
        monitor = choose_monitor(run, self.datamodule.evaluation)
        settings = CommandSettings(yaml.safe_load(text), self.datamodule, command, monitor)
        if self._settings_check is not None:
            self._settings_check(settings.of_config if settings.prepares else settings.all_settings)
        later_check = self._settings_check if settings.prepares else None  # the rows do not exist yet
        checkpoint, init_from = self.run_config.get("ckpt_path"), self.run_config.get("init_from")
        return Session(
            run,
            command,
            self.model,
            self.datamodule,
            RunSettings(settings, later_check),
            self._resumed_folder,
            None if checkpoint is None else Path(checkpoint),
            None if init_from is None else Path(init_from),
        )

    def _config_writer(self) -> Callable[[Path], None]:
        """A function that saves the config of the run to a file."""
        parser = self._parser(self.subcommand)
        return partial(parser.save, reusable_config(self.run_config), skip_none=False, overwrite=True, multifile=False)

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the command; a training that stops because a monitored metric is missing still saves its prompt."""
        if self.run_config.get("find_lr"):
            self._find_lr()
            return
        failed = True
        try:
            super()._run_subcommand(subcommand)
            failed = False
        except Exception as error:
            if subcommand == "fit" and hasattr(self, "session") and lacks_metric(error):
                self.session.conclude()
            if is_restore_error(error):
                raise ValueError(
                    f"{self.run_config.ckpt_path} cannot be resumed: it was changed, and its state does not fit the "
                    f"run ({type(error).__name__}: {error})"
                ) from error
            raise
        finally:
            if hasattr(self, "session"):
                self.session.finish(failed)

    def _find_lr(self) -> None:
        """Run the learning-rate range test in place of the training."""
        run = RunSpec(**self.run_config.run.as_dict())
        folder = run.experiment_folder / f"lr_find-{new_name()}"
        rate = find_lr(self.trainer, self.model, self.datamodule, folder)
        rank_zero_info(f"Loss over learning rate: {folder / CURVE}")
        if rate is None:
            rank_zero_info("No suggestion: the loss diverged within a few steps; see the curve")
            return
        rank_zero_info(f"Suggested learning rate, where the loss falls fastest: {rate:.2g}")
        if self.trainer.is_global_zero:
            words = [word for word in Parser.words[1:] if word != "--find_lr"]
            suggest(command_line("fit", *words, "--model.lr", f"{rate:.2g}"))

    def after_fit(self) -> None:
        """Save the best prompt."""
        if hasattr(self, "session"):
            self.session.conclude()

    def suggest_next(self) -> None:
        """Print the commands that use what this one has written, in the first process only."""
        if not hasattr(self, "session") or not self.trainer.is_global_zero:
            return
        if self.subcommand == "fit":
            suggest(*commands_after_fit(self.session, self.datamodule))
        else:
            suggest(*commands_after_evaluation(self.session, self.datamodule, self.run_config))


def _has_progress_bar(callbacks: Sequence[Callback]) -> bool:
    return any(isinstance(callback, ProgressBar) for callback in callbacks)


def _select_command(cli: type[SoftPromptCLI], argv: Sequence[str]) -> type[SoftPromptCLI]:
    """Return the class with only the command in `argv`, because the parser of each command takes 50 ms to create."""
    commands = cli.subcommands()
    if not argv or argv[0] not in commands:
        return cli
    command = {argv[0]: commands[argv[0]]}
    return type(cli.__name__, (cli,), {"subcommands": staticmethod(lambda: command)})


def make_cli(argv: Sequence[str], cli: type[SoftPromptCLI] = SoftPromptCLI, run: bool = True) -> SoftPromptCLI:
    """Create the command line of the run commands, which runs the command in `argv`."""
    import_plugins()
    cli = _select_command(cli, argv)
    names_and_usage = {}
    for name in cli.subcommands():
        command = f"softprompt {name}"
        names_and_usage[name] = {"prog": command, "usage": f"{command} [OPTIONS]"}  # the options are listed below
    return cli(
        SoftPromptModule,
        SoftPromptDataModule,
        parser_class=Parser,
        parser_kwargs={"prog": "softprompt", **names_and_usage},
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=None,
        seed_everything_default=42,
        trainer_defaults=TRAINER_DEFAULTS,
        args=rename_words(argv),
        run=run,
    )


def main(argv: Sequence[str], hints: bool = True) -> int:
    """Run a command and return its exit code. User errors are printed in two lines, without a traceback.

    Args:
        argv: The command and its options.
        hints: Whether to suggest the command to run next.
    """
    configure_output()
    argv = unescape_templates(expand_home(argv))
    words = list(argv)
    try:
        modules, argv = parse_trust_options(argv)
        refuse_linked(argv)
        with trust_modules(modules), set_process_arguments(words):
            cli = make_cli(with_run_config(argv))
            if hints:
                cli.suggest_next()
    except ReaderGoneError:
        return 0
    except Exception as error:  # libraries raise errors of all kinds for the value of an option
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        lost = describe_lost_connection(error) if isinstance(error, RuntimeError) else None
        sys.stderr.write(f"error: {lost or describe_error(error)}\n{TRACEBACK_HINT}\n")
        return 2 if lost is None else LOST
    return 0
