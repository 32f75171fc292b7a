"""`RolloutReport`: the answers that a policy samples in training, and figures of their rewards."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, final

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_softprompt.callbacks.reporting.run_files import to_png
from lightning_softprompt.core.types import Batch
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.methods.trainer_hooks import TrainerHooks
from lightning_softprompt.runs.loggers import metrics_files, wandb_loggers
from lightning_softprompt.system.atomic_files import write_file
from lightning_softprompt.system.printable import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = "rollouts.jsonl"
EVERY = 10  # optimizer steps
REWARD, DIVERGENCE = "train/reward", "train/kl"
PANELS = {  # metrics of a figure by the label of their axis
    "reward": (REWARD,),
    "divergence per answer (nats)": (DIVERGENCE, "train/kl_k3"),
    "share of answers": ("train/finished_share", "train/equal_reward_share", "train/clip_share"),
    "tokens of an answer": ("train/answer_tokens",),
    "entropy (nats)": ("train/entropy",),
}


@final
class RolloutReport(Callback):
    """Reports the answers of objectives that sample answers, such as `GRPO`. Other objectives have no report.

    After the first optimizer step and then every ten steps, the first answers of the step are appended to
    `rollouts.jsonl` in the run's folder and logged to W&B as the table `train/rollouts`: question, answer, reward and
    its parts, number of tokens, and whether the answer ends. When training ends, `plots/rollouts.png` and
    `plots/training_reward_over_kl.png` are drawn from `metrics.csv`. With several processes, answers are those of the
    first one; with replicas, those of the first replica.

    Args:
        folder: The run's folder.
        rows: Number of answers of a step.
    """

    def __init__(self, folder: Path, rows: int) -> None:
        self.folder = Path(folder)
        self.rows = rows

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove answers of steps after the checkpoint from which the run is resumed."""
        path = self.folder / FILE
        if trainer.is_global_zero and path.is_file():
            write_file(path, "".join(complete_lines(path.read_text(), trainer.global_step)).encode())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Report the answers of some steps."""
        step = trainer.global_step
        is_reported = trainer.is_global_zero and (step == 1 or step % EVERY == 0)
        if not is_reported or not self.rows:
            return
        module = cast(TrainerHooks, pl_module)
        method = cast(SoftPromptModule, module.methods[0])
        rows = method.objective.describe_rows(method.lm(), module.step_rows[0])[: self.rows]
        if rows:
            self._write(step, rows)
            table = [list(row.values()) for row in rows]
            for logger in wandb_loggers(trainer):
                logger.log_table("train/rollouts", list(rows[0]), table, step=step - 1)

    def _write(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        with (self.folder / FILE).open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(f"{printable(json.dumps({'step': step, **row}, ensure_ascii=False))}\n")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw how the rewards develop."""
        if not trainer.is_global_zero:
            return
        for logger in metrics_files(trainer):
            logger.save()
            history = read_history(Path(logger.save_dir) / "metrics.csv")
            for name, figure in draw_history(history).items():
                write_file(self.folder / "plots" / f"{name}.png", to_png(figure))


def complete_lines(text: str, last_step: int) -> list[str]:
    r"""Returns the lines up to an optimizer step, without an incomplete last line.

    >>> complete_lines('{"step": 1}\n{"step": 20}\n{"st', 10)
    ['{"step": 1}\n']
    """
    lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in lines if json.loads(line)["step"] <= last_step]


def read_history(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns the optimizer step and the value of each logged value of training, by name."""
    history: dict[str, list[tuple[int, float]]] = {}
    if not path.is_file():
        return history
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name.startswith("train/") and value:
                    history.setdefault(name, []).append((int(row["step"]) + 1, float(value)))
    return history


def draw_history(history: Mapping[str, Sequence[tuple[int, float]]]) -> dict[str, Figure]:
    """Returns figures of the values over steps, and of rewards over the divergence."""
    from matplotlib.figure import Figure

    if REWARD not in history:
        return {}
    panels = {label: [name for name in names if name in history] for label, names in PANELS.items()}
    panels = {label: names for label, names in panels.items() if names}
    over_steps = Figure(figsize=(7, 1 + 1.7 * len(panels)), layout="constrained")
    rows = over_steps.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, (label, names) in zip(rows, panels.items(), strict=True):
        for name in names:
            axes.plot(*zip(*history[name], strict=True), marker=".", label=name)
        axes.set_ylabel(label)
        axes.legend(frameon=False)
    rows[-1].set_xlabel("optimizer step")
    figures = {"rollouts": over_steps}
    if DIVERGENCE in history:
        figures["training_reward_over_kl"] = draw_divergence(history[DIVERGENCE], history[REWARD])
    return figures


def draw_divergence(divergences: Sequence[tuple[int, float]], rewards: Sequence[tuple[int, float]]) -> Figure:
    """Returns a figure of the reward of each step over the square root of its divergence from the reference."""
    from matplotlib.figure import Figure

    of_step = dict(divergences)
    points = [(step, max(of_step[step], 0) ** 0.5, reward) for step, reward in rewards if step in of_step]
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.add_subplot()
    steps, distances, values = zip(*points, strict=True)
    axes.plot(distances, values, color="lightgray", lw=1, zorder=0)
    image = axes.scatter(distances, values, c=steps, s=14)
    figure.colorbar(image, label="optimizer step")
    axes.set_xlabel("square root of the divergence per answer (nats)")
    axes.set_ylabel("reward of a step")
    return figure
