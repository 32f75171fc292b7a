import json
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import sacrebleu
import tiny
import torch
from lightning.pytorch import Trainer
from rouge_score.rouge_scorer import RougeScorer
from torch.utils.data import DataLoader

from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.callbacks.reporting.run_files import finite
from lightning_softprompt.core.template import Template
from lightning_softprompt.core.types import Example
from lightning_softprompt.evaluation.generation import GenerationEvaluation
from lightning_softprompt.evaluation.map_reduce import MapReduce
from lightning_softprompt.evaluation.metrics.intervals import bootstrap
from lightning_softprompt.methods import PromptTuning

FAMILIES = ("llama", "t5")
TEMPLATE = Template("{soft}{text} it was {target}", ["text"])
ROWS = 9


def sentence(generator, low=3, high=9):
    return " ".join(generator.choices(tiny.WORDS[:-5], k=generator.randint(low, high)))


@pytest.fixture
def examples():
    generator = random.Random(0)
    documents = [" ".join(f"{sentence(generator).capitalize()} ." for _ in range(2)) for _ in range(ROWS)]
    right = [tuple(sentence(generator) for _ in range(generator.randint(1, 3))) for _ in range(ROWS)]
    rows = zip(documents, right, strict=True)
    return [Example({"text": text}, r[0], references=r if len(r) > 1 else ()) for text, r in rows]


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

    def __init__(self, backbone, texts, took=0.0, monkeypatch=None):
        self.backbone, self.texts, self.took, self.asked = backbone, texts, took, []
        self.now = 0.0
        if monkeypatch is not None:
            clock = SimpleNamespace(monotonic=lambda: self.now)
            monkeypatch.setattr("lightning_softprompt.evaluation.generation.time", clock)

    def generate(self, batch, **options):
        self.asked.append(list(batch.row_ids))
        self.now += self.took
        ids = [torch.tensor([*self.backbone.codec.ids(self.texts[row]), tiny.EOS]) for row in batch.row_ids]
        return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tiny.PAD)


@pytest.fixture
def said():
    generator = random.Random(1)
    return ["", "good good good good good", *(sentence(generator, 4, 12) for _ in range(ROWS - 2))]


def passed(evaluation, lm, batches, stage="test", epoch=0):
    """A pass, and its records."""
    evaluation.begin(stage, epoch)
    records = [record for batch in batches for record in evaluation.update(lm, batch)]
    return {name: float(value) for name, value in evaluation.compute().items()}, records


def f1(said, examples, name):
    scorer = RougeScorer([name], use_stemmer=True)
    right = [example.references or (example.target,) for example in examples]
    return [scorer.score_multi(r, s)[name].fmeasure for s, r in zip(said, right, strict=True)]


def test_metrics_are_those_of_the_texts(backbone, examples, said):
    evaluation = GenerationEvaluation(source="text", metrics=["rougeL", "rouge2", "bleu", "chrf", "nist"])
    metrics, records = passed(evaluation, Says(backbone, said), batches_of(backbone.codec, examples))
    right = [list(example.references or (example.target,)) for example in examples]
    streams = [[row[i] if i < len(row) else None for row in right] for i in range(3)]
    assert metrics["generated"] == ROWS
    assert metrics["bleu"] == pytest.approx(sacrebleu.corpus_bleu(said, streams).score / 100, abs=1e-6)
    assert metrics["chrf"] == pytest.approx(sacrebleu.corpus_chrf(said, streams).score / 100, abs=1e-6)
    for name in ("rouge2", "rougeL"):
        values = f1(said, examples, name)
        assert [record["scores"][name] for record in records] == pytest.approx(values, abs=1e-6)
        assert metrics[name] == pytest.approx(np.mean(values), abs=1e-6)
        low, high = bootstrap(values)
        assert (metrics[f"{name}_low"], metrics[f"{name}_high"]) == pytest.approx((low, high), abs=1e-6)
        leads = [example.fields["text"].split(" .")[0] for example in examples]
        assert metrics[f"lead/{name}"] == pytest.approx(np.mean(f1(leads, examples, name)), abs=1e-6)
    words, documents = sum(len(s.split()) for s in said), sum(len(e.fields["text"].split()) - 2 for e in examples)
    assert metrics["compression"] == pytest.approx(documents / words)
    mean_words = sum(sum(len(r.split()) for r in row) / len(row) for row in right)
    assert metrics["length_ratio"] == pytest.approx(words / mean_words)
    assert metrics["empty"] == pytest.approx(1 / ROWS)
    assert [record["prediction"] for record in records] == said
    assert [record["target"] for record in records] == [row[0] for row in right]
    assert "rouge1" not in metrics
    assert "lead/nist" in metrics
    assert "lead/rougeL_low" not in metrics


