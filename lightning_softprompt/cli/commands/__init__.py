"""The commands other than runs. Each starts quickly: no module here imports torch before the command needs it.

A command is one module with `parser()`, which the help and the shell completion read, and `main(argv)`, which returns
the exit code. Its name and description are in `LIGHT_COMMANDS`.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

TRACEBACK_VARIABLE = "SOFTPROMPT_TRACEBACK"  # if set, errors are shown with their traceback
TRACEBACK_HINT = f"Set {TRACEBACK_VARIABLE}=1 for the full traceback"

RUN_COMMANDS = {
    "fit": "train a soft prompt, with periodic validation",
    "validate": "evaluate a checkpoint on the validation split",
    "test": "evaluate a checkpoint on the test split",
    "predict": "write predictions for new inputs",
}

LIGHT_COMMANDS = {
    "quickstart": "train and test a first soft prompt (about 4 min on 2 CPU cores)",
    "methods": "list methods (paper, injection point, parameters); --advise: which one to choose",
    "configs": "list, print or copy the bundled configs",
    "estimate": "estimate memory, communication and checkpoint size before you run",
    "vocabulary": "extend a tokenizer with terms of a corpus; unknown tokens and tokens per word before and after",
    "constraints": "write prompts with verifiable constraints, such as a number of words or valid JSON",
    "write": "write rows with the frozen model: texts of classes, questions, instructions",
    "filter": "select among written rows; how many rows each filter dropped, and why",
    "paraphrase": "write paraphrases of a column with the frozen model, and the share that filters reject",
    "index": "build and search a retrieval index over a corpus",
    "runs": "list runs with their method, data, scores and cost",
    "report": "compare runs on one HTML page: scores, differences, curves, settings, predictions",
    "analyze": "error analysis of a QA test, optionally paired against another run",
    "explain": "which passages determine the answers of a QA test, optionally compared with another run",
    "cloze": "draw questions about rare terms of held-out documents, for tests of CorpusDataModule",
    "likelihood": "bits per byte of each corpus before and after a training, with the change over documents",
    "wordings": "loss and accuracy of a prompt on templates and paraphrases that its training did not use",
    "study": "run a grid of experiments (seeds, data samples, stages) and report mean and 95% CI; resumable",
    "sweep": "search hyperparameters with Optuna; several processes may share one search",
    "fold": "export a prompt as plain tensors, without its reparameterization network",
    "export": "write a prompt in the format of other software, such as an adapter of HF PEFT",
    "import-peft": "convert an adapter of HF PEFT to a prompt file",
    "push": "upload a prompt and its model card to the Hugging Face Hub",
    "serve": "answer requests over HTTP with trained prompts: OpenAI's API, classes, all prompts in one batch",
    "chat": "talk to a trained prompt in the terminal",
    "merge": "write the backbone with the trained weights of NewTokens, LoRA or full fine-tuning as a plain folder",
    "prompts": "store trained prompts; find the most similar ones to initialize from",
    "inspect": "sizes, nearest words, rank and redundancy of a trained prompt, as an HTML page",
    "interpolate": "interpolate between two prompts and plot the loss",
    "doctor": "check the environment and report missing dependencies",
    "wandb-workspace": "save a view of a Weights & Biases project: panels by kind, runs grouped by experiment",
    "completion": "write the completion script for bash or zsh",
}

EXPORT_COMMANDS = ("export", "import-peft", "merge", "push")  # in the folder `export`
# in the folder `analysis`
ANALYSIS_COMMANDS = (
    "analyze",
    "cloze",
    "explain",
    "inspect",
    "interpolate",
    "likelihood",
    "wordings",
)
SERVING_COMMANDS = ("chat", "serve")  # in the folder `serving`
SYNTHETIC_COMMANDS = ("constraints", "filter", "paraphrase", "write")  # in the folder `synthetic`
RENAMED_COMMANDS = {"between": "interpolate", "plan": "estimate", "library": "prompts"}  # old names, until 0.3.0


def import_command(name: str) -> ModuleType:
    """Imports the module of a command of `LIGHT_COMMANDS`."""
    folder = __name__
    if name in ANALYSIS_COMMANDS:
        folder = f"{__name__}.analysis"
    elif name in EXPORT_COMMANDS:
        folder = f"{__name__}.export"
    elif name in SERVING_COMMANDS:
        folder = f"{__name__}.serving"
    elif name in SYNTHETIC_COMMANDS:
        folder = f"{__name__}.synthetic"
    return import_module(f"{folder}.{name.replace('-', '_')}")
