"""The commands beside a run: each answers at once, so nothing here imports torch before it has said something.

A command is one file with `parser()`, which the help and the shell completion read, and `main(argv)`, which returns the
exit code. Its name and what it does stand in `LIGHT_COMMANDS`.
"""

from __future__ import annotations

TRACEBACK_VARIABLE = "SOFTPROMPT_TRACEBACK"  # set, errors are shown with their traceback

RUN_COMMANDS = {
    "fit": "train a soft prompt, and validate it on the way",
    "validate": "score a checkpoint on the validation rows",
    "test": "score a checkpoint on the test rows",
    "predict": "write what a checkpoint answers",
}

LIGHT_COMMANDS = {
    "quickstart": "a first soft prompt, trained and tried in one go",
    "methods": "the methods: paper, where each enters, how many parameters",
    "configs": "the configuration files that ship; print or copy them",
    "plan": "what a run would take of memory, wire and disk, and whether it fits",
    "index": "make a corpus searchable for retrieval-augmented answers, and search it",
    "analyze": "where the answers of a test went wrong, and whether another run's are better",
    "study": "runs that belong together: stages, seeds, draws, comparisons; each is done once",
    "sweep": "hyper-parameters by Optuna; several processes may share one search",
    "fold": "write a trained prompt without the network that made it",
    "library": "a folder of trained prompts, and which of them a new task might start from",
    "between": "the loss along the line from one trained prompt to another",
    "doctor": "what this machine has and what is missing",
    "completion": "write the completion script for bash or zsh",
}
