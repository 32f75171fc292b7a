"""Lightning SoftPrompt: soft-prompt tuning of frozen language models in PyTorch Lightning."""

import logging

from lightning_softprompt import moved

__version__ = "0.1.0"

moved.install()

# Where torchao is installed, transformers imports it, and each run would be told of kernels for other devices.
for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)
