"""Multitask prompt tuning of PEFT: a shared prompt and a low-rank matrix of each task."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_softprompt.backbones.base import Backbone
from lightning_softprompt.interchange.adapter_folder import EMBEDDINGS, AdapterFolder
from lightning_softprompt.interchange.adapters.base import AdapterKind, ImportedMethod
from lightning_softprompt.prompts.task_ids import ONLY

MPT = "lightning_softprompt.methods.task_prompts.mpt.MPT"


class MultitaskAdapter(AdapterKind):
    """`MPT` with its shared prompt and the factors of each task."""

    peft_types = ("MULTITASK_PROMPT_TUNING",)
    precedes_start_token = True

    def convert(self, adapter: AdapterFolder, backbone: Backbone, task_names: Sequence[str]) -> ImportedMethod:
        """Returns `MPT` with `shared` [P, H], and `u` [P, R] and `v` [R, H] of each task."""
        length, width = adapter.read_count("num_virtual_tokens"), backbone.hidden_size
        num_tasks, rank = adapter.read_count("num_tasks", default=1), adapter.read_count("num_ranks", default=1)
        copies = adapter.read_count("num_transformer_submodules", default=1)
        names = tuple(task_names) or tuple(str(number) for number in range(num_tasks))
        if len(set(names)) != num_tasks:
            raise ValueError(f"{adapter.path} has {num_tasks} tasks; pass as many different names, got {list(names)}")
        adapter.check_count("token_dim", width, "numbers in an embedding")
        shared = adapter.read_tensor(EMBEDDINGS, (copies * length, width), "virtual tokens, hidden size")
        columns = adapter.read_tensor("prefix_task_cols", (num_tasks, copies * length, rank), "tasks, tokens, rank")
        rows = adapter.read_tensor("prefix_task_rows", (num_tasks, rank, width), "tasks, rank, hidden size")
        tensors: dict[str, Tensor] = {"shared": shared[:length]}
        for number, name in enumerate(names if num_tasks > 1 else (ONLY,)):
            tensors[f"u.{name}"], tensors[f"v.{name}"] = columns[number, :length], rows[number]
        tasks = names if num_tasks > 1 else ()
        return ImportedMethod(MPT, {"length": length, "rank": rank}, tensors, tasks)
