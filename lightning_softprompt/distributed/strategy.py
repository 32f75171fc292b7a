"""`--trainer.strategy=sharded`: Lightning's ModelParallelStrategy for backbones that do not fit on one device."""

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
    """Each device holds a shard of the frozen layers (FSDP2), and all trainable parameters.

    Trainable parameters are replicated as in DDP: gradients are averaged over all processes once per step, before any
    callback reads them. Checkpoints are also those of DDP: one file, without the backbone.

    Args:
        devices_per_copy: Number of devices that share one copy of the backbone, such as the devices of one machine,
            which have a fast connection (default: all devices).
        options: Further options of `ModelParallelStrategy`.
    """

    def __init__(self, devices_per_copy: int | None = None, **options: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **options)
        self.devices_per_copy = devices_per_copy
        self._accumulates = False

    def setup_environment(self) -> None:
        """Arranges the processes in a mesh, in which neighbours share one copy of the backbone."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
        per_copy = self.devices_per_copy or self.world_size
        if self.world_size % per_copy:
            raise ValueError(
                f"devices_per_copy={per_copy} does not divide the {self.world_size} devices; set it to a divisor"
            )
        assert self.lightning_module is not None
        shape = (self.world_size // per_copy, per_copy)
        self._device_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=("copies", SHARES))
        self.lightning_module._device_mesh = self._device_mesh

    def setup(self, trainer: Trainer) -> None:
        """Sends the initial prompt of the first process to all others."""
        super().setup(trainer)
        trainer.callbacks.insert(0, DrainGathers())  # type: ignore[attr-defined]
        for tensor in (*self._trainable(), *self._buffers()):
            distributed.broadcast(tensor, 0)

    def _trainable(self) -> list[Tensor]:
        assert self.lightning_module is not None
        return [parameter.detach() for parameter in self.lightning_module.parameters() if parameter.requires_grad]

    def _buffers(self) -> list[Tensor]:
        """Returns the buffers of the method, without those of the backbone."""
        assert self.lightning_module is not None
        buffers = self.lightning_module.named_buffers()
        return [buffer for name, buffer in buffers if ".model." not in f".{name}"]

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Distributes the rows over all processes."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Does not average gradients while they are being accumulated."""
        self._accumulates = True
        try:
            yield
        finally:
            self._accumulates = False

    def post_backward(self, closure_loss: Tensor) -> None:
        """Averages the gradients of the trainable parameters."""
        assert self.lightning_module is not None
        drain_gathers(self.lightning_module)
        if not self._accumulates:
            average_gradients([p for p in self.lightning_module.parameters() if p.requires_grad])

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Restores the optimizer as DDP does."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns the state dict as DDP does, since each process holds all trainable parameters."""
        return ParallelStrategy.lightning_module_state_dict(self)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Loads the state dict as DDP does."""
        ParallelStrategy.load_model_state_dict(self, checkpoint, strict)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Returns the state of the optimizer as DDP does."""
        return ParallelStrategy.optimizer_state(self, optimizer)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Loads the state of the optimizer as DDP does."""
        ParallelStrategy.load_optimizer_state_dict(self, checkpoint)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Saves a checkpoint as DDP does."""
        ParallelStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads a checkpoint as DDP does."""
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)


StrategyRegistry.register("sharded", ShardedStrategy, "Frozen layers are sharded over the devices (FSDP2)")


@final
class DrainGathers(Callback):
    """Makes the processes wait for each other at the end of each pass, since layers are gathered by all of them."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drains the gathers before metrics are reduced."""
        drain_gathers(pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drains the gathers before metrics are reduced."""
        drain_gathers(pl_module)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drains the gathers before predictions are gathered."""
        drain_gathers(pl_module)


def drain_gathers(module: Any) -> None:
    """Drains the layer gathers of a module's backbone, if it is sharded; see `LockstepGather.drain`."""
    if (layer_gather := module.loaded.layer_gather) is not None:
        layer_gather.drain()


@torch.no_grad()
def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Averages gradients over all processes, in one communication.

    A process without the gradient of a parameter counts as zero. If no process has one, the parameter gets none.
    """
    world_size = distributed.get_world_size()
    has_gradient = [float(parameter.grad is not None) for parameter in parameters]
    flags = torch.tensor(has_gradient, device=parameters[0].device)
    shares = [torch.zeros_like(p) if p.grad is None else p.grad / world_size for p in parameters]
    buffer = torch.cat([flags, *(share.flatten() for share in shares)])
    distributed.all_reduce(buffer)
    counts = buffer[: len(parameters)].tolist()  # the number of processes with a gradient of each parameter
    means = buffer[len(parameters) :].split([parameter.numel() for parameter in parameters])
    for parameter, count, mean in zip(parameters, counts, means, strict=True):
        if count:
            parameter.grad = mean.view_as(parameter).clone()


def refuse_untested_strategy(strategy: object) -> None:
    """Refuses strategies that shard a prompt, or are not tested with soft prompts.

    Raises:
        ValueError: Naming the strategies to use instead.
    """
    others = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)
    if isinstance(strategy, others) and not isinstance(strategy, ShardedStrategy):
        raise ValueError(
            f"{type(strategy).__name__} is not tested with soft prompts; use trainer.strategy=ddp, or sharded if the "
            "backbone does not fit on a device"
        )