def test_an_empty_answer_has_no_share_of_new_bigrams(backbone, examples, said):
    evaluation = GenerationEvaluation(source="text")
    metrics, records = passed(evaluation, Says(backbone, said), batches_of(backbone.codec, examples))
    shares = [record["scores"]["novel_bigrams"] for record in records]
    assert math.isnan(shares[0])
    assert metrics["novel_bigrams"] == pytest.approx(np.mean(shares[1:]), abs=1e-6)
    assert records[1]["scores"]["repetition"] == pytest.approx(0.75)
    assert finite(records[0]["scores"])["novel_bigrams"] is None
    metrics, _ = passed(evaluation, Says(backbone, [""] * ROWS), batches_of(backbone.codec, examples))
    assert "novel_bigrams" not in metrics
    assert (metrics["empty"], metrics["rougeL"], metrics["bleu"]) == (1, 0, 0)


def test_without_a_source_nothing_is_measured_by_it(backbone, examples, said):
    evaluation = GenerationEvaluation(metrics=["rouge1"])
    metrics, _ = passed(evaluation, Says(backbone, said), batches_of(backbone.codec, examples))
    told = {"generated", "length_ratio", "empty"}
    told |= {f"{name}{end}" for name in ("rouge1", "repetition") for end in ("", "_low", "_high")}
    assert set(metrics) == told


def test_order_and_batches_make_no_difference(backbone, examples, said):
    lm, metrics = Says(backbone, said), ["rouge1", "bleu", "chrf", "nist"]
    first, _ = passed(GenerationEvaluation(source="text", metrics=metrics), lm, batches_of(backbone.codec, examples))
    mixed = batches_of(backbone.codec, examples, 2, numbers=[5, 1, 8, 0, 7, 3, 2, 6, 4])
    assert passed(GenerationEvaluation(source="text", metrics=metrics), lm, mixed)[0] == first


def test_a_pass_forgets_the_one_before(backbone, examples, said):
    evaluation = GenerationEvaluation(source="text")
    batches = batches_of(backbone.codec, examples)
    first, _ = passed(evaluation, Says(backbone, said), batches)
    passed(evaluation, Says(backbone, said[::-1]), batches[:1])
    assert passed(evaluation, Says(backbone, said), batches)[0] == first


def work(rank, shares, folder, backbone, examples, said):
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=len(shares))
    evaluation = GenerationEvaluation(source="text", metrics=["rouge1", "rougeL", "bleu", "chrf", "nist"])
    metrics, _ = passed(evaluation, Says(backbone, said), batches_of(backbone.codec, examples, 2, shares[rank]))
    again = {name: float(value) for name, value in evaluation.compute().items()}
    figures = sorted(evaluation.figures())
    (folder / f"{rank}.json").write_text(json.dumps([metrics, again, figures]))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("shares", [[[0, 2, 4, 6, 8], [1, 3, 5, 7]], [list(range(ROWS)), []], [[], list(range(ROWS))]])
def test_processes_see_what_one_would(backbone, examples, said, tmp_path, shares):
    alone = GenerationEvaluation(source="text", metrics=["rouge1", "rougeL", "bleu", "chrf", "nist"])
    expected, _ = passed(alone, Says(backbone, said), batches_of(backbone.codec, examples))
    start = torch.multiprocessing.start_processes
    start(work, (shares, tmp_path, backbone, examples, said), nprocs=2, start_method="fork")
    for rank in range(2):
        metrics, again, figures = json.loads((tmp_path / f"{rank}.json").read_text())
        assert metrics == again == expected
        assert figures == ["rouge", "rougeL_by_length"]


