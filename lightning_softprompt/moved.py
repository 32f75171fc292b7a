"""Modules and classes with a new name: files and code that use the old names keep working for one release.

Prompts, checkpoints and configs name classes by their import paths, which `current_names` translates. Importing an old
module returns the new one, with a warning that names it. The command line also accepts the old short names of classes.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

log = logging.getLogger(__name__)
PACKAGE = "lightning_softprompt"
REMOVED_IN = "0.3.0"
MOVED = {  # old module or class: new one, inside the package
    "backbones.base.BackboneSpec": "core.backbone_spec.BackboneSpec",
    "backbones.attention": "backbones.execution.packed_attention",
    "backbones.base.LayerGather": "backbones.frozen_model.LayerGather",
    "backbones.codec": "backbones.tokenization.codec",
    "backbones.contexts": "backbones.execution.context_cache",
    "backbones.control_tokens": "backbones.tokenization.control_tokens",
    "backbones.decoding": "backbones.generation.decoding",
    "backbones.entry": "backbones.insertion.embeddings",
    "backbones.gated": "backbones.kernels.gated_mlp",
    "backbones.generation_choice": "backbones.generation.path_choice",
    "backbones.generation_paths": "backbones.generation.paths",
    "backbones.generation_trial": "backbones.generation.path_trial",
    "backbones.head": "backbones.execution.lm_head",
    "backbones.hollow": "backbones.skeleton",
    "backbones.injection": "backbones.insertion.key_values",
    "backbones.layers": "backbones.insertion.layers",
    "backbones.linear": "backbones.kernels.prepacked_linear",
    "backbones.load": "backbones.loading",
    "backbones.loading.Package": "backbones.location.Package",
    "backbones.narrowing": "backbones.small_copy",
    "backbones.norms": "backbones.kernels.rms_norm",
    "backbones.packing": "backbones.execution.packing",
    "backbones.parts": "backbones.microbatching",
    "backbones.path_trial": "backbones.execution.path_trial",
    "backbones.paths": "backbones.execution.paths",
    "backbones.positions": "backbones.insertion.positions",
    "backbones.precise": "backbones.execution.float32_reference",
    "backbones.quantized": "backbones.kernels.quantized_linear",
    "backbones.ranks": "distributed.sharding",
    "backbones.refusals": "core.refusals",
    "backbones.rows": "backbones.execution.row_batch",
    "backbones.rowwise": "backbones.execution.row_check",
    "backbones.seq2seq_generation": "backbones.generation.seq2seq",
    "backbones.splice": "backbones.insertion.splice",
    "backbones.stacks": "backbones.insertion.layer_stacks",
    "backbones.words": "backbones.tokenization.word_alignment",
    "callbacks.best_checkpoint": "callbacks.recovery.best_checkpoint",
    "callbacks.case_page": "reports.html",
    "callbacks.case_report": "callbacks.reporting.case_report",
    "callbacks.consolidation": "callbacks.algorithms.consolidation",
    "callbacks.corruption_probe": "callbacks.algorithms.corruption_probe",
    "callbacks.final_checkpoint": "callbacks.recovery.final_checkpoint",
    "callbacks.halving": "callbacks.recovery.oom_retry",
    "callbacks.loggers": "runs.loggers",
    "callbacks.numeric_guard": "callbacks.recovery.nan_guard",
    "callbacks.predictions": "callbacks.reporting.predictions",
    "callbacks.preemption": "callbacks.recovery.preemption",
    "callbacks.process_watch": "callbacks.recovery.process_watch",
    "callbacks.prompt_watch": "callbacks.reporting.prompt_watch",
    "callbacks.pruning": "callbacks.algorithms.pruning",
    "callbacks.record_lines": "callbacks.reporting.record_lines",
    "callbacks.resume": "callbacks.recovery.resume",
    "callbacks.row_blame": "callbacks.recovery.bad_rows",
    "callbacks.run_files": "callbacks.reporting.run_files",
    "callbacks.run_settings": "callbacks.recovery.run_settings",
    "callbacks.run_start": "callbacks.recovery.run_start",
    "callbacks.throughput": "callbacks.reporting.throughput",
    "callbacks.unfinished": "system.partial_file",
    "callbacks.warm_start": "callbacks.algorithms.warm_start",
    "checkpoints.building": "checkpoints.safe_loading.arguments",
    "checkpoints.files": "checkpoints.prompt_file",
    "checkpoints.hooks": "checkpoints.state_dict_hooks",
    "checkpoints.plain": "checkpoints.hyperparameters",
    "checkpoints.registry": "checkpoints.safe_loading.registry",
    "checkpoints.restoring": "checkpoints.restore",
    "checkpoints.settings": "checkpoints.run_settings",
    "checkpoints.sizes": "checkpoints.safe_loading.file_limits",
    "checkpoints.whole": "checkpoints.atomic_io",
    "commands.analysis_page": "reports.error_page",
    "commands.analysis_tables": "reports.error_tables",
    "commands": "cli.commands",
    "cli.commands.analyze": "cli.commands.analysis.analyze",
    "commands.analyze": "cli.commands.analysis.analyze",
    "cli.commands.between": "cli.commands.analysis.interpolate",
    "cli.commands.interpolate": "cli.commands.analysis.interpolate",
    "commands.between": "cli.commands.analysis.interpolate",
    "commands.completion": "cli.commands.completion",
    "commands.configs": "cli.commands.configs",
    "commands.doctor": "cli.commands.doctor",
    "commands.fold": "cli.commands.fold",
    "commands.index": "cli.commands.index",
    "cli.commands.library": "cli.commands.prompts",
    "commands.library": "cli.commands.prompts",
    "commands.methods": "cli.commands.methods",
    "commands.parsing": "cli.dry_parse",
    "cli.commands.plan": "cli.commands.estimate",
    "commands.plan": "cli.commands.estimate",
    "commands.reach": "system.hosts",
    "commands.study": "cli.commands.study",
    "commands.sweep": "cli.commands.sweep",
    "commands.table": "reports.text_table",
    "data.batching": "data.sampling.bucketing",
    "data.cache": "data.token_cache",
    "data.corpora": "data.readers.corpora",
    "data.drawn": "rag.epoch_resampling",
    "data.gold": "rag.gold",
    "data.indexing": "rag.index_setup",
    "data.loader_hooks": "data.splits.loader_hooks",
    "data.mixing": "data.sampling.task_mixing",
    "data.movie_sentences": "data.samples.movie_sentences",
    "data.notes": "data.samples.notes",
    "data.passage_rows": "rag.passage_rendering",
    "data.rag_qa": "rag.qa_datamodule",
    "data.relevance": "rag.relevance_datamodule",
    "data.resuming": "data.sampling.resumable",
    "data.row_encoder": "data.splits.row_encoder",
    "data.row_source": "data.splits.row_source",
    "data.showing": "rag.passage_selection",
    "rag.passage_selection.Noise": "rag.passage_selection.PassageNoise",
    "data.sampling.shared_batches.Together": "data.sampling.shared_batches.SharedBatches",
    "data.sampling.task_mixing.Given": "data.sampling.task_mixing.FixedRates",
    "data.sampling.task_mixing.Uniform": "data.sampling.task_mixing.UniformTasks",
    "data.sources": "data.readers.sources",
    "data.text_files": "data.readers.text_files",
    "data.together": "data.sampling.shared_batches",
    "evaluation.analysis": "reports.error_analysis",
    "evaluation.answers": "evaluation.metrics.answers",
    "evaluation.bert_score": "evaluation.metrics.bert_score",
    "evaluation.choices": "evaluation.multiple_choice",
    "evaluation.continual": "evaluation.metrics.continual",
    "evaluation.intervals": "evaluation.metrics.intervals",
    "evaluation.likelihood_changes": "evaluation.metrics.likelihood_changes",
    "evaluation.mistakes": "reports.error_types",
    "evaluation.plots": "evaluation.figures",
    "evaluation.retrieval": "evaluation.metrics.retrieval",
    "evaluation.metrics.sentences": "core.sentences",
    "evaluation.sentences": "core.sentences",
    "evaluation.text_metrics": "evaluation.metrics.text",
    "evaluation.text_rows": "evaluation.metrics.text_rows",
    "evaluation.text_scoring": "evaluation.metrics.text_scorer",
    "folders": "system.atomic_files",
    "lm": "backbones.prompted_lm",
    "measurement": "training.memory_measurement",
    "methods.adept": "methods.input_prompts.adept",
    "methods.attempt": "methods.task_prompts.attempt",
    "methods.Bare": "methods.NoPrompt",
    "methods.bare": "methods.baselines.no_prompt",
    "methods.baselines.no_prompt.Bare": "methods.baselines.no_prompt.NoPrompt",
    "methods.cartridge": "methods.layer_prompts.cartridge",
    "methods.context_aware": "methods.input_prompts.context_aware",
    "methods.dept": "methods.input_prompts.dept",
    "methods.dpt": "methods.input_prompts.dpt",
    "methods.folded": "methods.trained.folded",
    "methods.full_fine_tuning": "methods.baselines.full_fine_tuning",
    "methods.idpg": "methods.row_prompts.idpg",
    "methods.late_prompt_tuning": "methods.layer_prompts.late_prompt_tuning",
    "methods.lora": "methods.baselines.lora",
    "methods.mpt": "methods.task_prompts.mpt",
    "methods.p_tuning": "methods.input_prompts.p_tuning",
    "methods.p_tuning_v2": "methods.layer_prompts.p_tuning_v2",
    "methods.prefix_tuning": "methods.layer_prompts.prefix_tuning",
    "methods.prompt_bank": "methods.trained.prompt_bank",
    "methods.prompt_tuning": "methods.input_prompts.prompt_tuning",
    "methods.pt_moe": "methods.row_prompts.pt_moe",
    "methods.residual_prompt_tuning": "methods.input_prompts.residual_prompt_tuning",
    "methods.smop": "methods.row_prompts.smop",
    "methods.spring": "methods.input_prompts.spring",
    "methods.transprompt": "methods.task_prompts.transprompt",
    "methods.ulpt": "methods.input_prompts.ulpt",
    "methods.xprompt": "methods.input_prompts.xprompt",
    "module": "methods.base",
    "monitors": "training.monitors",
    "optimizers": "methods.optimizers",
    "parser": "cli.parsing.parser",
    "plain_yaml": "system.plain_yaml",
    "planning": "training.memory_plan",
    "printable": "system.printable",
    "prompt_reranker": "rag.prompt_reranker",
    "prompts.anchors": "prompts.cross_model",
    "prompts.attention": "prompts.prompt_attention",
    "prompts.blend": "prompts.from_checkpoints",
    "prompts.context": "prompts.demonstrations",
    "prompts.factors": "prompts.task_factors",
    "prompts.key_values": "prompts.kv_prefix",
    "prompts.mixed": "prompts.merge_rows",
    "prompts.pool": "prompts.pooling",
    "prompts.tasks": "prompts.task_ids",
    "quickstart": "cli.commands.quickstart",
    "rag_quickstart": "cli.rag_quickstart",
    "readouts.auto.Suited": "readouts.auto.AutoReadout",
    "readouts.suited": "readouts.auto",
    "replicas": "training.replicas",
    "retrieval.building": "retrieval.index_builder",
    "retrieval.cache": "retrieval.result_cache",
    "retrieval.chosen": "retrieval.trusted_names",
    "retrieval.cutting": "retrieval.passages.chunking",
    "retrieval.documents": "retrieval.passages.documents",
    "retrieval.encoding": "retrieval.search.encoder",
    "retrieval.extras": "system.optional_packages",
    "retrieval.lexical": "retrieval.search.bm25",
    "retrieval.qdrant": "retrieval.search.qdrant",
    "retrieval.ranking": "retrieval.search.fusion",
    "retrieval.reranking": "retrieval.reranker",
    "retrieval.settings": "retrieval.search.settings",
    "retrieval.texts": "retrieval.passages.text_files",
    "retrieval.unfinished": "retrieval.vector_log",
    "retrieval.vectors": "retrieval.search.vectors",
    "retrieval.words": "retrieval.passages.words",
    "run": "runs.run_spec",
    "run_checks": "runs.run_checks",
    "run_config": "cli.run_config",
    "run_record": "runs.run_record",
    "run_settings": "runs.run_settings",
    "session": "training.session",
    "strategy": "distributed.strategy",
    "studies.reading": "studies.study_file",
    "template": "core.template",
    "training.trainer.RunOutputs": "training.run_outputs.RunOutputs",
    "trust": "system.trust",
    "types": "core.types",
    "word_boundaries": "core.word_boundaries",
}


def current_path(path: str) -> str:
    """The current import path of a class or module.

    Args:
        path: An import path, as a file or a config names it.

    Returns:
        The path with an old module or class name replaced; any other path unchanged.
    """
    package, _, rest = path.partition(".")
    if package != PACKAGE:
        return path
    while (new := _replace_longest(rest)) is not None:  # the module first, then its class
        rest = new
    return f"{PACKAGE}.{rest}"


def _replace_longest(path: str) -> str | None:
    """A path with its longest part that `MOVED` names replaced; None if it names no part."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        old = ".".join(parts[:length])
        if old in MOVED:
            return ".".join([MOVED[old], *parts[length:]])
    return None


