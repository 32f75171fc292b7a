"""The experiments of `experiments.yaml` as jobs: a job is a training with its test, or a test without training.

A block compares methods on tasks. It may vary options, such as the length of the prompt: each combination of values is
a variant of every method in the block. The learning rate is selected for the method without its variants, in the block
itself or in the block that it names as `rates_of`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

from lightning_softprompt.system.plain_yaml import read_yaml

RATE_SEED = 0  # seed of the runs that select a learning rate; no seed of a block
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """One cell of the experiments.

    Args:
        block: Name of the block.
        method: Name of the method, with the options that vary.
        task: Name of the task.
        backbone: Name of the backbone.
        seed: Seed of the run.
        rate: Learning rate; None without training.
        selects_rate: Whether the run only serves to select the learning rate; it is not tested.
        metric: Validation metric that selects the learning rate and the best step.
        mode: Whether its least or greatest value is best.
        steps: Optimizer steps.
        options: Options of `softprompt fit`, without those of folders and data paths.
        path: Folder of the task's rows, below the folder of all data.
        test_metric: Metric that is reported for the test (default: `metric`).
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

    @property
    def key(self) -> str:
        """Identifies the job and its settings: results of other settings have another key."""
        settings = asdict(self)
        if self.test_metric is None:
            del settings["test_metric"]
        digest = sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        kind = f"rate-{self.rate}" if self.selects_rate else f"seed-{self.seed}"
        name = "_".join([self.block, self.task, self.backbone, self.method, kind, digest])
        return name.replace(" ", "-")


class Plan:
    """The experiments in their order.

    Args:
        path: The YAML file.
    """

    def __init__(self, path: Path) -> None:
        self._config = read_yaml(path)
        self._blocks: dict[str, Options] = {block["name"]: block for block in self._config["blocks"]}

    def jobs(self, results: Sequence[Mapping[str, Any]]) -> Iterator[Job]:
        """Yields all jobs whose settings are known: the rate of a method is known once its candidates have results.

        Within a block, the first seed of all methods precedes the second one, so that tables are complete early.

        Args:
            results: The results so far.
        """
        for block in self._blocks.values():
            for task in block["tasks"]:
                for backbone in block["backbones"]:
                    if "rates_of" not in block:
                        for method in block["methods"]:
                            yield from self._rate_jobs(block, task, backbone, method)
                    yield from self._cells(block, task, backbone, results)

    def _cells(self, block: Options, task: str, backbone: str, results: Sequence[Mapping[str, Any]]) -> Iterator[Job]:
        for seed in block["seeds"]:
            for method in block["methods"]:
                if self._rates(method):
                    rate = self._select_rate(block, task, backbone, method, results)
                    if rate is None:
                        continue
                elif seed == block["seeds"][0]:  # a method without training has no seed
                    rate = None
                else:
                    continue
                for varied in variants(block.get("vary", {})):
                    yield self._job(block, task, backbone, method, seed, rate, varied)

    def _rates(self, method: str) -> list[float]:
        return list(self._config["methods"][method].get("rates", []))

    def _rate_jobs(self, block: Options, task: str, backbone: str, method: str) -> list[Job]:
        rates = self._rates(method)
        return [self._job(block, task, backbone, method, RATE_SEED, rate, {}, selects_rate=True) for rate in rates]

    def _select_rate(
        self, block: Options, task: str, backbone: str, method: str, results: Sequence[Mapping[str, Any]]
    ) -> float | None:
        """Returns the rate with the best validation; None until all candidates have results."""
        by_key = {result["key"]: result for result in results}
        source = self._blocks[block.get("rates_of", block["name"])]
        jobs = self._rate_jobs(source, task, backbone, method)
        if any(job.key not in by_key for job in jobs):
            return None
        sign = 1 if jobs[0].mode == "min" else -1
        scores = {job.rate: sign * by_key[job.key]["validation"] for job in jobs}
        return min(scores, key=lambda rate: scores[rate])

    def _job(
        self,
        block: Options,
        task: str,
        backbone: str,
        method: str,
        seed: int,
        rate: float | None,
        varied: Options,
        selects_rate: bool = False,
    ) -> Job:
        settings, spec = self._config["settings"], self._config["tasks"][task]
        recipe = self._config["methods"][method]
        steps = settings["rate_steps" if selects_rate else "steps"]
        options = {
            "model": recipe["model"],
            **spec["options"],
            **settings["options"],
            **self._config["backbones"][backbone],
            **recipe.get("options", {}),
            **recipe.get("options_by_task", {}).get(task, {}),
            **block.get("options", {}),
            **varied,
            "run.monitor": f"val/{spec['metric']}",
            "run.monitor_mode": spec["mode"],
            "seed_everything": seed,
        }
        if rate is not None:
            options |= {"model.lr": rate, "trainer.max_steps": steps}
            options |= {"trainer.val_check_interval": settings["validate_every"]}
            options |= {"trainer.check_val_every_n_epoch": "null"}
        labels = [f"{option.rpartition('.')[2]} {value}" for option, value in varied.items()]
        name = ", ".join([method, *labels])
        return Job(
            block["name"], name, task, backbone, seed, rate, selects_rate, spec["metric"], spec["mode"], steps,
            options, spec["path"], spec.get("test_metric"),
        )  # fmt: skip


def variants(vary: Mapping[str, Sequence[Any]]) -> list[Options]:
    """Returns all combinations of values, as options.

    >>> variants({"model.length": [1, 5]})
    [{'model.length': 1}, {'model.length': 5}]
    >>> variants({})
    [{}]
    """
    return [dict(zip(vary, values, strict=True)) for values in product(*vary.values())]
