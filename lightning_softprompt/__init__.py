"""Lightning SoftPrompt: soft-prompt tuning of frozen language models in PyTorch Lightning."""

__version__ = "0.1.0"