def test_validations_leave_rows_out_and_tests_none(backbone, examples, said):
    lm, batches = Says(backbone, said), batches_of(backbone.codec, examples, numbers=[8, 1, 5, 0, 7, 3, 2, 6, 4])
    evaluation = GenerationEvaluation(metrics=["rouge1"], every=3, sample=3)
    metrics, records = passed(evaluation, lm, batches, "val", 3)
    assert lm.asked == [[1, 0], [2]]
    assert metrics["generated"] == 3
    assert metrics["rouge1"] == pytest.approx(np.mean(f1(said, examples, "rouge1")[:3]), abs=1e-6)
    assert "rouge1_low" not in metrics
    known = [None if record is None else record["prediction"] for record in records]
    assert known == [None, said[1], None, said[0], None, None, said[2], None, None]
    assert passed(evaluation, lm, batches, "val", 4) == ({"generated": 0}, [None] * ROWS)
    assert evaluation.figures() == {}
    assert passed(evaluation, lm, batches, "test", 4)[0]["generated"] == ROWS
    assert [record["prediction"] for record in evaluation.predict(lm, batches[0])] == [said[i] for i in (8, 1, 5, 0)]


def test_a_limited_validation_generates_for_the_first_of_its_own_rows(backbone, examples, said):
    lm, batches = Says(backbone, said), batches_of(backbone.codec, examples, numbers=[8, 5, 7, 3])
    evaluation = GenerationEvaluation(metrics=["rouge1"], sample=2)
    evaluation.limit_rows([[3, 5, 7, 8]])
    assert passed(evaluation, lm, batches, "val")[0]["generated"] == 2
    assert lm.asked == [[5, 3]]


def test_a_budget_ends_a_validation(backbone, examples, said, monkeypatch):
    evaluation = GenerationEvaluation(metrics=["rouge1"], minutes=1.0)
    batches = batches_of(backbone.codec, examples, 2)
    lm = Says(backbone, said, 31.0, monkeypatch)
    for _ in range(2):  # each pass has it anew
        metrics, records = passed(evaluation, lm, batches, "val")
        assert metrics["generated"] == 4
        assert [record is None for record in records] == [False] * 4 + [True] * 5
    assert passed(evaluation, lm, batches, "test")[0]["generated"] == ROWS


def test_leads_are_scored_once(backbone, examples, said, monkeypatch):
    evaluation = GenerationEvaluation(source="text", metrics=["rouge1"], lead=2)
    measured, measures = [], evaluation.scorer.score
    monkeypatch.setattr(evaluation.scorer, "score", lambda t, *rest: measured.extend(t) or measures(t, *rest))
    batches = batches_of(backbone.codec, examples)
    first, _ = passed(evaluation, Says(backbone, said), batches, "val")
    assert len(measured) == 2 * ROWS
    second, _ = passed(evaluation, Says(backbone, said), batches, "val", 1)
    assert len(measured) == 3 * ROWS
    assert first == second
    assert first["lead/compression"] == 1  # two sentences are all that there is


def test_the_module_scores_rows_and_leaves_out_those_that_are(backbone, examples):
    evaluation = GenerationEvaluation(Decoding(max_new_tokens=4), source="text", sample=5)
    module = PromptTuning(length=2, backbone=backbone.spec, evaluation=evaluation)
    kept = []
    step = module.validation_step
    module.validation_step = lambda *a: kept.extend(step(*a))
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    batches = batches_of(backbone.codec, examples)
    (metrics,) = trainer.validate(module, DataLoader(batches, batch_size=None), verbose=False)
    assert sorted(record["row"] for record in kept) == [0, 1, 2, 3, 4]
    assert metrics["val/generated"] == 5
    assert metrics["val/loss"] > 0
    (metrics,) = trainer.test(module, DataLoader(batches, batch_size=None), verbose=False)
    assert metrics["test/generated"] == ROWS
    assert {"test/rouge1_high", "test/lead/rougeL", "test/bleu"} <= set(metrics)
    lm = module.eval().lm()
    expected = backbone.codec.decode(lm.generate(batches[0], max_new_tokens=4))
    assert [record["prediction"] for record in kept[:4]] == expected
    assert not module.state_dict().keys() - {"tokens"}


