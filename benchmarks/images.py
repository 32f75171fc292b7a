"""Soft prompts of a tiny CLIP on scikit-learn's digits, under a domain shift, and the speed against a plain loop.

    python benchmarks/images.py train /tmp/digits        # trains the tiny CLIP from scratch: about 20 CPU seconds
    python benchmarks/images.py compare /tmp/digits      # methods, shots and seeds on base and new classes
    python benchmarks/images.py norms /tmp/digits        # the low-norm effect, and the penalties of Nemesis
    python benchmarks/images.py speed                    # CoOp against a loop with transformers, at the widths of CLIP

No weights of CLIP are needed. The pre-training uses clean digits with captions; the task has moved, paler and noisy
digits, so that the zero-shot model is worse on them. Classes 0 to 4 are base classes, and 5 to 9 new ones.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from lightning_softprompt.backbones.contrastive.clip import CLIPBackbone
from lightning_softprompt.backbones.loading import load_backbone, try_out
from lightning_softprompt.backbones.skeleton import Skeleton
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import Classes
from lightning_softprompt.data.images.datamodule import ImageClassificationDataModule
from lightning_softprompt.evaluation.metrics.intervals import share_interval, student_interval
from lightning_softprompt.methods import CoCoOp, CoOp, MaPLe, NoPrompt, VisualPromptTuning
from lightning_softprompt.objectives.penalties import AwareNorm, UniformNorm, count_correct, scale_tokens
from lightning_softprompt.prompts.init import FromText
from lightning_softprompt.readouts.image_head import ImageHead

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = (
    "a photo of the digit {}", "the digit {}", "a picture of {}", "an image of the number {}", "a written {}",
    "this is a {}", "the number {} written by hand", "a small photo of a {}",
)  # fmt: skip
WORDS = sorted({word for caption in CAPTIONS for word in caption.format("").split()} | set(NAMES) | {"."})
SPECIAL = ["<pad>", "<s>", "<unk>"]
TEXT = "a photo of the digit"
PRETRAINING, TASK_ROWS = 1000, 400  # digits; the rest is the test
SPLIT_SEED = 1  # the kind of shift was chosen on the test rows of another split, that of seed 0
WINDOW, SHOTS, SEEDS = 24, (1, 2, 4, 8, 16), (0, 1, 2)
STEPS, RATE, BATCH = 150, 0.05, 32


def caption_tokenizer() -> PreTrainedTokenizerFast:
    """Builds a tokenizer of whole words; the end token has the largest id, as in CLIP."""
    words = [*SPECIAL, *WORDS, "<end>"]
    rules = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    rules.pre_tokenizer = Whitespace()
    ends = [("<s>", 1), ("<end>", len(words) - 1)]
    rules.post_processor = TemplateProcessing(single="<s> $A <end>", special_tokens=ends)
    names = {"bos_token": "<s>", "eos_token": "<end>", "pad_token": "<end>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=rules, model_max_length=WINDOW, **names)


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Reads all digits as pixels [1797, 8, 8] from 0 to 1, and their classes, in a fixed random order."""
    digits = load_digits()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(digits.target))
    return digits.images[order] / 16, digits.target[order]


def shift_domain(images: np.ndarray) -> np.ndarray:
    """Moves digits to the right by a pixel, makes them paler, and adds noise."""
    moved = np.roll(images, 1, axis=2)
    noise = np.random.default_rng(SPLIT_SEED).normal(0, 0.08, moved.shape)
    return (moved * 0.7 + 0.1 + noise).clip(0, 1)


