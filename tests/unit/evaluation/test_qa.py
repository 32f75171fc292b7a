import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import Example, ShownPassage
from lightning_softprompt.evaluation.by_task import EvaluationByTask
from lightning_softprompt.evaluation.metrics.answers import (
    answer_scores,
    contain_answer,
    grounded_fraction,
    split_citations,
)
from lightning_softprompt.evaluation.metrics.intervals import bootstrap
from lightning_softprompt.evaluation.metrics.retrieval import retrieval_names, retrieval_scores
from lightning_softprompt.evaluation.metrics.text import rouge
from lightning_softprompt.evaluation.qa import QaEvaluation
from lightning_softprompt.methods import PromptTuning

FAMILIES = ("llama", "t5")
TEMPLATE = Template("{soft}{question} it was {target}", ["question"])
ROWS = 11
ABSTAIN = "never ends"
NONE = (3, 7)  # rows without an answer


def sentence(generator, low=1, high=4):
    return " ".join(generator.choices(tiny.WORDS[:-5], k=generator.randint(low, high)))


@pytest.fixture
def examples():
    generator, made = random.Random(0), []
    for row in range(ROWS):
        right = () if row in NONE else tuple(sentence(generator) for _ in range(generator.randint(1, 3)))
        found = tuple(generator.sample([f"d{i}" for i in range(12)], 6))
        texts = [sentence(generator, 3, 9) for _ in range(3)]
        texts[0] += f" {right[-1]}" if right and row % 2 else ""
        shown = tuple(ShownPassage(found[i], text, i) for i, text in enumerate(texts))
        gold = () if row in NONE else tuple(generator.sample([f"d{i}" for i in range(12)], 1 + row % 2))
        fields = {"question": f"what is {sentence(generator)}"}
        made.append(
            Example(fields, right[0] if right else ABSTAIN, references=right, passages=shown, found=found, gold=gold)
        )
    return made


@pytest.fixture
def said(examples):
    generator = random.Random(1)
    answers = [sentence(generator) for _ in range(ROWS)]
    answers[0], answers[1] = examples[0].references[-1], ""
    answers[2], answers[3] = ABSTAIN, "Never ends !"
    answers[4] = f"very {examples[4].references[0]} indeed"
    return answers


def batches_of(codec, examples, size=4, numbers=None):
    numbers = list(range(len(examples))) if numbers is None else numbers
    made = []
    for start in range(0, len(numbers), size):
        part = numbers[start : start + size]
        rows = [codec.encode(TEMPLATE.pieces(examples[i].fields), examples[i].target, 40) for i in part]
        made.append(codec.collate(rows, row_ids=part, examples=[examples[i] for i in part]))
    return made


class Says:
    """Says a text for each row, whatever it is asked."""

    def __init__(self, backbone, texts):
        self.backbone, self.texts = backbone, texts

    def generate(self, batch, **options):
        ids = [torch.tensor([*self.backbone.codec.ids(self.texts[row].lower()), tiny.EOS]) for row in batch.row_ids]
        return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tiny.PAD)


def passed(evaluation, lm, batches, stage="test"):
    """A pass, and its records."""
    evaluation.begin(stage, 0)
    records = [record for batch in batches for record in evaluation.update(lm, batch)]
    return {name: float(value) for name, value in evaluation.compute().items()}, records


def mean(values):
    known = [value for value in values if not math.isnan(value)]
    return pytest.approx(sum(known) / len(known), abs=1e-6)


def answered(examples):
    """Rows that have an answer, with their numbers."""
    return [(row, example) for row, example in enumerate(examples) if row not in NONE]


def test_metrics_are_means_over_rows(backbone, examples, said):
    examples = [example for _, example in answered(examples)]
    said = [text for row, text in enumerate(said) if row not in NONE]
    metrics, records = passed(QaEvaluation(), Says(backbone, said), batches_of(backbone.codec, examples))
    rows = list(zip(said, examples, strict=True))
    for name in ("exact_match", "precision", "recall", "f1", "contains"):
        values = [answer_scores(text, example.references)[name] for text, example in rows]
        assert 0 < metrics[name] == mean(values)
        assert [record["scores"][name] for record in records] == pytest.approx(values)
        assert (metrics[f"{name}_low"], metrics[f"{name}_high"]) == pytest.approx(bootstrap(values), abs=1e-6)
    shown = [[passage.text for passage in example.passages] for _, example in rows]
    assert metrics["grounded"] == mean([grounded_fraction(text, of) for (text, _), of in zip(rows, shown, strict=True)])
    held = [float(contain_answer(of, example.references)) for (_, example), of in zip(rows, shown, strict=True)]
    assert metrics["answerable"] == mean(held)
    assert 0 < metrics["answerable"] < 1
    assert metrics["empty"] == pytest.approx(1 / len(said))
    assert metrics["generated"] == len(said)
    assert "abstained" not in metrics
    assert "rougeL" not in metrics
    assert "grounded" not in records[1]["scores"]  # an empty answer rests on nothing


