"""`BackboneSpec`: which frozen language model, and how it runs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

LinearBackend = Literal["auto", "plain", "prepacked", "bf16"]
Quantization = Literal["torchao-int8", "bitsandbytes-int8", "bitsandbytes-nf4"]


@dataclass(frozen=True)
class BackboneSpec:
    """Which frozen language model to load, and how to hold it in memory.

    Args:
        name: A hub id, a local folder, or `smollm2-135m-instruct`, which is a Python package and requires no hub.
        revision: Branch, tag or commit of a hub id.
        gguf_file: Name of a GGUF file of a causal model in a local folder. It is converted once and cached.
        vocabulary: A folder that `softprompt vocabulary extend` wrote: the tokenizer is extended by its tokens, and the
            embedding table and the head by their rows. A row is the mean of the rows of the tokens that it replaces,
            unless `NewTokens` trains it. A prompt is bound to the extended vocabulary.
        dtype: Precision of the frozen weights. Soft prompts are always float32.
        quantization: How the matrices of the layers are quantized to 8 or 4 bits, by transformers' own configs. Other
            weights and all products have `dtype`. Gradients are those of the quantized weights. It requires the extra
            `quantized`. A prompt is bound to the weights that it was trained on.
        accept_prompts_of: Fingerprint of another backbone whose prompts are accepted, such as the one that this
            backbone is a quantized version of.
        attention: Attention implementation of transformers. None uses `sdpa` if the model supports it, and `eager`
            otherwise.
        packed: Whether the rows of a batch run as one sequence, without padding and with their shared beginning once,
            if the model allows it. Loss and gradients are the same, several times faster.
        checkpointing: Whether the backward pass recomputes activations of layers: less memory, about 1.4 times the
            time.
        compiled: Whether to compile the layers with `torch.compile`. It requires a C++ compiler, takes a minute in the
            first steps, and is faster mostly on GPUs.
        linear_backend: How float32 products with frozen weights run on a CPU: `prepacked` packs the weights once for
            oneDNN, which takes three times their memory; `auto` does so if it is faster on this machine; `bf16`
            multiplies in bfloat16, a faster approximation that requires a CPU with such instructions; `plain` uses
            PyTorch's products.
        context_memory: MiB in memory for keys and values of the text before a row's first soft token. They are computed
            once and used in all epochs.
        context_disk: MiB on disk for those that do not fit in memory.
        padding_side: On which side shorter rows are padded. The logits do not depend on it.
        start_token: The token at the start of each row of a causal model: `tokenizer` adds what the tokenizer adds,
            `bos` the start token (the end token if there is no start token), and `none` nothing. `auto` adds what the
            tokenizer adds, or else its start token, if it defines one. A template that begins with the token, such as a
            chat template, does not get it twice.
    """

    name: str = "smollm2-135m-instruct"
    revision: str | None = None
    gguf_file: str | None = None
    vocabulary: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantization: Quantization | None = None
    accept_prompts_of: str | None = None
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = None
    packed: bool = True
    checkpointing: bool = False
    compiled: bool = False
    linear_backend: LinearBackend = "auto"
    context_memory: int = 1024
    context_disk: int = 0
    padding_side: Literal["right", "left"] = "right"
    start_token: Literal["auto", "bos", "tokenizer", "none"] = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", os.path.expanduser(self.name))
        if self.vocabulary is not None:
            object.__setattr__(self, "vocabulary", os.path.expanduser(self.vocabulary))
