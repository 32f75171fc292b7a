"""Tiny random backbones of every family with a tokenizer built here, and rows for them. Nothing is downloaded."""

from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils.logging import disable_progress_bar

from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import IGNORE, Classes

WINDOW = 48
WORDS = """
    a about and bad dog dull ends film ful funny good great indeed is it label long never of one sad said story text
    that the this very warm was well what wonder wonderful . : , ? !
""".split()  # noqa: SIM905
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
PAD, BOS, EOS, UNK, MASK = range(5)
V = len(SPECIAL) + len(WORDS)

CAUSAL, SEQ2SEQ, MASKED = ("llama", "gpt2"), ("t5", "bart"), ("bert",)
FAMILIES = (*CAUSAL, *SEQ2SEQ, *MASKED)
CONTRASTIVE = ("clip", "siglip")  # which compare images with texts; FAMILIES predict words
PIXELS = 8  # side of the images of tiny backbones

TEMPLATES = {  # position of the soft tokens
    "front": "{soft}{text} it was {target}",
    "middle": "{text}{soft} it was {target}",
    "end": "{text} it was{soft} {target}",
}
TEXTS = ("a warm and funny film", "dull", "it is a sad story about a dog that never ends well", "this film , good ?")
TARGETS = ("very good indeed", "bad", "sad", "very great")
SHOWN = ({"text": "a funny dog", "target": "good"}, {"text": "dull", "target": "bad"})
WORDS_OF = {"positive": [" good", " great"], "negative": [" bad"], "neutral": [" long"]}
CLASSES = Classes(WORDS_OF, TEMPLATES["front"], SHOWN)

# How each family's tokenizer opens and closes rows, and its special tokens. GPT-2's BOS is its EOS; it has no padding.
AROUND = {"llama": "<s> $A", "gpt2": "$A", "t5": "$A </s>", "bart": "<s> $A </s>", "bert": "<s> $A </s>"}
AROUND |= {"clip": "<s> $A <end>", "siglip": "$A </s>"}
END = V  # the end token of CLIP, whose id is the largest of the vocabulary
NAMED = {
    "llama": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
    "gpt2": {"bos_token": "</s>", "eos_token": "</s>"},
    "t5": {"eos_token": "</s>", "pad_token": "<pad>"},
    "bart": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"},
    "bert": {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"},
    "clip": {"bos_token": "<s>", "eos_token": "<end>", "pad_token": "<end>"},
    "siglip": {"eos_token": "</s>", "pad_token": "</s>"},
}


def tokenizer(family):
    """Return a tokenizer whose tokens are whole words; spaces belong to none of them."""
    words = [*SPECIAL, *WORDS, "<end>"] if family == "clip" else [*SPECIAL, *WORDS]
    rules = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    rules.pre_tokenizer = Whitespace()
    special = [("<s>", BOS), ("</s>", EOS)]
    special += [("<end>", END)] if family == "clip" else []
    rules.post_processor = TemplateProcessing(single=AROUND[family], special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=rules, unk_token="<unk>", model_max_length=WINDOW, **NAMED[family])


def model(family):
    """Return a model with random weights, large enough that a word in another position changes the logits."""
    ends = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    if family == "llama":
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": WINDOW}
        return LlamaForCausalLM(LlamaConfig(vocab_size=V, initializer_range=0.25, **heads, **sizes, **ends))
    if family == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": WINDOW}
        drop = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}  # changes the logits if it is not disabled
        config = GPT2Config(vocab_size=V, initializer_range=0.25, bos_token_id=EOS, eos_token_id=EOS, **sizes, **drop)
        return GPT2LMHeadModel(config)
    if family == "t5":
        layers = {
            "num_layers": 3,
            "num_decoder_layers": 2,
        }  # with more decoder layers, transformers caches too few
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 3, "relative_attention_num_buckets": 8}
        start = {"pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": PAD}
        return T5ForConditionalGeneration(T5Config(vocab_size=V, initializer_factor=1.0, **layers, **sizes, **start))
    if family == "bart":
        layers = {"encoder_layers": 3, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
        heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 2, "forced_eos_token_id": None}
        sizes = {"d_model": 32, "max_position_embeddings": WINDOW, "init_std": 0.25, "decoder_start_token_id": EOS}
        return BartForConditionalGeneration(BartConfig(vocab_size=V, **layers, **heads, **sizes, **ends))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    if family in CONTRASTIVE:
        return contrastive_model(family, sizes)
    config = BertConfig(vocab_size=V, max_position_embeddings=WINDOW, initializer_range=0.25, pad_token_id=PAD, **sizes)
    return BertForMaskedLM(config)


