"""Small tokenizers of several types, trained or listed here."""

from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE, WordPiece
from tokenizers.normalizers import Lowercase
from transformers import PreTrainedTokenizerFast


def byte_pairs(texts, size):
    """Returns a byte-level byte-pair encoding that is trained on texts."""
    rules = Tokenizer(BPE())
    rules.pre_tokenizer, rules.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=["<s>", "</s>", "<pad>"])
    rules.train_from_iterator(texts, trainer)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=rules, **special)


def word_pieces():
    """Returns a WordPiece tokenizer of a few pieces."""
    words = ["[UNK]", "[PAD]", "cardio", "##logy", "wing", "a"]
    rules = Tokenizer(WordPiece({word: id for id, word in enumerate(words)}, unk_token="[UNK]"))
    rules.normalizer, rules.pre_tokenizer = Lowercase(), pre_tokenizers.Whitespace()
    rules.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=rules, unk_token="[UNK]", pad_token="[PAD]")
