import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from scripted_answers import ScriptedModel, evaluate, evaluate_in_processes, make_batches, random_sentence
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

FAMILIES = ("llama",)  # scripted answers do not depend on the family
TEMPLATE = Template("{soft}{question} it was {target}", ["question"])
ROWS = 11
ALL_ROWS = list(range(ROWS))
SHUFFLED_ROWS = [5, 1, 8, 0, 7, 10, 3, 2, 6, 9, 4]
ABSTAIN = "never ends"
UNANSWERABLE = (3, 7)  # rows without an answer
ANSWERABLE = [row for row in range(ROWS) if row not in UNANSWERABLE]
DOCUMENTS = [f"d{i}" for i in range(12)]


def random_example(generator, row):
    """Returns a question with six retrieved documents, of which the row contains three as passages.

    The first passage of odd rows contains an answer. Even rows have one gold document, odd rows two.
    """
    references = ()
    if row not in UNANSWERABLE:
        references = tuple(random_sentence(generator, 1, 4) for _ in range(generator.randint(1, 3)))
    found = tuple(generator.sample(DOCUMENTS, 6))
    texts = [random_sentence(generator, 3, 9) for _ in range(3)]
    if references and row % 2:
        texts[0] += f" {references[-1]}"
    passages = tuple(ShownPassage(found[i], text, i) for i, text in enumerate(texts))
    gold = () if row in UNANSWERABLE else tuple(generator.sample(DOCUMENTS, 1 + row % 2))
    fields = {"question": f"what is {random_sentence(generator, 1, 4)}"}
    target = references[0] if references else ABSTAIN
    return Example(fields, target, references=references, passages=passages, found=found, gold=gold)


@pytest.fixture
def examples():
    generator = random.Random(0)
    return [random_example(generator, row) for row in range(ROWS)]


@pytest.fixture
def answers(examples):
    """A correct answer, an empty one, two abstentions, one that contains a correct answer, and random ones."""
    generator = random.Random(1)
    answers = [random_sentence(generator, 1, 4) for _ in range(ROWS)]
    answers[0], answers[1] = examples[0].references[-1], ""
    answers[2], answers[3] = ABSTAIN, "Never ends !"
    answers[4] = f"very {examples[4].references[0]} indeed"
    return answers


@pytest.fixture
def batches(backbone, examples):
    return make_batches(backbone.codec, TEMPLATE, examples)


@pytest.fixture
def lm(backbone, answers):
    return ScriptedModel(backbone, answers)


def approx_mean(values):
    """Returns the mean of the values that are not NaN, for a comparison with tolerance."""
    defined = [value for value in values if not math.isnan(value)]
    return pytest.approx(sum(defined) / len(defined), abs=1e-6)


def test_metrics_are_means_over_rows(backbone, examples, answers):
    examples = [examples[row] for row in ANSWERABLE]
    answers = [answers[row] for row in ANSWERABLE]
    batches = make_batches(backbone.codec, TEMPLATE, examples)
    metrics, records = evaluate(QaEvaluation(), ScriptedModel(backbone, answers), batches)
    scores = [answer_scores(answer, e.references) for answer, e in zip(answers, examples, strict=True)]
    for name in ("exact_match", "precision", "recall", "f1", "contains"):
        values = [row_scores[name] for row_scores in scores]
        assert 0 < metrics[name] == approx_mean(values)
        assert [record["scores"][name] for record in records] == pytest.approx(values)
        interval = (metrics[f"{name}_low"], metrics[f"{name}_high"])
        assert interval == pytest.approx(bootstrap(values), abs=1e-6)
    assert metrics["empty"] == pytest.approx(1 / len(answers))
    assert metrics["generated"] == len(answers)
    assert "abstained" not in metrics
    assert "rougeL" not in metrics


def test_answers_are_compared_with_the_passages_of_their_rows(backbone, examples, answers):
    examples = [examples[row] for row in ANSWERABLE]
    answers = [answers[row] for row in ANSWERABLE]
    batches = make_batches(backbone.codec, TEMPLATE, examples)
    metrics, records = evaluate(QaEvaluation(), ScriptedModel(backbone, answers), batches)
    passages = [[passage.text for passage in example.passages] for example in examples]
    grounded = [grounded_fraction(answer, texts) for answer, texts in zip(answers, passages, strict=True)]
    answerable = [float(contain_answer(texts, e.references)) for texts, e in zip(passages, examples, strict=True)]
    assert metrics["grounded"] == approx_mean(grounded)
    assert 0 < metrics["answerable"] < 1
    assert metrics["answerable"] == approx_mean(answerable)
    assert "grounded" not in records[1]["scores"]  # undefined for an empty answer


