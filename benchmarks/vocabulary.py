"""Trains the rows of new Portuguese tokens from several initial values, and prints bits per byte before and after.

    softprompt vocabulary extend DATA/qa/faquad_pt/train.jsonl DATA/classification/umsab_pt/train.jsonl \
        --column context text --general DATA/lm/wikitext2/train.jsonl --rows 100 --out portuguese
    python benchmarks/vocabulary.py --data DATA --vocabulary portuguese --results vocabulary.jsonl

Training texts are those that the tokens were selected from. Bits per byte are those of test documents, with 95 %
intervals over documents. `--results` stores a line for each run; runs that it contains are not repeated. LoRA without
new tokens is the control that separates the effect of new tokens from that of the training.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import process_time
from typing import Any

import torch

import lightning_softprompt as sp
from lightning_softprompt.prompts.token_rows.base import TokenRowsInit
from lightning_softprompt.prompts.token_rows.distilled import Distilled
from lightning_softprompt.prompts.token_rows.focus import Focus
from lightning_softprompt.prompts.token_rows.means import MeanOfSubwords, MeanOfVocabulary
from lightning_softprompt.prompts.token_rows.normal import NormalRows

WINDOW, ROWS = 128, 2  # bytes of a window, and windows of a training step
RANK, LORA_RATE = 8, 1e-3
TEST = (("qa/faquad_pt", "context", 6), ("classification/umsab_pt", "text", 20))
TRAIN = (("qa/faquad_pt", "context", None), ("classification/umsab_pt", "text", None))

Model = Callable[..., sp.SoftPromptModule]


def main() -> None:
    """Runs what is missing and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with qa/faquad_pt and classification/umsab_pt")
    parser.add_argument("--vocabulary", type=Path, required=True, help="folder of the extended tokenizer")
    parser.add_argument("--results", type=Path, required=True, help="JSON lines to read and extend")
    parser.add_argument("--steps", type=int, default=60, help="0 to test initial values only")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="names of runs (default: all)")
    args = parser.parse_args()
    for seed in args.seeds:
        for name in args.only or models(args.data):
            done = [(run["name"], run["seed"], run["steps"]) for run in read(args.results)]
            if (name, seed, args.steps) not in done:
                result = run(name, seed, args)
                with args.results.open("a") as file:
                    file.write(json.dumps(result) + "\n")
    print(format_table(read(args.results)))


def models(data: Path) -> dict[str, tuple[bool, Model]]:
    """Returns the runs by name: whether the tokenizer is extended, and the method."""
    texts = [str(data / folder / "train.jsonl") for folder, _, _ in TRAIN]
    columns = ("context", "text")
    inits: dict[str, TokenRowsInit] = {
        "mean of subwords": MeanOfSubwords(),
        "mean of subwords, head: first subword": MeanOfSubwords("first"),
        "Focus": Focus(texts, columns),
        "Distilled": Distilled(texts, columns, snippets=3, length=32, batch_size=8, rate=1e-2),
        "mean of vocabulary": MeanOfVocabulary(),
        "random": NormalRows(),
    }
    runs: dict[str, tuple[bool, Model]] = {"none": (False, sp.NoPrompt), "LoRA": (False, lora)}
    runs["LoRA, new tokens: mean of subwords"] = (True, with_lora)
    for name, init in inits.items():
        runs[f"new tokens: {name}"] = (True, new_tokens(init))
    return runs


def lora(**common: Any) -> sp.SoftPromptModule:
    """Returns LoRA."""
    return sp.LoRA(rank=RANK, lr=LORA_RATE, **common)


def new_tokens(init: TokenRowsInit) -> Model:
    """Returns a function that creates `NewTokens` with initial rows."""

    def create(**common: Any) -> sp.SoftPromptModule:
        return sp.NewTokens(init=init, **common)

    return create


def with_lora(**common: Any) -> sp.SoftPromptModule:
    """Returns LoRA and `NewTokens` together."""
    return sp.Combined(parts=[sp.NewTokens(), sp.LoRA(rank=RANK)], lr=LORA_RATE, **common)


def run(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Trains and tests one method."""
    is_extended, create = models(args.data)[name]
    spec = sp.BackboneSpec(vocabulary=str(args.vocabulary) if is_extended else None)
    train, held_out = (list(documents_of(args.data, *split)) for split in (("train", TRAIN), ("test", TEST)))
    data = sp.CorpusDataModule(
        train=train,
        validation=held_out[:1],
        test=held_out,
        window=WINDOW,
        batch_size=ROWS,
        eval_batch_size=4 * ROWS,
        max_tokens=WINDOW,
        backbone=spec,
        seed=seed,
    )
    module = create(data=data)
    torch.manual_seed(seed)
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    trainer = sp.Trainer(max_steps=args.steps, limit_val_batches=0, enable_checkpointing=False, **options)
    seconds = {}
    start = process_time()
    module.configure_model()
    seconds["start"] = process_time() - start
    before = test(trainer, module, data)
    start = process_time()
    trains = module.trains and args.steps > 0
    if trains:
        trainer.fit(module, data)
    seconds["training"] = process_time() - start
    after = test(trainer, module, data) if trains else before
    return {"name": name, "seed": seed, "steps": args.steps, "before": before, "after": after, "seconds": seconds}


def test(trainer: sp.Trainer, module: sp.SoftPromptModule, data: sp.CorpusDataModule) -> dict[str, float]:
    """Returns bits per byte with their interval, and tokens per word."""
    [metrics] = trainer.test(module, data, verbose=False)
    names = ("bits_per_byte", "bits_per_byte_low", "bits_per_byte_high", "tokens_per_word")
    return {name: float(metrics[f"test/{name}"]) for name in names if f"test/{name}" in metrics}


def documents_of(data: Path, split: str, sources: Sequence[tuple[str, str, int | None]]) -> Iterator[dict[str, str]]:
    """Yields the documents of a split, each once; of each source, at most a number of them."""
    for folder, column, limit in sources:
        lines = (data / folder / f"{split}.jsonl").read_text().splitlines()
        texts = dict.fromkeys(json.loads(line)[column] for line in lines)
        for text in list(texts)[:limit]:
            yield {"text": text}


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the runs of a file, which may not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def format_table(runs: Sequence[dict[str, Any]]) -> str:
    """Returns a table of bits per byte, the mean over seeds."""
    lines = [
        "| trained | steps | tokens per word | bits per byte before | after | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for name, steps in dict.fromkeys((run["name"], run["steps"]) for run in runs):
        same = [run for run in runs if (run["name"], run["steps"]) == (name, steps)]
        cells = [name, str(steps), f"{same[0]['after']['tokens_per_word']:.3f}"]
        for stage in ("before", "after"):
            values = [run[stage]["bits_per_byte"] for run in same]
            mean = sum(values) / len(values)
            cells.append(f"{mean:.4f} ({min(values):.4f} to {max(values):.4f})")
        lines.append(f"| {' | '.join([*cells, str(len(same))])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
