"""The page of best and worst cases, read by an HTML parser."""

import math
import re
from html.parser import HTMLParser

import pytest
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader

from lightning_softprompt.callbacks.reporting.case_report import CaseReport
from lightning_softprompt.evaluation.case_ranking import ByConfidence, ByScore
from lightning_softprompt.reports.html import LONG, cases_page, highlight

VOID = {"meta"}
ROWS = 10
LOSS = 0.123456


class Rows(LightningDataModule):
    """Row numbers in batches of four."""

    def __init__(self, order=range(ROWS)):
        super().__init__()
        self.order = order

    def test_dataloader(self):
        return DataLoader(list(self.order), batch_size=4)

    def describe_row(self, split, row):
        return {"input": f"{split} text {row}"}


class Page(HTMLParser):
    """A parsed page with its texts by tag; every opened tag must be closed."""

    def __init__(self, source):
        super().__init__()
        self.open, self.texts, self.tags, self.attributes = [], [], [], []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def of(self, tag):
        return [text for name, text in self.texts if name == tag]


class Answers(LightningModule):
    """Predicts texts with scores by row; row 5 has no scores, and the scores of row 3 are NaN."""

    def test_step(self, batch, batch_idx):
        self.log("test/loss", LOSS)
        return [
            {"row": r, "prediction": f"<b>dog {r}", "target": "a dog", "scores": self.scores(r)} for r in batch.tolist()
        ]

    def scores(self, row):
        value = math.nan if row == 3 else (row * 7 % ROWS) / ROWS
        return None if row == 5 else {"rouge1": 1 - value, "rougeL": value}


class Unscored(Answers):
    """Predicts texts without scores."""

    def scores(self, row):
        return None