def test_retrieval_is_scored_up_to_the_number_of_retrieved_documents(backbone, examples, lm, batches):
    metrics, records = evaluate(QaEvaluation(abstain=ABSTAIN), lm, batches)
    scores = [retrieval_scores(examples[row].found, examples[row].gold) for row in ANSWERABLE]
    for name in retrieval_names([1, 5]):
        assert metrics[name] == approx_mean([row_scores[name] for row_scores in scores])
    assert 0 < metrics["hit@5"] < 1
    assert "hit@10" not in metrics
    assert metrics["mrr_low"] < metrics["mrr"] < metrics["mrr_high"]
    assert "mrr" not in records[0]["scores"]
    with_ten = [replace(example, found=(*example.found, "d20", "d21", "d22", "d23")) for example in examples]
    metrics, _ = evaluate(QaEvaluation(), lm, make_batches(backbone.codec, TEMPLATE, with_ten))
    assert "ndcg@10" in metrics


def test_citations_are_scored_separately_and_removed_from_the_answer(backbone, examples):
    """Replaces the decoded answers, because the tiny vocabulary has no brackets."""
    correct = examples[0].references[0]
    answers = [f"{correct} [2]", "no [1][2]", "no [3]", "no"]
    evaluation = QaEvaluation(cite=True)
    evaluation._generate = lambda lm, batch: [split_citations(answers[row]) for row in batch.row_ids]
    passages = (ShownPassage("d1", "a", 0), ShownPassage("d2", "b", 1), ShownPassage("d3", "c", 2))
    example = replace(examples[0], passages=passages, found=("d1", "d2", "d3"))
    rows = [replace(example, gold=gold) for gold in (("d2",), ("d1", "d3"), ("d9",), ("d1",))]
    metrics, records = evaluate(evaluation, None, make_batches(backbone.codec, TEMPLATE, rows))
    assert metrics["cite_precision"] == approx_mean([1.0, 0.5, 0.0])  # undefined without citations
    assert metrics["cite_recall"] == approx_mean([1.0, 0.5, 0.0])  # undefined if no passage is gold
    assert [record["prediction"] for record in records] == [correct, "no", "no", "no"]
    assert [record["details"]["cited"] for record in records] == [[2], [1, 2], [3], []]
    assert records[0]["scores"]["exact_match"] == 1


def test_rows_without_passages_have_no_metrics_of_passages_and_retrieval(backbone, examples, lm):
    without_passages = [replace(example, passages=(), found=()) for example in examples]
    metrics, records = evaluate(QaEvaluation(), lm, make_batches(backbone.codec, TEMPLATE, without_passages))
    names = ("exact_match", "precision", "recall", "f1", "contains", "empty")
    with_intervals = {f"{name}{suffix}" for name in names for suffix in ("", "_low", "_high")}
    assert set(metrics) == {"generated"} | with_intervals
    assert set(records[0]["scores"]) == set(names) - {"empty"}


def test_abstaining_is_correct_only_for_unanswerable_rows(examples, answers, lm, batches):
    metrics, records = evaluate(QaEvaluation(abstain=ABSTAIN, long=True), lm, batches)
    # Rows 2 and 3 abstain, of which only row 3 is unanswerable; row 7 is unanswerable but does not abstain.
    assert metrics["abstained"] == pytest.approx(2 / ROWS)
    assert metrics["abstain_precision"] == pytest.approx(1 / 2)
    assert metrics["abstain_recall"] == pytest.approx(1 / 2)
    assert metrics["abstain_f1"] == pytest.approx(1 / 2)
    for row, score in ((2, 0), (3, 1), (7, 0)):
        scores = records[row]["scores"]
        assert {scores[name] for name in ("exact_match", "f1", "contains", "rougeL")} == {score}
    abstaining_rows = [row for row, record in enumerate(records) if record["scores"]["abstained"]]
    assert abstaining_rows == [2, 3]
    f1 = {row: answer_scores(answers[row], examples[row].references)["f1"] for row in ANSWERABLE}
    f1[2] = 0
    assert metrics["has_answer/f1"] == approx_mean(f1.values())
    assert metrics["f1"] == approx_mean([*f1.values(), 1, 0])
    assert metrics["has_answer/f1_low"] < metrics["has_answer/f1"] < metrics["has_answer/f1_high"]


def test_an_answer_with_only_some_words_of_the_abstain_text_does_not_abstain(backbone, batches):
    lm = ScriptedModel(backbone, ["never"] * ROWS)
    metrics, records = evaluate(QaEvaluation(abstain=ABSTAIN), lm, batches)
    assert [records[row]["scores"]["f1"] for row in UNANSWERABLE] == [0, 0]
    assert metrics["abstain_recall"] == 0
    assert "abstain_precision" not in metrics  # undefined if no answer abstains
    assert "abstain_f1" not in metrics


def test_the_abstain_text_as_a_reference_marks_an_unanswerable_row(backbone, examples, lm, batches):
    expected = evaluate(QaEvaluation(abstain=ABSTAIN), lm, batches)
    rows = [replace(example, references=example.references or ("Never ends",)) for example in examples]
    assert evaluate(QaEvaluation(abstain=ABSTAIN), lm, make_batches(backbone.codec, TEMPLATE, rows)) == expected