def task_rows() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns training and test rows of the task, which the pre-training has not seen."""
    images, labels = read_digits()
    pixels = (shift_domain(images[PRETRAINING:]) * 255).astype(np.uint8)
    rows = [{"image": image, "label": NAMES[label]} for image, label in zip(pixels, labels[PRETRAINING:], strict=True)]
    return rows[:TASK_ROWS], rows[TASK_ROWS:]


def train_clip(folder: Path) -> None:
    """Trains a tiny CLIP on clean digits with captions, and writes it as a folder of transformers."""
    torch.manual_seed(0)
    tokenizer = caption_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": 1, "eos_token_id": len(tokenizer) - 1, "pad_token_id": len(tokenizer) - 1}
    text = {**sizes, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": WINDOW}
    model: Any = CLIPModel(
        CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 8, "patch_size": 2}, projection_dim=64)
    )
    half = [0.5] * 3
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, image_mean=half, image_std=half
    )
    images, labels = read_digits()
    pixels = torch.tensor(images[:PRETRAINING] * 2 - 1, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
    classes = torch.tensor(labels[:PRETRAINING])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    draw = np.random.default_rng(0)
    start = time.process_time()
    for _ in range(500):
        rows = torch.tensor(draw.integers(0, PRETRAINING, 64))
        captions = [CAPTIONS[draw.integers(len(CAPTIONS))].format(NAMES[label]) for label in classes[rows]]
        encoded = tokenizer(captions, padding=True, return_tensors="pt")
        output = model(input_ids=encoded["input_ids"], pixel_values=pixels[rows])
        same = (classes[rows][:, None] == classes[rows]).float()  # captions of the same digit are all correct
        target = same / same.sum(1, keepdim=True)
        loss = cross_entropy(output.logits_per_image, target) + cross_entropy(output.logits_per_text, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = time.process_time() - start
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters, 500 steps in {seconds:.0f} CPU s, last loss {loss.item():.3f}")
    backbone = load_backbone(BackboneSpec(str(folder)))
    module = build(backbone, NoPrompt, "all", f"{TEXT} {{target}} .")
    clean = [
        {"image": (image * 255).astype(np.uint8), "label": NAMES[label]}
        for image, label in zip(images, labels, strict=True)
    ]
    share = accuracy(module, clean[PRETRAINING:], "all")
    print(f"zero-shot accuracy on clean digits that were not trained on: {share:.3f}")


def data_of(
    backbone: Any, classes: Any, template: str, rows: Any = None, shots: int | None = None, seed: int = 0
) -> Any:
    """Creates the data module of some classes and rows."""
    return ImageClassificationDataModule(
        template, labels=list(NAMES), classes_used=classes, shots=shots, seed=seed, train=rows, validation=rows,
        test=rows, backbone=backbone.spec, cache=False,
    )  # fmt: skip


def build(
    backbone: Any, method: Callable[..., Any], classes: str, template: str, seed: int = 0, **arguments: Any
) -> Any:
    """Creates a method on the loaded backbone."""
    spec = BackboneSpec(backbone.spec.name)
    module = method(backbone=spec, classes=data_of(backbone, classes, template).classes, **arguments)
    module.attach(backbone, seed=seed)
    return module.eval()


def batch_of(data: Any, split: str) -> Any:
    """Returns all rows of a split as one batch."""
    rows = data.split(split)
    return data.collate([rows[row] for row in range(len(rows))])


@torch.no_grad()
def accuracy(module: Any, rows: list[dict[str, Any]], classes: str) -> float:
    """Returns the accuracy of a method on the rows of some classes."""
    batch = batch_of(data_of(module.loaded, classes, module.classes.template, rows), "test")
    return count_correct(module.lm(), batch) / len(batch)


def train(module: Any, data: Any, steps: int = STEPS, size: int = BATCH, rate: float = RATE, seed: int = 0) -> None:
    """Trains a method with SGD and a cosine decay of its rate."""
    batch, draw = batch_of(data, "train"), np.random.default_rng(seed)
    parameters = [parameter for group in module.trainable_groups() for parameter in group["params"]]
    optimizer = torch.optim.SGD(parameters, lr=rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    module.train()
    for step in range(steps):
        rows = draw.permutation(len(batch))[:size].tolist()
        loss = module.step(batch.only(rows), progress=step / steps)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    module.eval()


WORDS_INIT = {"init": FromText(TEXT), "length": 5}
RUNS: dict[str, tuple[Callable[..., Any], str, dict[str, Any], dict[str, Any]]] = {
    "CoOp from words": (CoOp, "{soft}{target} .", WORDS_INIT, {}),
    "CoOp, 4 random tokens": (CoOp, "{soft}{target} .", {"length": 4}, {}),
    "CoOp, class-specific": (CoOp, "{soft}{target} .", {**WORDS_INIT, "class_specific": True}, {}),
    "CoCoOp, 60 steps of 4": (CoCoOp, "{soft}{target} .", WORDS_INIT, {"steps": 60, "size": 4}),
    "VPT shallow, 4 tokens": (VisualPromptTuning, f"{TEXT} {{target}} .", {"length": 4}, {}),
    "VPT deep, 4 tokens": (VisualPromptTuning, f"{TEXT} {{target}} .", {"length": 4, "layers": None}, {}),
    "MaPLe, 5 tokens, 2 layers": (MaPLe, "{soft}{target} .", {**WORDS_INIT, "layers": 2}, {}),
    "linear probe": (NoPrompt, f"{TEXT} {{target}} .", {"readout": ImageHead}, {"rate": 5.0}),
}


def compare(folder: Path) -> None:
    """Trains every method with each number of shots and seed, and prints base and new accuracy."""
    backbone = load_backbone(BackboneSpec(str(folder)))
    train_rows, test_rows = task_rows()
    bare = {classes: build(backbone, NoPrompt, classes, f"{TEXT} {{target}} .") for classes in ("base", "new")}
    zero = {classes: accuracy(module, test_rows, classes) for classes, module in bare.items()}
    counts = {
        classes: sum(NAMES.index(row["label"]) // 5 == part for row in test_rows) for part, classes in enumerate(zero)
    }
    cells = ", ".join(f"{name} {with_share(zero[name], count)} of {count}" for name, count in counts.items())
    print(f"zero-shot: {cells}")
    print("| method | shots | base | new | harmonic mean | CPU s |\n|---|---|---|---|---|---|")
    for name, (method, template, arguments, options) in RUNS.items():
        for shots in SHOTS:
            base: list[float] = []
            new: list[float] = []
            start = time.process_time()
            for seed in SEEDS:
                data = data_of(backbone, "base", template, train_rows, shots, seed)
                module = build(backbone, method, "base", template, seed, **arguments)
                train(module, data, seed=seed, **options)
                base.append(accuracy(module, test_rows, "base"))
                other = on_new_classes(module, method, template, arguments)
                new += [] if other is None else [accuracy(other, test_rows, "new")]
            seconds = (time.process_time() - start) / len(SEEDS)
            print_row(name, shots, base, new, seconds)


def on_new_classes(module: Any, method: Callable[..., Any], template: str, arguments: dict[str, Any]) -> Any:
    """Returns the trained prompt with the texts of new classes; None if the method has weights of its classes."""
    if arguments.get("class_specific") or "readout" in arguments:
        return None
    other = build(module.loaded, method, "new", template, **arguments)
    other.load_state_dict(module.state_dict())
    return other


def print_row(name: str, shots: int, base: list[float], new: list[float], seconds: float) -> None:
    """Prints a line of the table, with Student intervals over seeds; `new` is empty for weights of single classes."""
    if not new:
        print(f"| {name} | {shots} | {with_interval(base)} | cannot | | {seconds:.1f} |", flush=True)
        return
    harmonic = 2 / (1 / np.mean(base) + 1 / np.mean(new))
    print(
        f"| {name} | {shots} | {with_interval(base)} | {with_interval(new)} | {harmonic:.3f} | {seconds:.1f} |",
        flush=True,
    )


def with_interval(values: list[float]) -> str:
    """Formats a mean with its 95 % interval over seeds."""
    mean, half_width = student_interval(values)
    return f"{mean:.3f} ± {half_width:.3f}"


def with_share(share: float, rows: int) -> str:
    """Formats a share with its 95 % interval over rows."""
    low, high = share_interval(share, rows)
    return f"{share:.3f} [{low:.3f}, {high:.3f}]"


@torch.no_grad()
def low_norm_positions(module: Any, rows: list[dict[str, Any]]) -> tuple[int, int]:
    """Counts the soft tokens that improve the accuracy if they are scaled down, and all of them."""
    batch = batch_of(data_of(module.loaded, "base", module.classes.template, rows), "test")
    intact = count_correct(module.lm(), batch)
    positions = range(module.tokens.shape[-2])
    improving = 0
    for position in positions:
        counts = [
            count_correct(scale_tokens(module.lm(), batch, [position], scale), batch) for scale in (0.001, 0.1, 0.5)
        ]
        improving += max(counts) > intact
    return improving, len(positions)


def measure_norms(folder: Path) -> None:
    """Prints how often a smaller norm improves accuracy, and base accuracy with the penalties of Nemesis."""
    backbone = load_backbone(BackboneSpec(str(folder)))
    train_rows, test_rows = task_rows()
    template, arguments = "{soft}{target} .", {"length": 8}
    penalties = {"none": None, "uniform": UniformNorm(weight=0.1), "position-aware": AwareNorm(weight=0.1, positions=4)}
    print("| penalty | shots | base | new | mean norm of tokens | low-norm positions |\n|---|---|---|---|---|---|")
    for name, penalty in penalties.items():
        for shots in (1, 4, 16):
            base, new, norms, low, total = [], [], [], 0, 0
            for seed in SEEDS:
                torch.manual_seed(seed)
                module = build(backbone, CoOp, "base", template, seed, penalties=penalty, **arguments)
                train(module, data_of(backbone, "base", template, train_rows, shots, seed), seed=seed)
                base.append(accuracy(module, test_rows, "base"))
                new.append(accuracy(on_new_classes(module, CoOp, template, arguments), test_rows, "new"))
                norms.append(module.tokens.detach().norm(dim=-1).mean().item())
                counts = low_norm_positions(module, test_rows)
                low, total = low + counts[0], total + counts[1]
            cells = f"{with_interval(base)} | {with_interval(new)} | {np.mean(norms):.2f} | {low} of {total}"
            print(f"| {name} | {shots} | {cells} |", flush=True)


def measure_speed(classes: int = 20, images: int = 8, length: int = 16, layers: int = 4) -> None:
    """Times CoOp steps at the widths of CLIP ViT-B/16, with random weights, against loops with transformers."""
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={"num_hidden_layers": layers},
        vision_config={
            "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "patch_size": 16,
            "num_hidden_layers": layers,
        },
    )  # fmt: skip
    skeleton = Skeleton(BackboneSpec("no/weights"), config)
    model: Any = CLIPModel(config).eval().requires_grad_(False)
    backbone = CLIPBackbone(model, skeleton.codec, BackboneSpec("no/weights"))
    try_out(backbone)
    names = [f"class {number} of them" for number in range(classes)]  # one token per character here
    task = Classes({name: [name] for name in names}, "{soft}{target}.")
    module = CoOp(length, backbone=backbone.spec, classes=task)
    module.attach(backbone)
    pixels, labels = torch.randn(images, 3, 224, 224), torch.arange(images) % classes
    row = backbone.codec.encode(Template("{soft}{target}.").pieces({}), "")
    batch = backbone.codec.collate([row] * images, labels=labels.tolist())
    batch = replace(batch, images=pixels, image_keys=tuple(map(str, range(images))))
    readout: Any = module.readout
    texts = readout.texts

    def ours() -> Tensor:
        return module.step(batch)["loss"]

    with torch.no_grad():
        stored = normalized(model.get_image_features(pixel_values=pixels).pooler_output)

    def plain(width: int | None, features: Tensor | None) -> Tensor:
        """CoOp with transformers' layers: texts padded to a width; images each step unless their features are given."""
        if features is None:
            features = normalized(model.get_image_features(pixel_values=pixels).pooler_output)
        embeds = backbone.embed(texts.input_ids)
        start = len(backbone.codec.start)  # soft tokens follow the start token, if the tokenizer has one
        tokens = module.tokens.expand(classes, -1, -1)
        rows = torch.cat([embeds[:, :start], tokens, embeds[:, start:]], dim=1)
        if width is not None:
            rows = torch.nn.functional.pad(rows, (0, 0, 0, width - rows.shape[1]))
        tower, size = model.text_model, rows.shape[1]
        causal = torch.full((size, size), float("-inf")).triu(1)[None, None]
        states = rows + tower.embeddings.position_embedding.weight[:size]
        for layer in tower.encoder.layers:
            states = layer(states, causal)
        ends = texts.mask.sum(1) - 1 + length
        states = tower.final_layer_norm(states[torch.arange(classes), ends])
        words = normalized(model.text_projection(states))
        return cross_entropy(model.logit_scale.exp() * features @ words.T, labels)

    ways = {
        "package": ours,
        "loop, texts padded to 77, images in each step": lambda: plain(77, None),
        "loop, texts padded to the longest, features of images stored": lambda: plain(None, stored),
    }
    results = {}
    for name, step in ways.items():
        step()  # trials, caches
        start, value = time.process_time(), step()
        (gradient,) = torch.autograd.grad(value, module.tokens)
        results[name] = time.process_time() - start, value.item(), gradient
    seconds, loss, gradient = results["package"]
    for name, (other, other_loss, other_gradient) in results.items():
        error = ((other_gradient - gradient).abs().max() / gradient.abs().max()).item()
        differences = f"loss differs by {abs(other_loss - loss):.1e}, gradient by {error:.1e}"
        print(f"{name}: {other:.2f} CPU s, {other / seconds:.1f} times; {differences}")


def normalized(features: Tensor) -> Tensor:
    """Divides features by their norm."""
    return features / features.norm(dim=-1, keepdim=True)


def main() -> None:
    """Runs a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "compare", "norms", "speed"))
    parser.add_argument("folder", nargs="?", type=Path, default=Path("/tmp/digits"), help="folder of the tiny CLIP")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    disable_progress_bar()
    commands = {"train": train_clip, "compare": compare, "norms": measure_norms}
    if arguments.command == "speed":
        measure_speed()
    else:
        commands[arguments.command](arguments.folder)


if __name__ == "__main__":
    main()