def test_the_search_is_measured_as_deep_as_it_went(backbone, examples, said):
    metrics, records = passed(QaEvaluation(abstain=ABSTAIN), Says(backbone, said), batches_of(backbone.codec, examples))
    of_rows = [retrieval_scores(example.found, example.gold) for _, example in answered(examples)]
    for name in retrieval_names([1, 5]):
        assert metrics[name] == mean([of[name] for of in of_rows])
    assert 0 < metrics["hit@5"] < 1
    assert "hit@10" not in metrics
    assert metrics["mrr_low"] < metrics["mrr"] < metrics["mrr_high"]
    assert "mrr" not in records[0]["scores"]
    deeper = [replace(example, found=(*example.found, "d20", "d21", "d22", "d23")) for example in examples]
    assert "ndcg@10" in passed(QaEvaluation(), Says(backbone, said), batches_of(backbone.codec, deeper))[0]


def test_cited_passages_are_scored_apart_from_the_answer(backbone, examples, said):
    """A tiny vocabulary has no brackets, so the texts are given as a decoder would."""
    evaluation = QaEvaluation(cite=True)
    evaluation._generate = lambda lm, batch: [split_citations(cited[row]) for row in batch.row_ids]
    shown = [ShownPassage("d1", "a", 0), ShownPassage("d2", "b", 1), ShownPassage("d3", "c", 2)]
    rows = [replace(examples[0], passages=tuple(shown), found=("d1", "d2", "d3"), gold=gold) for gold in
            (("d2",), ("d1", "d3"), ("d9",), ("d1",))]  # fmt: skip
    cited = [f"{examples[0].references[0]} [2]", "no [1][2]", "no [3]", "no"]
    metrics, records = passed(evaluation, None, batches_of(backbone.codec, rows))
    assert metrics["cite_precision"] == mean([1.0, 0.5, 0.0])
    assert metrics["cite_recall"] == mean([1.0, 0.5, 0.0])
    assert [record["prediction"] for record in records] == [examples[0].references[0], "no", "no", "no"]
    assert [record["details"]["cited"] for record in records] == [[2], [1, 2], [3], []]
    assert records[0]["scores"]["exact_match"] == 1


def test_rows_without_passages_have_no_metrics_of_them(backbone, examples, said):
    closed = [replace(example, passages=(), found=()) for example in examples]
    metrics, records = passed(QaEvaluation(), Says(backbone, said), batches_of(backbone.codec, closed))
    plain = ("exact_match", "precision", "recall", "f1", "contains", "empty")
    assert set(metrics) == {"generated", *(f"{name}{end}" for name in plain for end in ("", "_low", "_high"))}
    assert set(records[0]["scores"]) == set(plain) - {"empty"}


def test_abstaining_is_right_where_there_is_no_answer_and_only_there(backbone, examples, said):
    evaluation = QaEvaluation(abstain=ABSTAIN, long=True)
    metrics, records = passed(evaluation, Says(backbone, said), batches_of(backbone.codec, examples))
    # rows 2 and 3 abstain, 3 rightly; 7 should have
    assert metrics["abstained"] == pytest.approx(2 / ROWS)
    assert metrics["abstain_precision"] == pytest.approx(1 / 2)
    assert metrics["abstain_recall"] == pytest.approx(1 / 2)
    assert metrics["abstain_f1"] == pytest.approx(1 / 2)
    for row, value in ((2, 0), (3, 1), (7, 0)):
        assert {records[row]["scores"][name] for name in ("exact_match", "f1", "contains", "rougeL")} == {value}
    assert [record["scores"]["abstained"] for record in records] == [0, 0, 1, 1, *[0] * (ROWS - 4)]
    values = [0 if row == 2 else answer_scores(said[row], e.references)["f1"] for row, e in answered(examples)]
    assert metrics["has_answer/f1"] == mean(values)
    assert metrics["f1"] == mean([*values, 1, 0])
    assert metrics["has_answer/f1_low"] < metrics["has_answer/f1"] < metrics["has_answer/f1_high"]


def test_an_answer_that_shares_words_with_the_abstain_text_gains_nothing_by_it(backbone, examples):
    said = ["never"] * ROWS
    metrics, records = passed(QaEvaluation(abstain=ABSTAIN), Says(backbone, said), batches_of(backbone.codec, examples))
    assert [records[row]["scores"]["f1"] for row in NONE] == [0, 0]
    assert metrics["abstain_recall"] == 0
    assert "abstain_precision" not in metrics  # nothing abstained
    assert "abstain_f1" not in metrics


def test_references_may_be_the_abstain_text(backbone, examples, said):
    named = [replace(example, references=example.references or ("Never ends",)) for example in examples]
    both = [
        passed(QaEvaluation(abstain=ABSTAIN), Says(backbone, said), batches_of(backbone.codec, rows))
        for rows in (examples, named)
    ]
    assert both[0] == both[1]


def test_long_answers_are_scored_and_ranked_by_rouge(backbone, examples, said):
    examples = [replace(example, references=example.references or (ABSTAIN,)) for example in examples]
    metrics, records = passed(QaEvaluation(long=True), Says(backbone, said), batches_of(backbone.codec, examples))
    values = [rouge(text, e.references, ["rougeL"])["rougeL"] for text, e in zip(said, examples, strict=True)]
    assert [record["scores"]["rougeL"] for record in records] == pytest.approx(values)
    assert metrics["rougeL"] == mean(values)
    assert (QaEvaluation(long=True).ranking_score, QaEvaluation().ranking_score) == ("rougeL", "f1")


