"""The evidence page: tables, and lines of claims that follow from rows."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from lightning_softprompt.system.plain_yaml import read_yaml

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "evidence"))
import claims
import comparisons
import question_sets
import tables
from plan import Plan
from pretraining_tables import measure_pretraining

EVIDENCE = Path(tables.__file__).parent
PLAN = Plan(EVIDENCE / "experiments.yaml")
TOPICS = read_yaml(EVIDENCE / "claims.yaml")
PRETRAINING = read_yaml(EVIDENCE / "pretraining.yaml")
LOW, HIGH = [0.0] * 30 + [1.0] * 10, [1.0] * 40


def result(block, method, seed, scores, **values):
    """A tested run on SST-2."""
    common = {"task": "sst2", "backbone": "SmolLM2-135M", "metric": "accuracy", "mode": "max", "selects_rate": False}
    common |= {"steps": 5, "rate": 0.1, "train_seconds": 60.0, "trainable_parameters": 1200, "peak_mb": 9}
    common |= {"cpu": "a CPU", "threads": 1, "test": float(np.mean(scores)), "row_scores": scores}
    return {**common, "block": block, "method": method, "seed": seed, **values}


def length_results(seeds=(1, 2, 3)):
    """Runs of all lengths, whose score and gap rise with the length."""
    rows = []
    for seed in seeds:
        for level, length in enumerate([1, 5, 20, 50, 100]):
            scores = [1.0] * (10 + 6 * level + seed) + [0.0] * (30 - 6 * level - seed)
            curve = {"train_sample/accuracy": [[9, 0.5], [19, 0.6 + 0.05 * level]], "val/accuracy": [[19, 0.6]]}
            rows.append(result("length", f"prompt tuning, length {length}", seed, scores, curve=curve))
    return rows


def find_line(text, start):
    """The line of a claim."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [column.strip() for column in line.strip("|").split("|")]


def test_tables_name_pairs_that_differ_and_pairs_that_do_not():
    groups = {"weak": LOW, "strong": HIGH, "also strong": HIGH}
    rows = [result("b", method, seed, scores) for method, scores in groups.items() for seed in (1, 2)]
    text = "\n".join(tables.page(rows, PLAN, []))
    assert "| strong | 2 | 1.000 ± 0.000 | 0.1 | 1,200 | 5 | 1.0 | 9 |" in text
    assert "| strong over weak | 0.750 |" in text
    assert "| also strong over weak | 0.750 |" in text
    assert "No difference is shown between strong and also strong." in text


def test_a_pair_whose_seeds_vary_more_than_it_differs_is_not_called_different():
    scores = np.array([[1.0] * 40, [0.0] * 30 + [1.0] * 10])
    other = np.array([[1.0] * 20 + [0.0] * 20, [0.0] * 20 + [1.0] * 20])
    assert comparisons.compare_rows(scores, other).p > 0.3
    assert comparisons.compare_rows(scores[:1], other[:1]).p < 0.01  # rows alone


def test_lines_of_claims_follow_from_rows():
    text = "\n".join(tables.page(length_results(), PLAN, TOPICS))
    line = find_line(text, "Too short a prompt limits")
    assert line[1:3] == ["higher", "higher"]
    assert line[3].startswith("+0.300 [")
    assert line[5:] == ["6", "`run_queue.py --blocks length`"]
    assert find_line(text, "Too long a prompt overfits. The gap")[1:3] == ["rise", "rise"]
    assert find_line(text, "Classification needs no more")[2] == "**higher**"


def test_a_claim_without_all_runs_is_not_measured_yet():
    text = "\n".join(tables.page(length_results(seeds=(1, 2)), PLAN, TOPICS))
    line = find_line(text, "Too short a prompt limits")
    assert line[2] == "not measured yet (4 of 6 runs)"
    assert line[3].startswith("earlier: 24 steps")
    assert line[4:6] == ["", "6"]


def test_a_ratio_is_shown_as_a_factor():
    methods = {"prompt tuning": 11_520, "full fine-tuning": 134_515_008}
    rows = []
    for seed in range(1, 6):
        for method, size in methods.items():
            rows.append(result("classification", method, seed, HIGH, trainable_parameters=size))
    line = find_line("\n".join(tables.page(rows, PLAN, TOPICS)), "Prompt tuning trains a tiny part")
    assert line[2:4] == ["lower", "x 8.56e-05 [8.56e-05, 8.56e-05]"]


