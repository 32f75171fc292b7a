import json
import pickle
import re

import numpy as np
import pytest
from batch_samplers import flatten

from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.data.augmentation.mixing import Mixing
from lightning_softprompt.data.augmentation.noise import Noise, misspell
from lightning_softprompt.data.augmentation.paraphrases import Paraphrases
from lightning_softprompt.data.augmentation.templates import Templates
from lightning_softprompt.data.classification import ClassificationDataModule
from lightning_softprompt.data.corpus.datamodule import CorpusDataModule
from lightning_softprompt.data.instruction.datamodule import InstructionDataModule
from lightning_softprompt.data.multitask import MultitaskDataModule
from lightning_softprompt.data.summarization import SummarizationDataModule

TEXTS = ("a warm and funny film", "dull", "this film , good ?", "a sad story about a dog")
ROWS = [{"document": text, "summary": "very good", "label": "good"} for text in TEXTS * 2]
CHAT = [{"instruction": text, "input": "a dog" if number % 2 else "", "output": "good"}
        for number, text in enumerate(TEXTS)]  # fmt: skip


@pytest.fixture
def make_data(tiny_folder):
    def make_data(augment, kind=SummarizationDataModule, **arguments):
        spec = BackboneSpec(name=str(tiny_folder("llama")))
        defaults = {"train": ROWS, "validation": ROWS, "batch_size": 2, "cache": False, "max_tokens": 40}
        if kind is SummarizationDataModule:
            defaults |= {"template": "{soft}{document} it was {target}", "max_target_tokens": 8}
        return kind(backbone=spec, augment=augment, **defaults | arguments)

    return make_data


def training_batches(data, epoch=0):
    loader = data.train_dataloader()
    loader.batch_sampler.set_epoch(epoch)
    return list(loader)


def examples_by_row(data, epoch=0):
    rows = {}
    for batch in training_batches(data, epoch):
        rows |= dict(zip(batch.row_ids, batch.examples, strict=True))
    return [rows[row] for row in sorted(rows)]


def test_changes_depend_on_seed_epoch_and_row_and_spare_validation_and_unchanged_rows(make_data):
    noise = Noise("document", dropout=0.3, swap=0.3, casing=0.5)
    data = make_data(noise)
    first, second = examples_by_row(data), examples_by_row(data, epoch=1)
    assert examples_by_row(make_data(noise)) == first
    assert second != first
    assert examples_by_row(make_data(noise, seed=1)) != first
    assert len({example.fields["document"] for example in first}) > len(TEXTS)
    assert {example.target for example in first} == {"very good"}
    plain = make_data(None)
    for loader in (data.val_dataloader(), data.training_sample(4)[0]):
        assert {example.fields["document"] for batch in loader for example in batch.examples} <= set(TEXTS)
    assert data.split("train").encoded == plain.split("train").encoded
    workers = make_data(noise, num_workers=1)
    assert [batch.encoded for batch in training_batches(workers)] == [batch.encoded for batch in training_batches(data)]


def test_the_tokens_are_those_of_the_changed_text(make_data):
    data = make_data([Templates(["{soft}story : {document} {target}", "{soft}{document} is {target}"])])
    decoded = [data.codec.decode(batch.input_ids)[b] for batch in training_batches(data) for b in range(len(batch))]
    assert all(re.match("story :|.* is very good", text) for text in decoded)
    assert {text.startswith("story") for text in decoded} == {True, False}
    pickle.loads(pickle.dumps(data.train_dataloader().dataset))


def test_noise_keeps_a_word_and_changes_only_what_its_rates_say():
    rng = np.random.default_rng(0)
    text = "one two\nthree  four"
    assert Noise("x", dropout=1.0).change(text, rng) in text.split()
    assert Noise("x", casing=1.0).change(text, rng) in (text.lower(), text.upper())
    swapped = Noise("x", swap=1.0).change(text, rng)
    assert swapped == "two three\nfour  one"  # gaps stay in place
    shortened = [Noise("x", dropout=0.5).change(text, rng) for _ in range(50)]
    assert len(set(shortened)) > 10
    assert all(set(words.split()) <= set(text.split()) for words in shortened)
    assert Noise("x", typo=0.5).change("", rng) == ""
    typos = {misspell("word", rng) for _ in range(200)}
    assert typos == {"wrd", "wod", "woord", "worrd", "wrod", "wodr"}
    assert misspell("an", rng) == "an"


def test_mixing_joins_two_different_rows_that_fit(make_data):
    rows = [{"document": f"{word} dog", "summary": word} for word in ("good", "bad", "sad")]
    data = make_data(Mixing(share=1.0), train=rows)
    for epoch in range(3):
        for example in examples_by_row(data, epoch):
            first, second = re.fullmatch(r"1\. (\w+) dog\n2\. (\w+) dog", example.fields["document"]).groups()
            assert first != second
            assert example.target == f"1. {first}\n2. {second}"
    long = [{"document": "a dog " * 10, "summary": "good"} for _ in range(3)]
    assert {example.target for example in examples_by_row(make_data(Mixing(share=1.0), train=long))} == {"good"}