def test_the_target_is_right_where_there_are_no_references(backbone, examples, said):
    _, records = passed(QaEvaluation(), Says(backbone, said), batches_of(backbone.codec, examples))
    assert records[3]["scores"]["exact_match"] == 1
    assert records[3]["details"]["references"] == [ABSTAIN]


def test_records_keep_what_an_analysis_wants(backbone, examples, said):
    evaluation, (batch, *_) = QaEvaluation(abstain=ABSTAIN), batches_of(backbone.codec, examples)
    record, *_, last = evaluation.update(Says(backbone, said), batch)
    example = examples[0]
    assert record["details"] == {
        "question": example.fields["question"],
        "passages": [{"document": p.document, "text": p.text, "rank": p.rank} for p in example.passages],
        "found": list(example.found),
        "references": list(example.references),
        "gold": list(example.gold),
    }
    assert last["details"]["references"] == []
    assert last["target"] == ABSTAIN
    json.dumps(record)
    (predicted, *_) = evaluation.predict(Says(backbone, said), batch)
    assert predicted["scores"] is None
    assert predicted["details"].keys() == {"question", "passages", "found"}


def test_order_and_batches_make_no_difference(backbone, examples, said):
    lm = Says(backbone, said)
    first, _ = passed(QaEvaluation(abstain=ABSTAIN, long=True), lm, batches_of(backbone.codec, examples))
    mixed = batches_of(backbone.codec, examples, 2, numbers=[5, 1, 8, 0, 7, 10, 3, 2, 6, 9, 4])
    assert passed(QaEvaluation(abstain=ABSTAIN, long=True), lm, mixed)[0] == first


def test_a_pass_forgets_the_one_before_and_validations_have_no_intervals(backbone, examples, said):
    evaluation, batches = QaEvaluation(abstain=ABSTAIN), batches_of(backbone.codec, examples)
    first, _ = passed(evaluation, Says(backbone, said), batches)
    second, _ = passed(evaluation, Says(backbone, said[::-1]), batches[:1], "val")
    assert second["generated"] == 4
    assert not [name for name in second if name.endswith(("_low", "_high"))]
    assert passed(evaluation, Says(backbone, said), batches)[0] == first


def work(rank, shares, folder, backbone, examples, said):
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=len(shares))
    evaluation = QaEvaluation(abstain=ABSTAIN, long=True)
    metrics, _ = passed(evaluation, Says(backbone, said), batches_of(backbone.codec, examples, 2, shares[rank]))
    (folder / f"{rank}.json").write_text(json.dumps(metrics))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "shares", [[[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9]], [list(range(ROWS)), []], [[], list(range(ROWS))]]
)
def test_processes_see_what_one_would(backbone, examples, said, tmp_path, shares):
    alone = QaEvaluation(abstain=ABSTAIN, long=True)
    expected, _ = passed(alone, Says(backbone, said), batches_of(backbone.codec, examples))
    start = torch.multiprocessing.start_processes
    start(work, (shares, tmp_path, backbone, examples, said), nprocs=2, start_method="fork")
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected


def test_a_module_is_validated_and_tested_by_what_it_generates(backbone, examples):
    evaluation = QaEvaluation(Decoding(max_new_tokens=4), abstain=ABSTAIN)
    module = PromptTuning(length=2, backbone=backbone.spec, evaluation=evaluation)
    module.attach(backbone)
    batches = batches_of(backbone.codec, examples)
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    (metrics,) = trainer.validate(module, DataLoader(batches, batch_size=None), verbose=False)
    assert metrics["val/generated"] == ROWS
    assert 0 <= metrics["val/f1"] <= 1
    (metrics,) = trainer.test(module, DataLoader(batches, batch_size=None), verbose=False)
    assert {"test/f1_high", "test/mrr", "test/grounded", "test/abstained"} <= set(metrics)
    records = QaEvaluation(Decoding(max_new_tokens=4)).predict(module.eval().lm(), batches[0])
    expected = backbone.codec.decode(module.lm().generate(batches[0], max_new_tokens=4))
    assert [record["prediction"] for record in records] == expected


def test_it_is_a_task_among_others(backbone, examples, said):
    evaluation = EvaluationByTask({"one": QaEvaluation(), "other": QaEvaluation(abstain=ABSTAIN)})
    batches = batches_of(backbone.codec, examples, 6)
    batches = [replace(batch, task_ids=torch.full((len(batch),), task)) for task, batch in enumerate(batches)]
    metrics, _ = passed(evaluation, Says(backbone, said), batches)
    assert metrics["macro"] == pytest.approx(np.mean([metrics["one/f1"], metrics["other/f1"]]))


def test_an_abstain_text_without_words_is_refused():
    with pytest.raises(ValueError, match=r"abstain must be a text that contains words, or null, got '\.\.\.'"):
        QaEvaluation(abstain="...")
