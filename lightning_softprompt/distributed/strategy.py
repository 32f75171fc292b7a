"""`--trainer.strategy=sharded`: Lightning's ModelParallelStrategy for frozen backbones that no device holds alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    StrategyRegistry,
)
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh

from lightning_softprompt.distributed.sharding import SHARES


@final
class ShardedStrategy(ModelParallelStrategy):
    """Each device holds a share of the frozen layers (FSDP2), and all of what is trained.

    What is trained is kept and reduced as DDP does: gradients are averaged over all processes, once a step, before any
    callback sees them. Checkpoints are those of DDP, too: one file, without the backbone.

    Args:
        devices_per_copy: How many devices share one copy of the backbone, such as those of a machine, between which
            the wires are fast; None shares one copy among all.
    """

    def __init__(self, devices_per_copy: int | None = None, **options: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **options)
        self.devices_per_copy = devices_per_copy
        self._adding_up = False

    def setup_environment(self) -> None:
        """Lays the processes out in copies of neighbours."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
        each = self.devices_per_copy or self.world_size
        if self.world_size % each:
            raise ValueError(f"devices_per_copy={each} does not divide the {self.world_size} devices; take a divisor")
        assert self.lightning_module is not None
        shape, names = (self.world_size // each, each), ("copies", SHARES)
        self._device_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)
        self.lightning_module._device_mesh = self._device_mesh

    def setup(self, trainer: Trainer) -> None:
        """Brings all processes to where the first one's prompt starts."""
        super().setup(trainer)
        trainer.callbacks.insert(0, DrainGathers())  # type: ignore[attr-defined]
        for tensor in (*self._trained(), *self._buffers()):
            distributed.broadcast(tensor, 0)

    def _trained(self) -> list[Tensor]:
        assert self.lightning_module is not None
        return [parameter.detach() for parameter in self.lightning_module.parameters() if parameter.requires_grad]

    def _buffers(self) -> list[Tensor]:
        """Those of the method."""
        assert self.lightning_module is not None
        return [b for name, b in self.lightning_module.named_buffers() if ".model." not in f".{name}"]

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Every process has rows of its own."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Leaves gradients as they are while they are being added up."""
        self._adding_up = True
        try:
            yield
        finally:
            self._adding_up = False

    def post_backward(self, closure_loss: Tensor) -> None:
        """Averages the gradients of what is trained."""
        assert self.lightning_module is not None
        drain_gathers(self.lightning_module)
        if not self._adding_up:
            average_gradients([p for p in self.lightning_module.parameters() if p.requires_grad])

    @property
    def lightning_restore_optimizer(self) -> bool:
        """As DDP does."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """As DDP does: what is trained is whole in each process."""
        return ParallelStrategy.lightning_module_state_dict(self)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """As DDP does."""
        ParallelStrategy.load_model_state_dict(self, checkpoint, strict)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """As DDP does."""
        return ParallelStrategy.optimizer_state(self, optimizer)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """As DDP does."""
        ParallelStrategy.load_optimizer_state_dict(self, checkpoint)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """As DDP does."""
        ParallelStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """As DDP does."""
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)


StrategyRegistry.register("sharded", ShardedStrategy, "Frozen layers are shared out over the devices (FSDP2)")


@final
class DrainGathers(Callback):
    """Has processes wait for each other with what only all of them can run, at the end of each pass."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before metrics are put together."""
        drain_gathers(pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before metrics are put together."""
        drain_gathers(pl_module)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before predictions are put together."""
        drain_gathers(pl_module)


def drain_gathers(module: Any) -> None:
    """See `Turns.finish`; nothing where the backbone is not shared out."""
    if (layer_gather := module.loaded.layer_gather) is not None:
        layer_gather.drain()


@torch.no_grad()
def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """The mean over all processes, in one exchange. Who has none counts as zero; where nobody has, none is made."""
    world = distributed.get_world_size()
    have = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad / world for p in parameters]
    sent = torch.cat([have, *(grad.flatten() for grad in grads)])
    distributed.all_reduce(sent)
    parts = sent[len(parameters) :].split([p.numel() for p in parameters])
    for parameter, had, part in zip(parameters, sent[: len(parameters)].tolist(), parts, strict=True):
        if had:
            parameter.grad = part.view_as(parameter).clone()


def refuse_untested_strategy(strategy: object) -> None:
    """Refuses strategies that would cut a prompt to pieces, or were never tried.

    Raises:
        ValueError: Naming what to take instead.
    """
    others = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)
    if isinstance(strategy, others) and not isinstance(strategy, ShardedStrategy):
        raise ValueError(
            f"{type(strategy).__name__} was not tried with soft prompts; take trainer.strategy=ddp, or sharded where "
            "a device does not hold the backbone"
        )
