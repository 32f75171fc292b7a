import math
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import sacrebleu
import torch
from lightning.pytorch import Trainer
from rouge_score.rouge_scorer import RougeScorer
from scripted_answers import (
    ScriptedModel,
    evaluate,
    evaluate_in_processes,
    make_batches,
    random_sentence,
)
from torch.utils.data import DataLoader

from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.callbacks.reporting.run_files import finite
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import Example
from lightning_softprompt.evaluation.generation import GenerationEvaluation
from lightning_softprompt.evaluation.metrics.intervals import bootstrap
from lightning_softprompt.methods import PromptTuning

FAMILIES = ("llama",)  # scripted answers do not depend on the family
TEMPLATE = Template("{soft}{text} it was {target}", ["text"])
ROWS = 9
ALL_ROWS = list(range(ROWS))
EVEN_ROWS, ODD_ROWS = ALL_ROWS[::2], ALL_ROWS[1::2]
SHUFFLED_ROWS = [5, 1, 8, 0, 7, 3, 2, 6, 4]
ALL_METRICS = ["rouge1", "rougeL", "bleu", "chrf", "nist"]


def random_document(generator):
    sentences = [random_sentence(generator, 3, 9).capitalize() for _ in range(2)]
    return " ".join(f"{sentence} ." for sentence in sentences)


@pytest.fixture
def examples():
    """Documents with one to three references."""
    generator = random.Random(0)
    documents = [random_document(generator) for _ in range(ROWS)]
    examples = []
    for document in documents:
        references = [random_sentence(generator, 3, 9) for _ in range(generator.randint(1, 3))]
        others = tuple(references) if len(references) > 1 else ()
        examples.append(Example({"text": document}, references[0], references=others))
    return examples


@pytest.fixture
def answers():
    """An empty answer, a repetitive one, and random ones."""
    generator = random.Random(1)
    return ["", "good good good good good", *(random_sentence(generator, 4, 12) for _ in range(ROWS - 2))]


@pytest.fixture
def batches(backbone, examples):
    return make_batches(backbone.codec, TEMPLATE, examples)


@pytest.fixture
def lm(backbone, answers):
    return ScriptedModel(backbone, answers)


def get_references(examples):
    return [list(example.references or (example.target,)) for example in examples]


def predictions_of(records):
    return [record["prediction"] for record in records]


def expected_rouge(answers, examples, name):
    """Returns the F1 of each answer with the best of its references, by the reference implementation."""
    scorer = RougeScorer([name], use_stemmer=True)
    pairs = zip(get_references(examples), answers, strict=True)
    return [scorer.score_multi(references, answer)[name].fmeasure for references, answer in pairs]


def test_corpus_metrics_equal_the_reference_implementation(examples, answers, lm, batches):
    evaluation = GenerationEvaluation(source="text", metrics=["rougeL", "rouge2", "bleu", "chrf", "nist"])
    metrics, records = evaluate(evaluation, lm, batches)
    references = get_references(examples)
    streams = [[row[i] if i < len(row) else None for row in references] for i in range(3)]
    assert metrics["generated"] == ROWS
    assert metrics["bleu"] == pytest.approx(sacrebleu.corpus_bleu(answers, streams).score / 100, abs=1e-6)
    assert metrics["chrf"] == pytest.approx(sacrebleu.corpus_chrf(answers, streams).score / 100, abs=1e-6)
    assert predictions_of(records) == answers
    assert [record["target"] for record in records] == [row[0] for row in references]
    assert "rouge1" not in metrics
    assert "lead/nist" in metrics
    assert "lead/rougeL_low" not in metrics


