"""Small tokenizers of several types, trained or listed here."""

import json

from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE, Unigram, WordPiece
from tokenizers.normalizers import Lowercase
from transformers import PreTrainedTokenizerFast, XLMRobertaTokenizerFast

from lightning_softprompt.vocabulary.extension import create_extension
from lightning_softprompt.vocabulary.folder import write_tokenizer


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


def unigram(texts, tokenizer_class):
    """Returns a unigram tokenizer of a class of transformers, trained on texts."""
    rules = Tokenizer(Unigram())
    rules.pre_tokenizer = pre_tokenizers.Metaspace()
    first = ["<s>"] if tokenizer_class is XLMRobertaTokenizerFast else []
    special = [*first, "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False)
    rules.train_from_iterator(texts, trainer)
    pieces = json.loads(rules.to_str())["model"]["vocab"]
    return tokenizer_class(vocab=[(piece, score) for piece, score in pieces])


def extend_by_words(tokenizer, words, folder):
    """Writes a tokenizer of whole words with new words, and returns its folder and the tokens that they replace."""
    extension = create_extension(tokenizer)
    for word in words:
        assert extension.add_word(word, 1, 1) is None
    write_tokenizer(folder, extension, "base")
    return folder, [row.base for row in extension.rows]
