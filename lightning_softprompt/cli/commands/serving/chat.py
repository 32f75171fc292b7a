"""`softprompt chat`: talk to a trained prompt in the terminal."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_softprompt.system.errors import CommandError

if TYPE_CHECKING:
    from lightning_softprompt.inference.prompt import Prompt

DESCRIPTION = """\
Type a line, and read the answer while it is generated. Prompts that were trained on dialogues remember earlier turns;
other prompts answer each line by itself. Prompts of tasks with classes print the probability of each class.

  softprompt chat runs/dolly/TIME-ID/prompt.safetensors
  softprompt chat a.safetensors sst2=b.safetensors               /prompt sst2 changes the prompt, on the same backbone
  echo "a dull film" | softprompt chat b.safetensors             without a terminal: one answer per line

/reset     forget the turns
/prompt    list the prompts; /prompt NAME uses another one
/quit      end (also Ctrl-D)
"""


def parser() -> ArgumentParser:
    """The command's arguments."""
    parser = ArgumentParser("softprompt chat", description=DESCRIPTION, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="+", metavar="[NAME=]FILE", help="prompt.safetensors or a checkpoint of a run")
    parser.add_argument("--task", metavar="NAME", help="the task (multi-task prompts)")
    parser.add_argument("--template", metavar="TEXT", help="how a row is written, if the file does not store it")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="tokens of an answer (default: as trained)")
    parser.add_argument("--temperature", type=float, metavar="T", help="above 0 samples answers (default: as trained)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of sampling (default: 0)")
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    paths = dict(_name_and_path(argument) for argument in args.prompts)
    options = _decoding_options(args)
    try:
        chat = Chat(paths, args.task, args.template, options)
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from error
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print(f"Prompt {chat.name}. /quit ends, /reset forgets the turns, /prompt changes the prompt.")
    for line in _read_lines(is_terminal):
        if line == "/quit":
            break
        _print_answer(chat, line)
    return 0


def _print_answer(chat: Chat, line: str) -> None:
    """Prints the answer to a line while it is generated."""
    try:
        for piece in chat.answer(line):
            print(piece, end="", flush=True)
        print()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)


class Chat:
    """A dialogue with one of several prompts on a backbone.

    Args:
        paths: Prompt files by name. The first one is used first.
        task: The task of multi-task prompts.
        template: How a row is written, for files that do not store it.
        options: Options of `Decoding` that replace those of training.

    Raises:
        ValueError: If a prompt cannot be loaded.
    """

    def __init__(self, paths: dict[str, Path], task: str | None, template: str | None, options: dict[str, Any]) -> None:
        from lightning_softprompt.inference.prompt import load_prompt

        self.prompts: dict[str, Prompt] = {}
        for name, path in paths.items():
            backbone = next((prompt.backbone for prompt in self.prompts.values()), None)
            self.prompts[name] = load_prompt(path, backbone, template)
        self.name = next(iter(self.prompts))
        self.options = options
        self.messages: list[dict[str, str]] = []
        self._task = task
        for prompt in self.prompts.values():
            prompt.view(self.task_of(prompt))

    def task_of(self, prompt: Prompt) -> str | None:
        """The task of a prompt; None if it has a single one."""
        return self._task if prompt.tasks else None

    def answer(self, line: str) -> Iterator[str]:
        """Yields the answer to a line, or what a command reports.

        Raises:
            ValueError: If the prompt cannot answer the line.
        """
        if line == "/reset":
            self.messages.clear()
            yield "The turns are forgotten."
        elif line.split()[0] == "/prompt":
            yield self._change_prompt(line.removeprefix("/prompt").strip())
        elif line.startswith("/"):
            raise ValueError(f"unknown command {line.split()[0]}; commands are /reset, /prompt and /quit")
        else:
            yield from self._answer_text(line)

    def _change_prompt(self, name: str) -> str:
        if not name:
            return "Prompts: " + ", ".join(f"{one} (in use)" if one == self.name else one for one in self.prompts)
        if name not in self.prompts:
            raise ValueError(f"no prompt {name!r}; the prompts are {', '.join(self.prompts)}")
        self.name = name
        self.messages.clear()
        return f"Prompt {name}."

    def _answer_text(self, text: str) -> Iterator[str]:
        prompt = self.prompts[self.name]
        task = self.task_of(prompt)
        view = prompt.view(task)
        if view.evaluation is not None:
            (record,) = prompt.predict(text, task)
            yield _describe(record)
            return
        if view.format.chat is None:
            yield from self._generate(prompt, text, task)
            return
        messages = [*self.messages, {"role": "user", "content": text}]
        pieces = []
        for piece in self._generate(prompt, {"messages": messages}, task):
            pieces.append(piece)
            yield piece
        answer = "".join(pieces)
        if answer.strip():  # a dialogue cannot contain an empty answer
            self.messages = [*messages, {"role": "assistant", "content": answer}]

    def _generate(self, prompt: Prompt, row: Any, task: str | None) -> Iterator[str]:
        decoding = prompt.row_format(task).decoding
        if decoding is not None and decoding.num_beams > 1:  # the answer is known only at the end
            yield from prompt.generate(row, task, **self.options)
        else:
            yield from prompt.generate(row, task, stream=True, **self.options)


def _decoding_options(args: Namespace) -> dict[str, Any]:
    options: dict[str, Any] = {"seed": args.seed}
    if args.max_tokens is not None:
        options["max_new_tokens"] = args.max_tokens
    if args.temperature is not None:
        options |= {"do_sample": args.temperature > 0, "temperature": args.temperature or 1.0}
    return options


def _describe(record: dict[str, Any]) -> str:
    """The predicted class and the probabilities, or the tags of the words."""
    if record["scores"] is None:
        return " ".join(map(str, record["prediction"]))
    best = sorted(record["scores"].items(), key=lambda item: -item[1])[:5]
    probabilities = ", ".join(f"{name} {value:.3f}" for name, value in best)
    return f"{record['prediction']} ({probabilities})"


def _read_lines(is_terminal: bool) -> Iterator[str]:
    """Yields the lines of standard input that are not empty. A terminal can edit them."""
    while True:
        try:
            line = input("> " if is_terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line:
            yield line


def _name_and_path(argument: str) -> tuple[str, Path]:
    name, is_pair, path = argument.partition("=")
    if is_pair and "/" not in name:
        return name, Path(path)
    return Path(argument).stem, Path(argument)
