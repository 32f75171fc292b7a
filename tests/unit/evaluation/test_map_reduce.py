from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from scripted_answers import encode_answers, make_batches

from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import Example
from lightning_softprompt.evaluation.generation import GenerationEvaluation
from lightning_softprompt.evaluation.map_reduce import MapReduce
from lightning_softprompt.methods import PromptTuning

FAMILIES = ("llama", "t5")
TEMPLATE = Template("{soft}{text} it was {target}", ["text"])
MAX_TOKENS = 14
LONG = " ".join(["A dog is good . The film was very long and dull indeed . It is a story about a sad dog !"] * 3)


class FirstWordsModel:
    """A language model that summarizes a text as its first words, and records the texts of each batch.

    It requires that no text is truncated and that the batch contains the tokens of its examples.
    """

    def __init__(self, backbone, num_words):
        self.backbone, self.num_words = backbone, num_words
        self.texts = []

    def generate(self, batch, **options):
        self._check_rows(batch)
        texts = [example.fields["text"] for example in batch.examples]
        self.texts.append(texts)
        return encode_answers(self.backbone.codec, [self.summarize(text) for text in texts])

    def summarize(self, text):
        return " ".join(text.split()[: self.num_words])

    def _check_rows(self, batch):
        codec = self.backbone.codec
        template = Template(TEMPLATE.text, TEMPLATE.columns)
        rows = [codec.encode(template.pieces(example.fields), "", MAX_TOKENS) for example in batch.examples]
        assert all(row.num_truncated == 0 for row in rows)
        assert torch.equal(codec.collate(rows).input_ids, batch.input_ids)


@pytest.fixture
def reduce(backbone):
    return MapReduce(backbone.codec, TEMPLATE, "text", MAX_TOKENS, Decoding(max_new_tokens=4))


def test_parts_end_with_a_sentence_if_more_than_half_of_the_length_is_used(reduce):
    two_sentences = "It is a dog . This film was dull !"  # three sentences do not fit
    assert reduce.parts({"text": " ".join([two_sentences] * 20)}) == [two_sentences] * 20
    short_sentence = "No . It is a dog and it is a very sad story about the very sad dog"
    assert reduce.parts({"text": short_sentence}) == [
        "No . It is a dog and it is a very",
        "sad story about the very sad dog",
    ]


def test_parts_contain_all_words_of_the_document(reduce):
    assert " ".join(reduce.parts({"text": LONG})) == LONG
    assert reduce.parts({"text": " a dog . "}) == ["a dog ."]
    assert reduce.parts({"text": ""}) == [""]


def test_parts_without_sentence_ends_are_as_long_as_possible(reduce):
    document = " ".join(["dog"] * 1000)
    parts = reduce.parts({"text": document})
    assert " ".join(parts) == document
    assert not any(reduce.fits({"text": f"{part} dog"}) for part in parts[:-1])


def test_a_word_that_does_not_fit_is_split(backbone):
    reduce = MapReduce(backbone.codec, Template("{text} {target}"), "text", 9, Decoding(max_new_tokens=4))

    def encode(pieces, *_):  # one token per character
        return SimpleNamespace(num_truncated=max(0, len(pieces[1].text) - 9))

    reduce.codec = SimpleNamespace(encode=encode)
    parts = reduce.parts({"text": "." * 100})
    assert [len(part) for part in parts] == [9] * 11 + [1]


def test_summaries_are_summarized_until_one_is_left(backbone, reduce):
    codec, lm = backbone.codec, FirstWordsModel(backbone, 3)
    examples = [Example({"text": LONG}, ""), Example({"text": "a dog"}, "")]
    (batch,) = make_batches(codec, TEMPLATE, examples)
    summary = reduce(lm, batch, 0)
    rounds = [reduce.parts({"text": LONG})]
    while len(rounds[-1]) > 1:
        token_ids = [codec.ids(lm.summarize(part)) for part in rounds[-1]]
        summaries = [codec.tokenizer.decode(ids, skip_special_tokens=True) for ids in token_ids]
        rounds.append(reduce.parts({"text": " ".join(summaries)}))
    assert len(rounds) > 2
    assert summary.split() == rounds[-1][0].split()[:3]
    assert list(chain.from_iterable(lm.texts)) == list(chain.from_iterable(rounds))
    assert all(len(texts) <= len(batch) for texts in lm.texts)


def test_predict_summarizes_only_documents_that_do_not_fit_in_parts(backbone, reduce):
    codec = backbone.codec
    examples = [Example({"text": text}, "") for text in ("a dog", LONG, "dull film")]
    rows = [codec.encode(TEMPLATE.pieces(example.fields), "", MAX_TOKENS) for example in examples]
    batch = codec.collate(rows, row_ids=[0, 1, 2], examples=examples)
    module = PromptTuning(length=2, backbone=backbone.spec)
    module.attach(backbone)
    lm = module.eval().lm()
    truncating = GenerationEvaluation(reduce.decoding, "text")
    reducing = GenerationEvaluation(
        reduce.decoding, "text", long_documents="map_reduce", template=TEMPLATE, max_tokens=MAX_TOKENS
    )
    first, long, last = [record["prediction"] for record in reducing.predict(lm, batch)]
    truncated = [record["prediction"] for record in truncating.predict(lm, batch)]
    assert [first, last] == [truncated[0], truncated[2]]
    assert long == reduce(lm, batch, 1)


def test_unknown_columns_and_summaries_that_do_not_fit_are_rejected(backbone):
    with pytest.raises(ValueError, match=r"no column 'document' for documents, only \('text',\)"):
        MapReduce(backbone.codec, TEMPLATE, "document", 40, Decoding())
    with pytest.raises(ValueError, match="decrease max_new_tokens or increase max_tokens"):
        MapReduce(backbone.codec, TEMPLATE, "text", 40, Decoding(max_new_tokens=20))


def test_other_columns_that_leave_no_room_for_the_document_are_rejected(backbone):
    template = Template("{soft}{title} {text} it was {target}")
    reduce = MapReduce(backbone.codec, template, "text", MAX_TOKENS, Decoding(max_new_tokens=4))
    with pytest.raises(ValueError, match="leave no room for 'text' in max_tokens=14"):
        reduce.parts({"title": "dog " * 30, "text": "a dog"})


def test_summaries_that_do_not_get_shorter_are_rejected(backbone, reduce):
    document = Example({"text": " ".join(["dog"] * 40)}, "")
    batch = make_batches(backbone.codec, TEMPLATE, [document])[0]
    with pytest.raises(ValueError, match=r"the summaries of \d+ parts of a document have"):
        reduce(FirstWordsModel(backbone, 9), batch, 0)