def class_renames() -> dict[str, str]:
    """New short names of the classes in `MOVED` by their old ones."""
    names = {}
    for old_path, new_path in MOVED.items():
        old, new = old_path.rpartition(".")[2], new_path.rpartition(".")[2]
        if old[0].isupper() and old != new:
            names[old] = new
    return names


def current_class(name: str) -> str:
    """The current name of a class that a command line or a config names, with a warning if it has changed.

    Args:
        name: A short name, such as `PromptTuning`, or an import path.
    """
    current = current_path(name) if "." in name else class_renames().get(name, name)
    if current != name:
        _warn(name, current)
    return current


@cache
def _warn(old: str, new: str) -> None:
    """Logs one line for each old name."""
    log.warning("%s is now %s; the old name stops working in version %s", old, new, REMOVED_IN)


def current_names(value: Any) -> Any:
    """Plain values from a file, with old class paths among them replaced by the current ones."""
    if isinstance(value, str):
        return current_path(value)
    if isinstance(value, Mapping):
        return {key: current_names(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [current_names(inner) for inner in value]
    return value


class MovedModules(MetaPathFinder, Loader):
    """Imports a module or class under its old name: the result is the one with the new name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Handles only the names in `MOVED`."""
        package, _, rest = fullname.partition(".")
        is_moved = package == PACKAGE and rest in MOVED
        return ModuleSpec(fullname, self) if is_moved else None

    def create_module(self, spec: ModuleSpec) -> None:
        """Lets the import system create an empty module, which `exec_module` replaces."""

    def exec_module(self, module: ModuleType) -> None:
        """Replaces the old module with the new one and warns."""
        old = module.__name__
        new = current_path(old)
        sys.modules[old] = _import_object(new)
        message = f"{old} is now {new}; the old name stops working in version {REMOVED_IN}"
        warnings.warn(message, FutureWarning, stacklevel=2)


def _import_object(path: str) -> Any:
    """The module or class of an import path."""
    parent, _, name = path.rpartition(".")
    return getattr(import_module(parent), name) if name[0].isupper() else import_module(path)


def install() -> None:
    """Makes the old names importable; a second call has no effect."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, MovedModules())  # before those that would find a new file under an old name