def contrastive_model(family, sizes):
    """Return a model of images and texts whose towers have different widths."""
    text = {**sizes, "vocab_size": V + 1, "max_position_embeddings": WINDOW, "pad_token_id": PAD, "bos_token_id": BOS}
    text["eos_token_id"] = END if family == "clip" else EOS
    image = {**sizes, "hidden_size": 40, "image_size": PIXELS, "patch_size": 4, "initializer_range": 0.25}
    if family == "clip":
        config = CLIPConfig(text_config=text, vision_config=image, projection_dim=24, initializer_factor=4.0)
        return CLIPModel(config)
    return SiglipModel(SiglipConfig(text_config={**text, "projection_size": 40}, vision_config=image))


def save(family, folder: Path, seed=0):
    """Write a folder like a model repository of a hub."""
    disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model(family).save_pretrained(folder)
    tokenizer(family).save_pretrained(folder)
    if family in CONTRASTIVE:
        size = {"height": PIXELS, "width": PIXELS}
        CLIPImageProcessorPil(size={"shortest_edge": PIXELS}, crop_size=size).save_pretrained(folder)
    return folder


def on_side(codec, side):
    """Return the codec with padding on a side."""
    return type(codec)(codec.tokenizer, side)


def encode_rows(codec, template, texts=TEXTS, targets=TARGETS, **options):
    """Return the encoded rows of a template with the one column `text`."""
    parsed = Template(template, options.pop("truncate", ()))
    pairs = zip(texts, targets, strict=True)
    return [codec.encode(parsed.pieces({"text": text}), target, **options) for text, target in pairs]


def batch_of(codec, template=TEMPLATES["front"], texts=TEXTS, targets=TARGETS, labels=None, **options):
    """Return the batch of the rows of a template."""
    return codec.collate(encode_rows(codec, template, texts, targets, **options), labels=labels)


def image_batch(codec, labels=None):
    """Return a batch of four random images, whose rows have no text but that of the template."""
    row = codec.encode(Template("{soft}a story about {target} .").pieces({}), "")
    images = torch.randn(4, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(0))
    batch = codec.collate([row] * 4, labels=labels)
    return replace(batch, images=images, image_keys=("a", "b", "c", "d"))


def list_answers(ids):
    """Return the ids of each answer up to its end token, without padding."""
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in ids.tolist()]


def more_padding(batch, left, right, pad_id):
    """Return the batch with more padding on both sides."""
    pad = torch.nn.functional.pad
    return replace(
        batch,
        input_ids=pad(batch.input_ids, (left, right), value=pad_id),
        mask=pad(batch.mask, (left, right)),
        source=pad(batch.source, (left, right)),
        slots=batch.slots + left,
    )


def perturb(module, scale=1.0):
    """Add noise to the trainable parameters, since some methods start without any effect, and return the module."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)
    return module


def row(batch, b):
    """Return one row of a batch with its padding."""
    return batch._map(lambda tensor: tensor[b : b + 1])


def real(batch, logits):
    """[B, U, V] -> [targets, V]: the logits of targets that are not ignored."""
    return logits[batch.targets != IGNORE]
