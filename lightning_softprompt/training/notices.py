"""Notices of Lightning and bitsandbytes that do not concern the user of this package, and a context that hides them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

NOISE = (
    ".*in eval mode.*",  # the frozen backbone always is
    ".*isinstance.treespec, LeafSpec.*",
    ".*does not have many workers.*",
    ".*It is recommended to use `self.log.*sync_dist=True.*",  # metrics are synchronized by torchmetrics
    ".*Consider setting `persistent_workers.*",
    ".*Be aware that when using `ckpt_path`.*",  # no evaluation requires the state of callbacks
    "Checkpoint directory .* exists and is not empty.*",  # a resumed run continues in its folder
    ".*is smaller than the logging interval.*",  # steps are logged at this interval across epochs
)
IGNORED_LOGS = (
    "`Trainer(limit_",  # the data module reports how many rows are evaluated
    "Loading `train_dataloader` to estimate",
    "GPU available",
    "TPU available",
    "💡",
    "`weights_only` was not set",
    "You are using",
    "Failed to load CPU gemm_4bit_forward",  # of bitsandbytes, which PEFT imports; not used
)
NAMES = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.pytorch.trainer.connectors.checkpoint_connector",
    "bitsandbytes.backends.cpu.ops",
)
LOGGERS = tuple(logging.getLogger(name) for name in NAMES)


def is_relevant(record: logging.LogRecord) -> bool:
    """Whether a record of a log concerns the user."""
    return not record.getMessage().startswith(IGNORED_LOGS)


@contextmanager
def hide_notices() -> Iterator[None]:
    """Hides warnings and logs that do not concern the user."""
    added = [logger for logger in LOGGERS if is_relevant not in logger.filters]
    for logger in added:
        logger.addFilter(is_relevant)
    try:
        with warnings.catch_warnings():
            for message in NOISE:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger in added:
            logger.removeFilter(is_relevant)