@pytest.mark.parametrize("name", ["rouge2", "rougeL"])
def test_rouge_is_the_mean_over_rows_with_an_interval_and_a_lead_baseline(examples, answers, lm, batches, name):
    metrics, records = evaluate(GenerationEvaluation(source="text", metrics=[name]), lm, batches)
    expected = expected_rouge(answers, examples, name)
    assert [record["scores"][name] for record in records] == pytest.approx(expected, abs=1e-6)
    assert metrics[name] == pytest.approx(np.mean(expected), abs=1e-6)
    interval = (metrics[f"{name}_low"], metrics[f"{name}_high"])
    assert interval == pytest.approx(bootstrap(expected), abs=1e-6)
    first_sentences = [example.fields["text"].split(" .")[0] for example in examples]
    expected_leads = expected_rouge(first_sentences, examples, name)
    assert metrics[f"lead/{name}"] == pytest.approx(np.mean(expected_leads), abs=1e-6)


def test_ratios_compare_words_of_answers_sources_and_references(examples, answers, lm, batches):
    metrics, _ = evaluate(GenerationEvaluation(source="text"), lm, batches)
    answer_words = sum(len(answer.split()) for answer in answers)
    full_stops = 2 * ROWS
    source_words = sum(len(example.fields["text"].split()) for example in examples) - full_stops
    mean_lengths = [np.mean([len(text.split()) for text in row]) for row in get_references(examples)]
    assert metrics["compression"] == pytest.approx(source_words / answer_words)
    assert metrics["length_ratio"] == pytest.approx(answer_words / sum(mean_lengths))
    assert metrics["empty"] == pytest.approx(1 / ROWS)


def test_an_empty_answer_has_no_fraction_of_novel_bigrams(backbone, lm, batches):
    evaluation = GenerationEvaluation(source="text")
    metrics, records = evaluate(evaluation, lm, batches)
    fractions = [record["scores"]["novel_bigrams"] for record in records]
    assert math.isnan(fractions[0])
    assert metrics["novel_bigrams"] == pytest.approx(np.mean(fractions[1:]), abs=1e-6)
    assert records[1]["scores"]["repetition"] == pytest.approx(0.75)
    assert finite(records[0]["scores"])["novel_bigrams"] is None
    metrics, _ = evaluate(evaluation, ScriptedModel(backbone, [""] * ROWS), batches)
    assert "novel_bigrams" not in metrics
    assert (metrics["empty"], metrics["rougeL"], metrics["bleu"]) == (1, 0, 0)


def test_metrics_that_require_a_source_are_absent_without_one(lm, batches):
    metrics, _ = evaluate(GenerationEvaluation(metrics=["rouge1"]), lm, batches)
    rouge = {"rouge1", "rouge1_low", "rouge1_high"}
    repetition = {"repetition", "repetition_low", "repetition_high"}
    assert set(metrics) == {"generated", "length_ratio", "empty"} | rouge | repetition


def test_metrics_do_not_depend_on_the_order_or_the_batches_of_rows(backbone, examples, lm, batches):
    expected, _ = evaluate(GenerationEvaluation(source="text", metrics=ALL_METRICS), lm, batches)
    shuffled = make_batches(backbone.codec, TEMPLATE, examples, 2, SHUFFLED_ROWS)
    metrics, _ = evaluate(GenerationEvaluation(source="text", metrics=ALL_METRICS), lm, shuffled)
    assert metrics == expected


def test_a_pass_is_independent_of_earlier_passes(backbone, answers, lm, batches):
    evaluation = GenerationEvaluation(source="text")
    first, _ = evaluate(evaluation, lm, batches)
    evaluate(evaluation, ScriptedModel(backbone, answers[::-1]), batches[:1])
    assert evaluate(evaluation, lm, batches)[0] == first


@pytest.mark.parametrize("shares", [(EVEN_ROWS, ODD_ROWS), (ALL_ROWS, []), ([], ALL_ROWS)])
def test_each_process_computes_the_metrics_of_all_rows(backbone, examples, lm, batches, tmp_path, shares):
    expected, _ = evaluate(GenerationEvaluation(source="text", metrics=ALL_METRICS), lm, batches)
    evaluation = GenerationEvaluation(source="text", metrics=ALL_METRICS)
    batches_by_rank = [make_batches(backbone.codec, TEMPLATE, examples, 2, rows) for rows in shares]
    for metrics, repeated, figures in evaluate_in_processes(evaluation, lm, batches_by_rank, tmp_path):
        assert metrics == repeated == expected
        assert figures == ["rouge", "rougeL_by_length"]


