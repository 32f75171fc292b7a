"""Spellings of control tokens in the columns of rows stay text, in every data module."""

from collections import Counter

import pytest
import tiny
from questions import LEXICAL

from lightning_softprompt.cli.plugins import import_plugins
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.chat_format import ChatFormat
from lightning_softprompt.data.classification import ClassificationDataModule
from lightning_softprompt.data.corpus.datamodule import CorpusDataModule
from lightning_softprompt.data.corpus.sentence_pairs import SentencePairDataModule
from lightning_softprompt.data.datamodule import SoftPromptDataModule
from lightning_softprompt.data.instruction.datamodule import InstructionDataModule
from lightning_softprompt.data.multiple_choice import MultipleChoiceDataModule
from lightning_softprompt.data.multitask import MultitaskDataModule
from lightning_softprompt.data.preference import PreferenceDataModule
from lightning_softprompt.data.prompts import PromptDataModule
from lightning_softprompt.data.summarization import SummarizationDataModule
from lightning_softprompt.data.tagging import TaggingDataModule
from lightning_softprompt.rag.passage_selection import PassageSettings
from lightning_softprompt.rag.qa_datamodule import RagQaDataModule
from lightning_softprompt.rag.relevance_datamodule import RelevanceDataModule
from lightning_softprompt.retrieval.index_builder import build_index
from lightning_softprompt.retrieval.passages.documents import Document
from lightning_softprompt.retrieval.retriever import Retriever

CHAT = ChatFormat("", "<s> great : ", "</s>", "<s> what ", "</s>", "<s> well ", "</s>", " ! ", system="good")
LABELS = {"positive": "good", "negative": "bad"}


def options_of(rows, spec):
    """Returns arguments of every data module: the same rows for training and validation."""
    return {"backbone": spec, "train": rows, "validation": rows, "cache": False}


def classification(text, spec, retriever):
    rows = [{"text": text, "label": "positive"}, {"text": "dull", "label": "negative"}]
    template = "{soft}<s>{text}</s> it was {target}"
    return ClassificationDataModule(template, LABELS, demonstrations=1, **options_of(rows, spec))


def summarization(text, spec, retriever):
    rows = [{"document": text, "summary": f"{text} good", "about": text}]
    template = "{soft}<s>{document}</s> : {about} {target}"
    return SummarizationDataModule(template, max_target_tokens=20, **options_of(rows, spec))


def tagging(text, spec, retriever):
    rows = [{"tokens": text.split(), "tags": ["O"] * len(text.split())}]
    return TaggingDataModule(template="{soft}<s>{tokens}</s>{target}", tags=["O", "A"], **options_of(rows, spec))


def multiple_choice(text, spec, retriever):
    rows = [{"question": text, "options": [f"{text} good", "bad"], "answer": 0}]
    template = "{soft}<s>{question} {options}</s> {target}"
    return MultipleChoiceDataModule(template, max_option_tokens=20, **options_of(rows, spec))


def multitask(text, spec, retriever):
    tasks = {"a": classification(text, spec, retriever), "b": summarization(text, spec, retriever)}
    return MultitaskDataModule(tasks, backbone=spec)


def corpus(text, spec, retriever):
    return CorpusDataModule(**options_of([{"text": text}, {"text": f"dull {text}"}], spec))


def sentence_pairs(text, spec, retriever):
    rows = [{"text": f"{text}\ngood"}, {"text": f"dull\n{text}\nbad"}]
    template = "{soft}<s>{first}{separator}{second}</s> {target}"
    return SentencePairDataModule(template, words=("good", "bad"), **options_of(rows, spec))


def preference(text, spec, retriever):
    rows = [{"prompt": text, "chosen": f"good {text}", "rejected": f"{text} bad"}]
    return PreferenceDataModule("{soft}<s>{prompt}</s> {target}", **options_of(rows, spec))


def prompts(text, spec, retriever):
    rows = [{"prompt": text, "best": f"{text} good"}]
    return PromptDataModule("{soft}<s>{prompt}</s> {target}", references="best", **options_of(rows, spec))


def instruction(text, spec, retriever):
    turns = [("system", text), ("user", text), ("assistant", text), ("user", text), ("assistant", f"{text} good")]
    rows = [
        {"instruction": text, "input": text, "output": f"{text} good"},
        {"messages": [{"role": role, "content": content} for role, content in turns]},
    ]
    return InstructionDataModule(chat_format=CHAT, **options_of(rows, spec))


def questions_of(text):
    return [{"question": f"{text} sad", "answers": [f"{text} good"], "positive_ids": ["dog"]}]


def question_answering(text, spec, retriever):
    passages = PassageSettings(template="<s>{heading}{text}</s>", count=2)
    template = "{soft}<s>{passages}{question}</s> {target}"
    options = options_of(questions_of(text), spec)
    return RagQaDataModule(template, retriever=retriever, passages=passages, max_target_tokens=20, **options)


def relevance(text, spec, retriever):
    template = "{soft}<s>{question}{title}{passage}</s> {target}"
    words = {"relevant": "good", "irrelevant": "bad"}
    return RelevanceDataModule(retriever, template, words, **options_of(questions_of(text), spec))


MAKERS = {  # a new data module is a new row
    ClassificationDataModule: classification,
    CorpusDataModule: corpus,
    InstructionDataModule: instruction,
    MultipleChoiceDataModule: multiple_choice,
    MultitaskDataModule: multitask,
    PreferenceDataModule: preference,
    PromptDataModule: prompts,
    RagQaDataModule: question_answering,
    RelevanceDataModule: relevance,
    SentencePairDataModule: sentence_pairs,
    SummarizationDataModule: summarization,
    TaggingDataModule: tagging,
}


def count_control_tokens(module):
    """Returns how often the inputs and the targets of all training rows contain each control token."""
    counts = Counter()
    for batch in module.train_dataloader():
        counts.update(f"input {id}" for id in batch.input_ids[batch.mask].tolist() if id in (tiny.BOS, tiny.EOS))
        counts.update(f"target {id}" for id in batch.targets.flatten().tolist() if id in (tiny.BOS, tiny.EOS))
    return counts


def test_each_data_module_has_a_row():
    import_plugins()
    names = {cls.__name__ for cls in SoftPromptDataModule.__subclasses__() if cls.__module__.startswith("lightning")}
    assert {cls.__name__ for cls in MAKERS} == names - {"ImageClassificationDataModule"}  # whose rows have no text


@pytest.mark.parametrize("make", MAKERS.values(), ids=[cls.__name__ for cls in MAKERS])
def test_control_tokens_come_from_the_template_only(make, tiny_folder, tmp_path):
    spec = BackboneSpec(name=str(tiny_folder("llama")))
    counts = []
    for number, text in enumerate(("a </s> dog <s>", "a x dog x")):
        folder = tmp_path / str(number)
        documents = [Document("dog", text, f"{text} is sad"), Document("film", text, f"{text} warm film")]
        build_index(folder, documents, LEXICAL)
        module = make(text, spec, Retriever(str(folder), "lexical"))
        counts.append(count_control_tokens(module))
        if module.classes is not None:
            assert [row.get("text", text) for row in module.classes.demonstrations] in ([], [text, "dull"])
    spelled, ordinary = counts
    assert spelled == ordinary
    assert ordinary[f"input {tiny.BOS}"] > 0
    ends_text = make is not prompts and (module.append_eos or make is corpus or make is multitask)
    assert ordinary[f"input {tiny.EOS}"] > 0
    assert (ordinary[f"target {tiny.EOS}"] > 0) == ends_text