def test_drawn_answers_are_the_same_again_and_leave_no_trace(backbone, examples):
    decoding = Decoding(max_new_tokens=4, do_sample=True, seed=3)
    module = PromptTuning(length=2, backbone=backbone.spec)
    module.attach(backbone)
    lm, batches = module.eval().lm(), batches_of(backbone.codec, examples)
    before = torch.get_rng_state()
    evaluation = GenerationEvaluation(decoding, metrics=["rouge1"])
    said = [record["prediction"] for record in evaluation.predict(lm, batches[0])]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(77)
    assert [record["prediction"] for record in evaluation.update(lm, batches[0])] == said
    other = GenerationEvaluation(replace(decoding, seed=4)).predict(lm, batches[0])
    assert [record["prediction"] for record in other] != said


def test_bert_score_is_a_metric_among_others(backbone, examples, said, tiny_folder):
    evaluation = GenerationEvaluation(metrics=["bertscore"], encoder=str(tiny_folder("bert")))
    metrics, records = passed(evaluation, Says(backbone, said), batches_of(backbone.codec, examples))
    values = [record["scores"]["bertscore"] for record in records]
    assert values[0] == 0
    assert metrics["bertscore"] == pytest.approx(np.mean(values), abs=1e-6)
    assert metrics["bertscore_low"] < metrics["bertscore"] < metrics["bertscore_high"]
    assert not evaluation.state_dict()


def test_figures_show_rows_and_the_lead(backbone, examples, said):
    evaluation = GenerationEvaluation(source="text")
    metrics, _ = passed(evaluation, Says(backbone, said), batches_of(backbone.codec, examples))
    figures = evaluation.figures()
    panels = figures["rouge"].axes
    assert [axes.get_xlabel() for axes in panels] == ["rouge1", "rougeL"]
    for axes in panels:
        name = axes.get_xlabel()
        assert sum(patch.get_height() for patch in axes.patches) == ROWS
        lines = [float(line.get_xdata()[0]) for line in axes.lines]
        assert lines == pytest.approx([metrics[name], metrics[f"lead/{name}"]], abs=1e-6)
    (points,) = figures["rougeL_by_length"].axes[0].collections
    lengths = [len(example.fields["text"].split()) - 2 for example in examples]
    assert points.get_offsets()[:, 0].tolist() == lengths
    assert points.get_offsets()[:, 1].tolist() == pytest.approx(f1(said, examples, "rougeL"), abs=1e-6)


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
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GenerationEvaluation(**arguments)


def test_rows_without_texts_and_an_unknown_source_are_refused(backbone, examples, said):
    batch = batches_of(backbone.codec, examples)[0]
    with pytest.raises(ValueError, match="collate the batch with examples"):
        GenerationEvaluation().update(Says(backbone, said), replace(batch, examples=None))
    with pytest.raises(ValueError, match=r"no source column 'document'; its columns are \['text'\]"):
        GenerationEvaluation(source="document").update(Says(backbone, said), batch)


class Shortens:
    """Says the first words of what it reads, and keeps it."""

    def __init__(self, backbone, words):
        self.backbone, self.words, self.read = backbone, words, []

    def generate(self, batch, **options):
        self.read.append([example.fields["text"] for example in batch.examples])
        assert all(row.num_truncated == 0 for row in self.rows(batch))
        firsts = [" ".join(example.fields["text"].split()[: self.words]) for example in batch.examples]
        ids = [torch.tensor([*self.backbone.codec.ids(text), tiny.EOS]) for text in firsts]
        return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tiny.PAD)

    def rows(self, batch):
        whole = Template(TEMPLATE.text, TEMPLATE.columns)
        rows = [self.backbone.codec.encode(whole.pieces(e.fields), "", 14) for e in batch.examples]
        assert torch.equal(self.backbone.codec.collate(rows).input_ids, batch.input_ids)
        return rows


LONG = ("A dog is good . The film was very long and dull indeed . It is a story about a sad dog ! " * 3).strip()


def test_long_documents_are_cut_where_sentences_end(backbone):
    reduce = MapReduce(backbone.codec, TEMPLATE, "text", 14, Decoding(max_new_tokens=4))
    pairs = ["It is a dog . This film was dull !"] * 20  # three sentences do not fit
    assert reduce.parts({"text": " ".join(pairs)}) == pairs
    early = "No . It is a dog and it is a very sad story about the very sad dog"  # half of it would be left empty
    assert reduce.parts({"text": early}) == ["No . It is a dog and it is a very", "sad story about the very sad dog"]
    assert " ".join(reduce.parts({"text": LONG})) == LONG
    assert reduce.parts({"text": " a dog . "}) == ["a dog ."]
    assert reduce.parts({"text": ""}) == [""]
    words = " ".join(["dog"] * 1000)
    parts = reduce.parts({"text": words})
    assert " ".join(parts) == words
    longer = [f"{part} dog" for part in parts]
    assert not any(reduce.fits({"text": part}) for part in longer[:-1])


