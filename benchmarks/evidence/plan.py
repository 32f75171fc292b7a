"""The experiments of `experiments.yaml` as jobs: a job is a training with its test, or a test without training.

A block compares methods on tasks. It may vary options, such as the length of the prompt: each combination of values is
a variant of every method in the block. The learning rate is selected for the method without its variants, in the block
itself or in the block that it names as `rates_of`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

from lightning_softprompt.system.plain_yaml import read_yaml

RATE_SEED = 0  # seed of the runs that select a learning rate; no seed of a block
Options = Mapping[str, Any]
Results = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Job:
    """One command of the experiments, or a training and its test.

    Args:
        block: Name of the block.
        method: Name of the method, with the options that vary.
        task: Name of the task.
        backbone: Name of the backbone.
        seed: Seed of the run.
        rate: Learning rate; None without training.
        selects_rate: Whether the run only serves to select the learning rate, or another option; it is not tested.
        metric: Validation metric that selects the learning rate and the best step.
        mode: Whether its least or greatest value is best.
        steps: Optimizer steps.
        options: Options of `softprompt fit`, without those of folders and data paths.
        path: Folder of the task's rows, below the folder of all data.
        test_metric: Metric that is reported for the test (default: `metric`).
        measures: Further measurements of the tested checkpoint, names in `measures.py`.
    """

    block: str
    method: str
    task: str
    backbone: str
    seed: int
    rate: float | None
    selects_rate: bool
    metric: str
    mode: str
    steps: int
    options: Options
    path: str
    test_metric: str | None = None
    measures: Sequence[str] = ()

    @property
    def key(self) -> str:
        """Identifies the job and its settings: results of other settings have another key."""
        settings = asdict(self)
        for name in ("test_metric", "measures"):  # results that precede these settings keep their key
            if not settings[name]:
                del settings[name]
        digest = sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        kind = f"rate-{self.rate}" if self.selects_rate else f"seed-{self.seed}"
        name = "_".join([self.block, self.task, self.backbone, self.method, kind, digest])
        return name.replace(" ", "-").replace("/", "-")


@dataclass(frozen=True)
class Cell:
    """A tested run of the experiments, before its learning rate is known.

    Args:
        block: Name of the block.
        task: Name of the task.
        backbone: Name of the backbone.
        recipe: Name of the method in `methods`.
        method: Name of the method, with the options that vary.
        seed: Seed of the run.
        varied: The options that vary.
    """

    block: str
    task: str
    backbone: str
    recipe: str
    method: str
    seed: int
    varied: Options


class Plan:
    """The experiments in their order.

    Args:
        path: The YAML file.

    Raises:
        ValueError: If a block takes learning rates from blocks that do not select them.
    """

    def __init__(self, path: Path) -> None:
        self._config = read_yaml(path)
        self.blocks: dict[str, Options] = {block["name"]: block for block in self._config["blocks"]}
        for name in self.blocks:
            for cell in self.cells(name):
                self._rate_source(cell)

    @property
    def steps(self) -> int:
        """The number of training steps of blocks that do not set another one."""
        return int(self._config["settings"]["steps"])

    @property
    def data_paths(self) -> list[str]:
        """The folders of all tasks, below the folder of all data."""
        return [task["path"] for task in self._config["tasks"].values()]

    def jobs(self, results: Sequence[Mapping[str, Any]], blocks: Collection[str] = ()) -> Iterator[Job]:
        """Yields all jobs whose settings are known: the rate of a method is known once its candidates have results.

        Within a task of a block, the first seed of all methods precedes the second one, so that tables are complete
        early.

        Args:
            results: The results so far.
            blocks: Names of blocks, whose jobs are yielded with those that select their learning rates; all by default.
        """
        by_key = {result["key"]: result for result in results}
        for name in blocks or self.blocks:
            block = self.blocks[name]
            cells = self.cells(name)
            for task, backbone in product(block["tasks"], block["backbones"]):
                members = [cell for cell in cells if (cell.task, cell.backbone) == (task, backbone)]
                first_of_each = {cell.recipe: cell for cell in reversed(members)}
                for recipe in block["methods"]:
                    cell = first_of_each[recipe]
                    yield from self._candidate_jobs(cell, self._rate_source(cell))
                for cell in members:
                    selected = self._select(cell, by_key)
                    if selected is not None:
                        yield self._job(cell, block, selected)

    def cells(self, name: str) -> list[Cell]:
        """Returns the tested runs of a block, in their order."""
        block = self.blocks[name]
        cells = []
        for task, backbone, seed, recipe in product(
            block["tasks"], block["backbones"], block["seeds"], block["methods"]
        ):
            if seed != block["seeds"][0] and not self._config["methods"][recipe].get("rates"):
                continue  # a method without training has no seed
            for label, varied in variants(block):
                method = ", ".join([recipe, label]) if label else recipe
                cells.append(Cell(name, task, backbone, recipe, method, seed, varied))
        return cells

    def _candidates(self, recipe: str) -> list[Options]:
        """Returns the options to select from: learning rates, or values of another option."""
        method = self._config["methods"][recipe]
        rates: list[Options] = [{"model.lr": rate} for rate in method.get("rates", [])]
        return rates or combine(method.get("candidates", {}))

    def _rate_source(self, cell: Cell) -> Options:
        """Returns the block that selects the learning rate of a cell.

        Raises:
            ValueError: If no block does.
        """
        block = self.blocks[cell.block]
        if "rates_of" not in block or len(self._candidates(cell.recipe)) < 2:
            return block
        for name in block["rates_of"]:
            source = self.blocks[name]
            needed = ((cell.recipe, "methods"), (cell.task, "tasks"), (cell.backbone, "backbones"))
            if all(value in source[kind] for value, kind in needed):
                return source
        raise ValueError(
            f"block {cell.block!r}: none of {block['rates_of']} selects the learning rate of {cell.recipe!r} on "
            f"{cell.task!r} with {cell.backbone!r}"
        )

    def _candidate_jobs(self, cell: Cell, source: Options) -> list[Job]:
        candidates = self._candidates(cell.recipe)
        if len(candidates) < 2:
            return []
        plain = Cell(source["name"], cell.task, cell.backbone, cell.recipe, cell.recipe, RATE_SEED, {})
        return [self._job(plain, source, candidate, selects=True) for candidate in candidates]

    def _select(self, cell: Cell, results: Results) -> Options | None:
        """Returns the candidate with the best validation; None until all candidates have results."""
        candidates = self._candidates(cell.recipe)
        if len(candidates) < 2:
            return candidates[0]
        jobs = self._candidate_jobs(cell, self._rate_source(cell))
        if any(job.key not in results for job in jobs):
            return None
        sign = 1 if jobs[0].mode == "min" else -1
        scores = [sign * results[job.key]["validation"] for job in jobs]
        return candidates[scores.index(min(scores))]

    def _job(self, cell: Cell, block: Options, selected: Options, selects: bool = False) -> Job:
        settings = {**self._config["settings"], **block.get("settings", {})}
        spec, recipe = self._config["tasks"][cell.task], self._config["methods"][cell.recipe]
        steps = settings["rate_steps" if selects else "steps"]
        options = {
            "model": recipe["model"],
            **spec["options"],
            **settings["options"],
            **self._config["backbones"][cell.backbone],
            **recipe.get("options", {}),
            **recipe.get("options_by_task", {}).get(cell.task, {}),
            **block.get("options", {}),
            "run.monitor": f"val/{spec['metric']}",
            "run.monitor_mode": spec["mode"],
            "seed_everything": cell.seed,
            **selected,
        }
        if cell.seed:
            options["data.seed"] = cell.seed
        if recipe.get("rates"):
            options |= {"trainer.max_steps": steps, "trainer.val_check_interval": settings["validate_every"]}
            options |= {"trainer.check_val_every_n_epoch": "null"}
        options |= cell.varied
        measures = [] if selects else block.get("measures", [])
        return Job(
            cell.block, cell.method, cell.task, cell.backbone, cell.seed, options.get("model.lr"), selects,
            spec["metric"], spec["mode"], steps, options, spec["path"], spec.get("test_metric"), measures,
        )  # fmt: skip


def variants(block: Options) -> list[tuple[str, Options]]:
    """Returns the variants of a block, as names and options: of `variants`, and all combinations of `vary`.

    >>> variants({"vary": {"model.length": [1, 5]}})
    [('length 1', {'model.length': 1}), ('length 5', {'model.length': 5})]
    >>> variants({"variants": {"short": {"model.length": 1}}})
    [('short', {'model.length': 1})]
    >>> variants({})
    [('', {})]
    """
    named: Mapping[str, Options] = block.get("variants", {"": {}})
    result: list[tuple[str, Options]] = []
    for (name, options), varied in product(named.items(), combine(block.get("vary", {}))):
        labels = [f"{option.rpartition('.')[2]} {value}" for option, value in varied.items()]
        result.append((", ".join([name] * bool(name) + labels), {**options, **varied}))
    return result


def combine(values: Mapping[str, Sequence[Any]]) -> list[Options]:
    """Returns all combinations of values, as options.

    >>> combine({"model.length": [1, 5]})
    [{'model.length': 1}, {'model.length': 5}]
    >>> combine({})
    [{}]
    """
    return [dict(zip(values, combination, strict=True)) for combination in product(*values.values())]