def test_long_answers_are_scored_and_ranked_by_rouge(backbone, examples, answers, lm):
    examples = [replace(example, references=example.references or (ABSTAIN,)) for example in examples]
    metrics, records = evaluate(QaEvaluation(long=True), lm, make_batches(backbone.codec, TEMPLATE, examples))
    pairs = zip(answers, examples, strict=True)
    expected = [rouge(answer, example.references, ["rougeL"])["rougeL"] for answer, example in pairs]
    assert [record["scores"]["rougeL"] for record in records] == pytest.approx(expected)
    assert metrics["rougeL"] == approx_mean(expected)
    assert QaEvaluation(long=True).ranking_score == "rougeL"
    assert QaEvaluation().ranking_score == "f1"


def test_rows_without_references_are_compared_with_their_target(lm, batches):
    _, records = evaluate(QaEvaluation(), lm, batches)
    assert records[3]["scores"]["exact_match"] == 1
    assert records[3]["details"]["references"] == [ABSTAIN]


def test_records_contain_the_question_its_passages_and_its_references(examples, lm, batches):
    evaluation, batch = QaEvaluation(abstain=ABSTAIN), batches[0]
    first, *_, last = evaluation.update(lm, batch)
    example = examples[0]
    assert first["details"] == {
        "question": example.fields["question"],
        "passages": [{"document": p.document, "text": p.text, "rank": p.rank} for p in example.passages],
        "found": list(example.found),
        "references": list(example.references),
        "gold": list(example.gold),
    }
    assert last["details"]["references"] == []
    assert last["target"] == ABSTAIN
    json.dumps(first)
    predicted = evaluation.predict(lm, batch)[0]
    assert predicted["scores"] is None
    assert predicted["details"].keys() == {"question", "passages", "found"}


def test_metrics_do_not_depend_on_the_order_or_the_batches_of_rows(backbone, examples, lm, batches):
    expected, _ = evaluate(QaEvaluation(abstain=ABSTAIN, long=True), lm, batches)
    shuffled = make_batches(backbone.codec, TEMPLATE, examples, 2, SHUFFLED_ROWS)
    assert evaluate(QaEvaluation(abstain=ABSTAIN, long=True), lm, shuffled)[0] == expected


def test_a_pass_is_independent_of_earlier_passes_and_a_validation_has_no_intervals(backbone, answers, lm, batches):
    evaluation = QaEvaluation(abstain=ABSTAIN)
    first, _ = evaluate(evaluation, lm, batches)
    validation, _ = evaluate(evaluation, ScriptedModel(backbone, answers[::-1]), batches[:1], "val")
    assert validation["generated"] == 4
    assert not [name for name in validation if name.endswith(("_low", "_high"))]
    assert evaluate(evaluation, lm, batches)[0] == first


@pytest.mark.parametrize("shares", [(ALL_ROWS[::2], ALL_ROWS[1::2]), ([], ALL_ROWS)])
def test_each_process_computes_the_metrics_of_all_rows(backbone, examples, lm, batches, tmp_path, shares):
    expected, _ = evaluate(QaEvaluation(abstain=ABSTAIN, long=True), lm, batches)
    evaluation = QaEvaluation(abstain=ABSTAIN, long=True)
    batches_by_rank = [make_batches(backbone.codec, TEMPLATE, examples, 2, rows) for rows in shares]
    for metrics, repeated, _ in evaluate_in_processes(evaluation, lm, batches_by_rank, tmp_path):
        assert metrics == repeated == expected


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_module_is_validated_and_tested_on_its_generated_answers(backbone, batches):
    evaluation = QaEvaluation(Decoding(max_new_tokens=4), abstain=ABSTAIN)
    module = PromptTuning(length=2, backbone=backbone.spec, evaluation=evaluation)
    module.attach(backbone)
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    (metrics,) = trainer.validate(module, DataLoader(batches, batch_size=None), verbose=False)
    assert metrics["val/generated"] == ROWS
    assert 0 <= metrics["val/f1"] <= 1
    (metrics,) = trainer.test(module, DataLoader(batches, batch_size=None), verbose=False)
    assert {"test/f1_high", "test/mrr", "test/grounded", "test/abstained"} <= set(metrics)
    records = QaEvaluation(Decoding(max_new_tokens=4)).predict(module.eval().lm(), batches[0])
    expected = backbone.codec.decode(module.lm().generate(batches[0], max_new_tokens=4))
    assert [record["prediction"] for record in records] == expected


def test_question_answering_can_be_one_of_several_tasks(backbone, examples, lm):
    evaluation = EvaluationByTask({"one": QaEvaluation(), "other": QaEvaluation(abstain=ABSTAIN)})
    batches = make_batches(backbone.codec, TEMPLATE, examples, 6)
    first, second = batches
    first = replace(first, task_ids=torch.zeros(len(first), dtype=torch.long))
    second = replace(second, task_ids=torch.ones(len(second), dtype=torch.long))
    metrics, _ = evaluate(evaluation, lm, [first, second])
    assert metrics["macro"] == pytest.approx(np.mean([metrics["one/f1"], metrics["other/f1"]]))


def test_an_abstain_text_without_words_is_rejected():
    with pytest.raises(ValueError, match=r"abstain must be a text that contains words, or null, got '\.\.\.'"):
        QaEvaluation(abstain="...")