def test_a_word_that_does_not_fit_is_cut(backbone):
    marks = "." * 100  # each is a token
    reduce = MapReduce(backbone.codec, Template("{text} {target}"), "text", 9, Decoding(max_new_tokens=4))
    reduce.codec = SimpleNamespace(
        encode=lambda pieces, *_: SimpleNamespace(num_truncated=max(0, len(pieces[1].text) - 9))
    )
    parts = reduce.parts({"text": marks})
    assert [len(part) for part in parts] == [9] * 11 + [1]


def test_summaries_are_summarised_until_one_is_left(backbone):
    reduce = MapReduce(backbone.codec, TEMPLATE, "text", 14, Decoding(max_new_tokens=4))
    examples = [Example({"text": LONG}, ""), Example({"text": "a dog"}, "")]
    batch = batches_of(backbone.codec, examples)[0]
    lm = Shortens(backbone, 3)
    summary = reduce(lm, batch, 0)
    parts = reduce.parts({"text": LONG})
    rounds, level = [], parts
    while len(level) > 1:
        rounds.append(level)
        firsts = [backbone.codec.tokenizer.decode(backbone.codec.ids(" ".join(p.split()[:3])), skip_special_tokens=True)
                  for p in level]  # fmt: skip
        level = reduce.parts({"text": " ".join(firsts)})
    rounds.append(level)
    assert len(rounds) > 2
    assert summary.split() == level[0].split()[:3]
    assert [text for read in lm.read for text in read] == [text for level in rounds for text in level]
    assert all(len(read) <= len(batch) for read in lm.read)


def test_predictions_read_all_of_long_documents_if_asked(backbone):
    examples = [Example({"text": "a dog"}, ""), Example({"text": LONG}, ""), Example({"text": "dull film"}, "")]
    codec = backbone.codec
    rows = [codec.encode(TEMPLATE.pieces(example.fields), "", 14) for example in examples]
    batch = codec.collate(rows, row_ids=[0, 1, 2], examples=examples)
    module = PromptTuning(length=2, backbone=backbone.spec)
    module.attach(backbone)
    lm, decoding = module.eval().lm(), Decoding(max_new_tokens=4)
    evaluation = GenerationEvaluation(decoding, "text", long_documents="map_reduce", template=TEMPLATE, max_tokens=14)
    said = [record["prediction"] for record in evaluation.predict(lm, batch)]
    cut = [record["prediction"] for record in GenerationEvaluation(decoding, "text").predict(lm, batch)]
    assert [said[0], said[2]] == [cut[0], cut[2]]
    assert said[1] == MapReduce(codec, TEMPLATE, "text", 14, decoding)(lm, batch, 1)


def test_what_map_reduce_cannot_do_is_refused(backbone):
    with pytest.raises(ValueError, match=r"no column 'document' for documents, only \('text',\)"):
        MapReduce(backbone.codec, TEMPLATE, "document", 40, Decoding())
    with pytest.raises(ValueError, match="decrease max_new_tokens or increase max_tokens"):
        MapReduce(backbone.codec, TEMPLATE, "text", 40, Decoding(max_new_tokens=20))
    other = Template("{soft}{title} {text} it was {target}")
    reduce = MapReduce(backbone.codec, other, "text", 14, Decoding(max_new_tokens=4))
    with pytest.raises(ValueError, match="leave no room for 'text' in max_tokens=14"):
        reduce.parts({"title": "dog " * 30, "text": "a dog"})
    lm = Shortens(backbone, 9)
    batch = batches_of(backbone.codec, [Example({"text": " ".join(["dog"] * 40)}, "")])[0]
    reduce = MapReduce(backbone.codec, TEMPLATE, "text", 14, Decoding(max_new_tokens=4))
    with pytest.raises(ValueError, match=r"the summaries of \d+ parts of a document have"):
        reduce(lm, batch, 0)