def test_each_claim_selects_planned_runs_and_can_be_computed():
    for topic in TOPICS:
        for claim in topic["claims"]:
            fields = set(claim)
            assert (
                fields >= {"claim", "claimed", "result", "runs", "command"}
                or fields >= {"claim", "reason"}
                or ("corpus" in claim and measure_pretraining(claim, [], PRETRAINING).planned > 3)
                or (
                    claims.measure(claim, PLAN, []).planned > 1
                    and claim.get("value", "test") in {"test", *claims.VALUES}
                )
            )
        if "config" in topic:
            assert (EVIDENCE.parents[1] / topic["config"]).is_file()


def pretrained(method, seed, medical, general):
    """A tested run of continued pre-training, with the nats of 30 documents of one byte for each corpus."""
    of_questions = [1.0, 2.0, 2.0, 2.0, 2.0, 1.0, 2.0, 2.0]  # of two cloze questions, the first one is right
    nats = {"medical": [medical] * 30, "general": [general] * 30, "cloze": of_questions}
    documents = {name: [[value * np.log(2), 1] for value in values] for name, values in nats.items()}
    settings = {"corpus": "medical", "selects_rate": False, "rate": 0.1, "trainable_parameters": 5}
    return {"method": method, "seed": seed, **settings, "documents": documents}


def test_forgetting_is_the_change_on_general_text():
    rows = [pretrained("bare", 1, 1.0, 1.0)]
    for seed in (1, 2, 3):
        rows.append(pretrained("full weights", seed, 0.5, 1.5 + seed / 100))
        rows.append(pretrained("full weights, EWC", seed, 0.6, 1.1 + seed / 100))
    text = "\n".join(tables.page([], PLAN, TOPICS, pretraining=rows))
    line = find_line(text, "full weights, EWC |")
    assert line[4] == "0.600"
    assert line[5].startswith("-0.400 [")
    assert line[6] == "1.120"
    assert line[7].startswith("+0.120 [")
    assert line[8:] == ["0.50", "-"]
    assert find_line(text, "Elastic weight consolidation reduces")[2] == "lower"
    assert find_line(text, "Training all weights on a domain forgets")[2] == "higher"
    assert find_line(text, "Replay of 10 %")[2] == "not measured yet (3 of 6 runs)"


def test_a_selection_of_no_planned_run_is_refused():
    with pytest.raises(ValueError, match="selects runs of 0 tasks"):
        claims.select_cells({"block": "length", "method": "prompt tuning, length 7"}, PLAN)


def test_the_command_writes_page_and_figures(tmp_path, monkeypatch):
    (tmp_path / "results.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in length_results()))
    words = [f"--results={tmp_path / 'results.jsonl'}", f"--out={tmp_path / 'evidence.md'}"]
    monkeypatch.setattr(sys, "argv", ["tables.py", *words])
    tables.main()
    page = (tmp_path / "evidence.md").read_text()
    assert "![test metric over the length of the prompt](evidence/length.png)" in page
    assert (tmp_path / "evidence" / "length.png").stat().st_size > 1000
    assert not (tmp_path / "evidence" / "cost.png").exists()


def test_derived_questions_have_confusable_passages_and_two_parts(tmp_path):
    source = tmp_path / "qa" / "medquad"
    source.mkdir(parents=True)
    rows, passages = [], []
    for disease in ("flu", "COVID-19", "measles"):
        for kind in ("symptoms", "treatment"):
            document = f"{disease} {kind}"
            rows.append(
                {
                    "id": document,
                    "focus": disease,
                    "qtype": kind,
                    "question": f"What about {document}?",
                    "answers": [f"answer on {document}"],
                    "positive_ids": [document, f"{document} 2"],
                }
            )
            passages += [{"id": name, "title": disease, "text": name} for name in (document, f"{document} 2")]
    for name, content in {"corpus": passages, **dict.fromkeys(question_sets.SPLITS, rows)}.items():
        question_sets.write_rows(source / f"{name}.jsonl", content)
    question_sets.write_question_sets(tmp_path, tmp_path / "sets")
    confusable = question_sets.read_rows(tmp_path / "sets" / "confusable" / "test.jsonl")
    corpus = question_sets.read_rows(tmp_path / "sets" / "confusable" / "corpus.jsonl")
    assert [row["focus"] for row in confusable] == ["flu", "COVID-19", "measles"]
    gold = {document for row in confusable for document in row["positive_ids"]}
    assert len(gold) == 3
    assert gold <= {passage["id"] for passage in corpus}
    assert not {f"{document} 2" for document in gold} & {passage["id"] for passage in corpus}
    (joined, *_) = question_sets.read_rows(tmp_path / "sets" / "two_parts" / "test.jsonl")
    assert joined["question"] == "What about flu symptoms? What about flu treatment?"
    assert joined["answers"] == ["answer on flu symptoms answer on flu treatment"]
    assert joined["positive_ids"] == ["flu symptoms", "flu treatment"]