def test_paraphrases_replace_texts_that_have_some(make_data, tmp_path):
    path = tmp_path / "paraphrases.jsonl"
    path.write_text(json.dumps({"text": "dull", "paraphrases": ["very dull", "is dull"]}) + "\n")
    data = make_data(Paraphrases(str(path), "document", share=1.0))
    documents = {example.fields["document"] for epoch in range(6) for example in examples_by_row(data, epoch)}
    assert documents == {*TEXTS, "very dull", "is dull"} - {"dull"}
    path.write_text('{"text": "dull"}')
    with pytest.raises(ValueError, match="line 1: expected JSON"):
        make_data(Paraphrases(str(path), "document")).train_dataloader()
    path.write_text('{"text": "dull", "paraphrases": []}')
    with pytest.raises(ValueError, match="has no paraphrases"):
        make_data(Paraphrases(str(path), "document")).train_dataloader()


def test_the_last_user_turn_of_dialogues_is_changed(make_data):
    frames = ["story : {instruction}\n{input}", "{input} {instruction}"]
    data = make_data(Templates(frames), InstructionDataModule, train=CHAT, validation=CHAT, max_target_tokens=8)
    turns = {example.turns[-1].text for epoch in range(12) for example in examples_by_row(data, epoch)}
    assert {"story : a warm and funny film", "a warm and funny film", "story : dull\na dog", "a dog dull"} <= turns
    noisy = make_data(Noise("instruction", casing=1.0), InstructionDataModule, train=CHAT, validation=CHAT,
                      max_target_tokens=8)  # fmt: skip
    assert {example.turns[-1].text.removesuffix("\n\na dog") for example in examples_by_row(noisy)} <= {
        text for original in TEXTS for text in (original, original.upper())
    }
    dialogue = [{"messages": [{"role": role, "content": "dull"} for role in ("user", "assistant") * 2]}] * 2
    mixed = make_data(Noise("instruction", casing=1.0), InstructionDataModule, train=dialogue, validation=dialogue,
                      max_target_tokens=8)  # fmt: skip
    roles = {tuple(turn.role for turn in example.turns) for example in examples_by_row(mixed)}
    assert roles == {("user", "assistant", "user")}


def test_a_labelled_row_keeps_its_class(make_data):
    labels = {"template": "{document} it was {target}", "labels": ["good", "bad"]}
    data = make_data([Templates(["a {document} {target}"])], ClassificationDataModule, **labels)
    assert {int(label) for batch in training_batches(data) for label in batch.labels} == {0}


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        (Templates(["{soft}{other} {target}"]), r"has the columns \['other'\]"),
        (Templates(["{soft}{document}{target}"]), "has 0 spaces before {target}"),
        (Templates(["{soft}{document}{soft} {target}"]), "has 2 soft blocks"),
        (Noise("other", dropout=0.1), "'other' is not a column"),
    ],
)
def test_unsuitable_changes_are_refused_before_the_first_step(make_data, augment, message):
    with pytest.raises(ValueError, match=message):
        make_data(augment).train_dataloader()


def test_other_data_modules_refuse_what_they_cannot_change(make_data, tmp_path):
    noise = Noise("document", dropout=0.1)
    labels = {"template": "{document} it was {target}", "labels": ["good", "bad"]}
    with pytest.raises(ValueError, match="requires free text"):
        make_data(Mixing(), ClassificationDataModule, **labels).train_dataloader()
    with pytest.raises(ValueError, match="remove batch_tokens"):
        make_data(noise, batch_tokens=200)
    with pytest.raises(ValueError, match="CorpusDataModule cannot change its training rows"):
        make_data(noise, CorpusDataModule)
    with pytest.raises(ValueError, match=r"remove their .* augment"):
        MultitaskDataModule({"one": make_data(noise)}).split("train")
    with pytest.raises(ValueError, match=r"must have {instruction}"):
        make_data(Templates(["{input}"]), InstructionDataModule, train=CHAT, validation=CHAT,
                  max_target_tokens=8).train_dataloader()  # fmt: skip
    with pytest.raises(ValueError, match="probabilities"):
        Noise("x", dropout=2.0)


def test_a_curriculum_and_a_change_of_rows_compose(make_data):
    from lightning_softprompt.data.curricula.easy_to_hard import EasyToHard
    from lightning_softprompt.data.difficulty.tokens import PromptTokens

    data = make_data(Noise("document", casing=1.0), curriculum=EasyToHard(PromptTokens()))
    rows = flatten(batch.row_ids for batch in training_batches(data, epoch=1))
    plain = flatten(batch.row_ids for batch in training_batches(make_data(None, curriculum=data.curriculum), epoch=1))
    assert rows == plain
    lengths = np.array(data.split("train").lengths)[rows]
    assert lengths.tolist() == sorted(lengths.tolist())