def run(folder, report, module=None, data=None, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    Trainer(default_root_dir=folder, callbacks=[report], **quiet, **options).test(
        module or Answers(), data or Rows(), verbose=False
    )
    return report.path


def rows_of(path, part):
    """The rows of a part of the page, in order."""
    section = path.read_text().partition(f">{part}</h2>")[2].partition("<h2")[0]
    return [int(row) for row in re.findall(r"<h3>row (\d+):", section)]


def sort_rows(sign):
    scored_rows = [row for row in range(ROWS) if row not in (3, 5)]
    return sorted(scored_rows, key=lambda row: sign * (row * 7 % ROWS))


@pytest.mark.parametrize("order", [range(ROWS), [9, 1, 0, 4, 2, 3, 5, 8, 7, 6]])
def test_the_best_and_worst_of_all_rows_are_shown_in_any_order_of_the_data(tmp_path, order):
    path = run(tmp_path, CaseReport(tmp_path / "test_cases.html", ByScore("rougeL"), rows=3), data=Rows(order))
    assert rows_of(path, "Best") == sort_rows(-1)[:3]
    assert rows_of(path, "Worst") == sort_rows(1)[:3]


def test_two_processes_write_the_same_page_as_one(tmp_path):
    alone = run(tmp_path, CaseReport(tmp_path / "alone.html", ByScore("rougeL"), rows=2))
    both = run(tmp_path, CaseReport(tmp_path / "both.html", ByScore("rougeL"), rows=2), strategy="ddp_fork", devices=2)
    assert both.read_text() == alone.read_text()


def test_a_row_is_shown_once_if_there_are_few(tmp_path):
    path = run(tmp_path, CaseReport(tmp_path / "test_cases.html", ByScore("rougeL"), rows=6))
    assert rows_of(path, "Best") == sort_rows(-1)[:6]
    assert rows_of(path, "Worst") == sort_rows(1)[:2]


def test_a_row_with_the_score_0_is_not_one_of_the_best():
    cases = {row: {"row": row, "scores": {"f1": score}} for row, score in enumerate((0.0, 0.5, 0.0))}
    parts = ByScore("f1").select(cases, 10)
    assert {name: [case["row"] for case in part] for name, part in parts.items()} == {"Best": [1], "Worst": [2, 0]}


def test_wrong_classes_are_ranked_by_confidence_in_any_order_and_selection_can_be_repeated():
    targets = ("good", "bad", "bad", "good", "bad")
    shares = (0.9, 0.6, 0.8, 0.55, 0.2)  # of the class good
    cases = {}
    for row, (target, share) in enumerate(zip(targets, shares, strict=True)):
        scores = {"good": share, "bad": 1 - share}
        cases[row] = {"row": row, "prediction": max(scores, key=scores.get), "target": target, "scores": scores}
    parts = ByConfidence().select(cases, 2)
    assert [[case["row"] for case in part] for part in parts.values()] == [[2, 1], [3, 4]]
    selected = {case["row"]: case for part in parts.values() for case in part}
    assert ByConfidence().select(selected, 2) == parts


def test_passages_are_apart_from_the_question_and_only_the_main_metrics_are_open():
    record = {
        "row": 0, "input": "prompt", "question": "where?", "prediction": "rome", "target": "paris",
        "passages": [{"document": "d", "text": "<u>paris</u>", "rank": 0}], "scores": {"f1": 0.0},
    }  # fmt: skip
    metrics = {f"test/m{number}": 0.5 for number in range(6)}
    page = Page(
        cases_page(
            "title", "note", {**metrics, "test/f1": 0.5, "test/f1_low": 0.25, "test/f1_high": 0.75}, {"Worst": [record]}
        )
    )
    assert page.of("td")[:2] == ["f1", "0.5000 [0.2500, 0.7500]"]
    assert {"3 further metrics", "1 passages"} <= set(page.of("summary"))
    assert page.of("dt") == ["question", "passages", "target", "prediction"]
    assert "prompt" not in page.of("dd")
    assert "u" not in page.tags


def test_the_page_has_metrics_texts_and_scores_and_its_path_is_logged(tmp_path, caplog):
    caplog.set_level("INFO")
    path = run(tmp_path, CaseReport(tmp_path / "test_cases.html", ByScore("rougeL"), rows=2))
    page = Page(path.read_text())
    assert page.of("td") == ["loss", "0.1235"]
    assert "test text 7" in page.of("dd")
    assert "<b>" in page.of("dd")
    assert "b" not in page.tags
    assert page.of("h3")[0] == "row 7: rouge1 0.1, rougeL 0.9"
    assert f"Best and worst cases by rougeL: {path}" in caplog.text


def test_the_page_needs_no_other_file_and_is_small(tmp_path):
    path = run(tmp_path, CaseReport(tmp_path / "test_cases.html", ByScore("rougeL")))
    page = Page(path.read_text())
    assert not set(page.tags) & {"script", "link", "img", "iframe"}
    links = [value for name, value in page.attributes if name in ("src", "href")]
    assert links == ["#best", "#worst"]
    assert "http" not in path.read_text()
    assert "prefers-color-scheme: dark" in path.read_text()
    assert path.stat().st_size < 8_000


def test_without_scores_there_is_no_page(tmp_path):
    assert not run(tmp_path, CaseReport(tmp_path / "test_cases.html", ByScore("rougeL")), Unscored()).exists()


def test_long_inputs_are_folded_and_nothing_in_a_text_is_markup():
    record = {
        "row": 0,
        "input": "<i>" + "x" * LONG,
        "target": "</dd>&amp;",
        "prediction": '"<script>"',
        "scores": {"s": 1},
    }
    page = Page(cases_page("<s>", "<s>", {}, {"Best": [record, {**record, "input": "<i>short"}]}))
    assert page.tags.count("details") == 1
    assert page.of("details") == [record["input"]]
    assert not set(page.tags) & {"i", "script", "s"}
    assert "</dd>&amp;" in page.of("dd")
    assert page.of("title") == ["<s>"]


def test_shared_words_are_marked_in_any_case_and_only_as_complete_words():
    assert highlight("The dog, dogs <x>", "a DOG x") == "The <mark>dog</mark>, dogs &lt;<mark>x</mark>&gt;"
    assert highlight("Straße 東京", "STRASSE 東京") == "<mark>Straße</mark> <mark>東京</mark>"
    assert highlight("", "a") == highlight("", "") == ""