def test_a_validation_samples_epochs_and_rows_but_a_test_and_predict_use_all(backbone, examples, answers, lm):
    batches = make_batches(backbone.codec, TEMPLATE, examples, row_ids=[8, 1, 5, 0, 7, 3, 2, 6, 4])
    evaluation = GenerationEvaluation(metrics=["rouge1"], every=3, sample=3)
    metrics, records = evaluate(evaluation, lm, batches, "val", 3)
    assert lm.row_ids == [[1, 0], [2]]
    assert metrics["generated"] == 3
    expected = expected_rouge(answers, examples, "rouge1")[:3]
    assert metrics["rouge1"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert "rouge1_low" not in metrics
    predictions = [record and record["prediction"] for record in records]
    assert predictions == [None, answers[1], None, answers[0], None, None, answers[2], None, None]
    assert evaluate(evaluation, lm, batches, "val", 4) == ({"generated": 0}, [None] * ROWS)
    assert evaluation.figures() == {}
    assert evaluate(evaluation, lm, batches, "test", 4)[0]["generated"] == ROWS
    predictions = predictions_of(evaluation.predict(lm, batches[0]))
    assert predictions == [answers[row] for row in batches[0].row_ids]


def test_a_limited_validation_samples_from_the_rows_that_it_scores(backbone, examples, lm):
    batches = make_batches(backbone.codec, TEMPLATE, examples, row_ids=[8, 5, 7, 3])
    evaluation = GenerationEvaluation(metrics=["rouge1"], sample=2)
    evaluation.limit_rows([[3, 5, 7, 8]])
    assert evaluate(evaluation, lm, batches, "val")[0]["generated"] == 2
    assert lm.row_ids == [[5, 3]]


def test_a_time_limit_ends_generation_in_each_validation_but_not_in_a_test(backbone, examples, lm, monkeypatch):
    clock = SimpleNamespace(seconds=0.0)
    clock.monotonic = lambda: clock.seconds
    generate = lm.generate

    def generate_in_31_seconds(batch, **options):
        clock.seconds += 31.0
        return generate(batch, **options)

    lm.generate = generate_in_31_seconds
    monkeypatch.setattr("lightning_softprompt.evaluation.generation.time", clock)
    evaluation = GenerationEvaluation(metrics=["rouge1"], minutes=1.0)
    batches = make_batches(backbone.codec, TEMPLATE, examples, 2)
    for _ in range(2):
        metrics, records = evaluate(evaluation, lm, batches, "val")
        assert metrics["generated"] == 4
        assert [record is None for record in records] == [False] * 4 + [True] * 5
    assert evaluate(evaluation, lm, batches, "test")[0]["generated"] == ROWS


def test_lead_baselines_are_scored_only_once(lm, batches, monkeypatch):
    evaluation = GenerationEvaluation(source="text", metrics=["rouge1"], lead=2)
    scored_texts, score = [], evaluation.scorer.score

    def record_and_score(texts, *arguments):
        scored_texts.extend(texts)
        return score(texts, *arguments)

    monkeypatch.setattr(evaluation.scorer, "score", record_and_score)
    first, _ = evaluate(evaluation, lm, batches, "val")
    assert len(scored_texts) == 2 * ROWS
    second, _ = evaluate(evaluation, lm, batches, "val", 1)
    assert len(scored_texts) == 3 * ROWS
    assert first == second
    assert first["lead/compression"] == 1  # each document has two sentences


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_module_scores_sampled_rows_in_validation_and_all_rows_in_a_test(backbone, batches):
    evaluation = GenerationEvaluation(Decoding(max_new_tokens=4), source="text", sample=5)
    module = PromptTuning(length=2, backbone=backbone.spec, evaluation=evaluation)
    records = []
    step = module.validation_step
    module.validation_step = lambda *arguments: records.extend(step(*arguments))
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    loader = DataLoader(batches, batch_size=None)
    (metrics,) = trainer.validate(module, loader, verbose=False)
    assert sorted(record["row"] for record in records) == [0, 1, 2, 3, 4]
    assert metrics["val/generated"] == 5
    assert metrics["val/loss"] > 0
    (metrics,) = trainer.test(module, loader, verbose=False)
    assert metrics["test/generated"] == ROWS
    assert {"test/rouge1_high", "test/lead/rougeL", "test/bleu"} <= set(metrics)
    lm = module.eval().lm()
    expected = backbone.codec.decode(lm.generate(batches[0], max_new_tokens=4))
    assert predictions_of(records[:4]) == expected
    assert not module.state_dict().keys() - {"tokens"}


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_sampled_answers_depend_only_on_the_seed_and_leave_the_global_generator_unchanged(backbone, batches):
    decoding = Decoding(max_new_tokens=4, do_sample=True, seed=3)
    module = PromptTuning(length=2, backbone=backbone.spec)
    module.attach(backbone)
    lm = module.eval().lm()
    state_before = torch.get_rng_state()
    evaluation = GenerationEvaluation(decoding, metrics=["rouge1"])
    predictions = predictions_of(evaluation.predict(lm, batches[0]))
    assert torch.equal(torch.get_rng_state(), state_before)
    torch.manual_seed(77)
    assert predictions_of(evaluation.update(lm, batches[0])) == predictions
    other_seed = GenerationEvaluation(replace(decoding, seed=4))
    assert predictions_of(other_seed.predict(lm, batches[0])) != predictions


def test_bert_score_has_a_mean_and_an_interval_and_saves_no_encoder(lm, batches, tiny_folder):
    evaluation = GenerationEvaluation(metrics=["bertscore"], encoder=str(tiny_folder("bert")))
    metrics, records = evaluate(evaluation, lm, batches)
    scores = [record["scores"]["bertscore"] for record in records]
    assert scores[0] == 0
    assert metrics["bertscore"] == pytest.approx(np.mean(scores), abs=1e-6)
    assert metrics["bertscore_low"] < metrics["bertscore"] < metrics["bertscore_high"]
    assert not evaluation.state_dict()


def test_figures_show_the_scores_of_rows_and_the_lead_baseline(examples, answers, lm, batches):
    evaluation = GenerationEvaluation(source="text")
    metrics, _ = evaluate(evaluation, lm, batches)
    figures = evaluation.figures()
    panels = figures["rouge"].axes
    assert [axes.get_xlabel() for axes in panels] == ["rouge1", "rougeL"]
    for axes in panels:
        name = axes.get_xlabel()
        assert sum(patch.get_height() for patch in axes.patches) == ROWS
        lines = [float(line.get_xdata()[0]) for line in axes.lines]
        assert lines == pytest.approx([metrics[name], metrics[f"lead/{name}"]], abs=1e-6)
    (points,) = figures["rougeL_by_length"].axes[0].collections
    lengths, scores = points.get_offsets().T
    assert lengths.tolist() == [len(example.fields["text"].split()) - 2 for example in examples]
    assert scores.tolist() == pytest.approx(expected_rouge(answers, examples, "rougeL"), abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metrics": ["rouge1", "meteor"]}, r"\['meteor'\].*\['rouge1', .*'rougeL', 'bertscore', 'bleu'"),
        ({"every": 0}, "every=0"),
        ({"sample": 0}, "sample=0"),
        ({"minutes": 0.0}, "minutes=0.0"),
        ({"lead": -1}, "lead=-1"),
        ({"long_documents": "map_reduce", "source": "text"}, "map_reduce requires source and template"),
    ],
)
def test_invalid_arguments_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        GenerationEvaluation(**arguments)


def test_batches_without_examples_and_unknown_source_columns_are_rejected(lm, batches):
    with pytest.raises(ValueError, match="collate the batch with examples"):
        GenerationEvaluation().update(lm, replace(batches[0], examples=None))
    with pytest.raises(ValueError, match=r"no source column 'document'; its columns are \['text'\]"):
        GenerationEvaluation(source="document").update(lm, batches[0])
