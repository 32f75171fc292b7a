"""`softprompt analyze` on a synthetic run, and the kinds and groups of single rows."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.text import Text
from small_tokenizers import extend_by_words, word_pieces

from lightning_softprompt.__main__ import main as launcher
from lightning_softprompt.cli.commands.analysis.analyze import main, read_run
from lightning_softprompt.evaluation.metrics.answers import answer_scores, grounded_fraction, same_answer
from lightning_softprompt.evaluation.metrics.intervals import bootstrap
from lightning_softprompt.evaluation.metrics.retrieval import retrieval_scores
from lightning_softprompt.reports.error_analysis import analyze, compare
from lightning_softprompt.reports.error_page import groups_figure
from lightning_softprompt.reports.error_types import KINDS, AnsweredRow, question_type, rank_name
from lightning_softprompt.system.errors import CommandError

ABSTAIN = "no answer"
TERM_IN_ANSWER = "new term in a correct answer"
PARIS, LYON, ROME = "Paris is the capital of France", "Lyon is a city on the Rhône", "Rome is the capital of Italy"
PASSAGES = {"paris": PARIS, "lyon": LYON, "rome": ROME}


def record(
    answer, right=("Paris",), shown=("lyon", "paris"), found=None, gold=("paris",), question="What is it?", **more
):
    """The record of a row in the predictions of a test."""
    found = shown if found is None else found
    abstained = same_answer(answer, ABSTAIN)
    scores = answer_scores(answer, right) if right and not abstained else dict.fromkeys(answer_scores("", [""]), 0.0)
    scores = dict.fromkeys(scores, 1.0) if abstained and not right else scores
    texts = [PASSAGES[document] for document in shown]
    return {
        "row": 0,
        "input": question,
        "prediction": answer,
        "scores": {
            **scores,
            "abstained": float(abstained),
            "grounded": grounded_fraction(answer, texts) if answer else None,
        },
        "question": question,
        "passages": [
            {"document": d, "text": PASSAGES[d], "rank": found.index(d) if d in found else None} for d in shown
        ],
        "found": list(found),
        "references": list(right),
        "gold": list(gold),
        "target": right[0] if right else ABSTAIN,
        **more,
    }


CHOICE_SCORES = {"no": 0.7, "a": 0.2, "yes": 0.1}

ROWS = {  # by the kind of their answer
    "correct": record("paris!", question="Who <b>was</b> it?"),
    "answered anyway": record("Paris", right=(), gold=()),
    "abstained": record("No answer.", question="Quando foi?"),
    "format": record("I believe that the answer may well be Paris", question="How many are there?"),
    "retrieval miss": record("Italy", shown=("rome", "lyon"), gold=("nantes",), question="Onde fica?"),
    "found, not shown": record("Italy", shown=("rome",), found=("rome", "lyon", "paris")),
    "wrong choice": record("no", right=("yes",), scores=CHOICE_SCORES),
    "wrong span": record("Paris in Italy", right=("Paris in France",), gold=("paris", "lyon")),
    "not used": record("the Rhône"),
    "ungrounded": record("Berlin, Germany"),
    "mixed": record("the capital, on the Rhône"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_an_example(kind):
    assert AnsweredRow(ROWS[kind]).kind == kind


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (record(ABSTAIN, right=(), gold=()), "correct"),
        (record(""), "format"),
        (record("yes", right=("yes",), scores=CHOICE_SCORES), "correct"),
        (record("a", right=("yes",), scores=CHOICE_SCORES), "wrong choice"),
        (record("no", right=("yes",), shown=("rome",), found=("rome",), scores=CHOICE_SCORES), "retrieval miss"),
        (record("no", right=("capital",), gold=(), scores=CHOICE_SCORES), "wrong choice"),
        (record("The"), "format"),
        (record("capital of France"), "wrong span"),  # part of the relevant passage, but not the answer
        (record("Paris", shown=("rome",), found=("rome",)), "correct"),  # even if nothing relevant was retrieved
        (record("big Paris", shown=("rome",), found=("rome",)), "retrieval miss"),
        (record("Rhône", gold=()), "not used"),  # a passage that contains the answer is relevant
        (record("Rhône", gold=(), shown=("lyon", "rome")), "retrieval miss"),
        (record("Rhône", gold=("nantes",)), "not used"),  # not the gold document, but it contains the answer
        (record("Rhône", shown=(), gold=()), "ungrounded"),
        (record("big Paris", shown=(), gold=()), "wrong span"),
        (record("Rhône", shown=("lyon", "paris"), found=("lyon",)), "not used"),  # added to the retrieved passages
    ],
)
def test_kinds_of_less_typical_rows(row, kind):
    assert AnsweredRow(row).kind == kind


def test_an_answer_is_mixed_if_each_side_gives_a_fifth_of_its_words():
    five_words = "capital France Rhône city Lyon"  # three of five are from the other passage
    assert AnsweredRow(record(five_words)).sources == {True: 2 / 5, False: 3 / 5}
    assert AnsweredRow(record(f"{five_words} river valley bridge theatre festival x y")).kind != "mixed"
    of_question = record(five_words, question="Which city is Lyon, on the Rhône?")
    assert AnsweredRow(of_question).sources == {True: 1.0, False: 0.0}  # words of the question do not count
    assert AnsweredRow(record("capital is", shown=("paris",))).sources == {True: 1.0, False: 0.0}


def test_correct_f1_is_the_minimum_f1_of_a_correct_answer():
    row = record("Paris in Italy", right=("Paris in France",))
    assert AnsweredRow(row, 0.6).kind == "correct"
    assert AnsweredRow(row, 0.7).kind == "wrong span"
    assert AnsweredRow(record("France Paris", right=("Paris France",))).kind == "correct"


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("Who's that?", "who"),
        ("To whom is it due, and when?", "who"),
        ("In what year?", "what"),
        ("How long?", "how"),
        ("How much?", "how many"),
        ("Is it so?", "other"),
        ("", "other"),
        (None, "other"),
        ("De quem é?", "who"),
        ("Em que ano?", "what"),
        ("O quê?", "what"),
        ("Quais são?", "which"),
        ("Aonde vai?", "where"),
        ("Por que não?", "why"),
        ("Porquê?", "why"),
        ("COMO está?", "how"),
        ("Quantas são?", "how many"),
    ],
)
def test_the_first_question_word_is_the_type(question, kind):
    assert question_type(question) == kind


def test_groups_by_gold_documents():
    several = ("paris", "lyon")
    assert AnsweredRow(record("x", found=("rome", "rome", "paris"))).gold_rank == "2"  # documents, not passages
    assert AnsweredRow(record("x", found=("rome",))).gold_rank == "added"
    assert AnsweredRow(record("x", shown=("rome",))).gold_rank == "not found"
    assert AnsweredRow(record("x", gold=())).gold_rank == "not known"
    assert AnsweredRow(record("x")).groups["passage position"] == "2"
    shown = [
        AnsweredRow(record("x", gold=several, shown=s)).groups["gold documents"] for s in (several, ("paris",), ())
    ]
    assert shown == ["several, all shown", "several, some shown", "several, none shown"]
    assert [rank_name(rank) for rank in (1, 3, 4, 5, 6, 10, 11)] == ["1", "3", "4-5", "4-5", "6-10", "6-10", "11+"]


def rows_of(records):
    return [AnsweredRow({**record, "row": number}) for number, record in enumerate(records)]


def test_values_of_groups_are_means_over_their_rows():
    rows = rows_of([*ROWS.values()] * 3)
    report = analyze(rows)
    assert report["rows"] == sum(kind["rows"] for kind in report["kinds"].values()) == 33
    assert {kind: values["rows"] for kind, values in report["kinds"].items()} == dict.fromkeys(KINDS, 3)
    f1 = [row.f1 for row in rows]
    assert report["f1"] == pytest.approx(np.mean(f1))
    assert (report["f1_low"], report["f1_high"]) == pytest.approx(bootstrap(f1))
    for group_by, groups in report["groups"].items():
        assert sum(group["rows"] for group in groups.values()) == 33
        for name, group in groups.items():
            rows_of_group = [row for row in rows if row.groups[group_by] == name]
            assert group["exact_match"] == pytest.approx(np.mean([row.exact_match for row in rows_of_group]))
            counts = {kind: sum(row.kind == kind for row in rows_of_group) for kind in KINDS}
            assert group["kinds"] == {kind: count for kind, count in counts.items() if count}
    assert list(report["groups"]["gold rank"])[:3] == ["1", "2", "3"]
    assert set(report["groups"]["question"]) == {"who", "what", "when", "where", "how many"}
    assert [case["row"] for case in report["cases"] if case["several gold"]] == [7, 18, 29]


def test_retrieval_is_scored_on_rows_with_gold_documents():
    rows = rows_of(ROWS.values())
    scores = [retrieval_scores(row.found, row.gold, [1]) for row in rows if row.gold]
    retrieval = analyze(rows)["retrieval"]
    assert retrieval["rows"] == len(scores) == 10
    assert retrieval["measures"]["mrr"]["mean"] == pytest.approx(np.mean([row["mrr"] for row in scores]))
    assert "hit@5" not in retrieval["measures"]
    closed = analyze(rows_of([record("x", shown=(), gold=())]))
    assert closed["retrieval"] == {}
    assert set(closed["groups"]) == {"question"}


def test_comparison_is_paired_by_rows():
    answers = [("Paris", "Lyon"), ("Paris", "Paris"), ("big Paris", "Paris"), ("Paris", "the Rhône"), ("Rome", "Rome")]
    this, other = (rows_of(record(pair[side]) for pair in answers) for side in (0, 1))
    report = compare(this[::-1], [*other, *rows_of([record("x", question="Why?")] * 6)[5:]])
    differences = [a.f1 - b.f1 for a, b in zip(this, other, strict=True)]
    assert report["rows"] == 5
    assert report["left_out"] == {"of_this": 0, "of_the_other": 1}
    f1 = report["f1"]
    assert f1["difference"] == pytest.approx(np.mean(differences)) == pytest.approx(f1["this"] - f1["other"])
    assert (f1["low"], f1["high"]) == pytest.approx(bootstrap(differences[::-1]))
    assert (f1["better"], f1["worse"]) == (2, 1)
    assert report["exact_match"]["difference"] == pytest.approx(1 / 5)
    assert {"other": "not used", "this": "correct", "rows": 2} in report["kinds"]
    assert sum(pair["rows"] for pair in report["kinds"]) == 5


def test_runs_on_other_rows_are_refused():
    with pytest.raises(ValueError, match=r"row 0 has the question 'What is it\?' .* and 'Why\?' .* in the other"):
        compare(rows_of([record("x")]), rows_of([record("x", question="Why?")]))
    with pytest.raises(ValueError, match="no row in common"):
        compare(rows_of([record("x")]), rows_of([record("x")] * 2)[1:])


def write_predictions(folder, records, name="test_predictions.jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({**record, "row": number}, ensure_ascii=False) for number, record in enumerate(records)]
    (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder


class Page(HTMLParser):
    """Tags, attributes and texts of a page; each opened tag must be closed."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = [], [], [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.open += [] if tag in ("meta", "img") else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_analyze_writes_tables_a_page_and_json(tmp_path, capsys):
    run = write_predictions(tmp_path / "run", ROWS.values())
    assert launcher(["analyze", str(run)]) == 0
    output = capsys.readouterr().out
    for kind in KINDS:
        assert f"\n{kind} " in output
    assert "By gold rank" in output
    assert "Retrieval for 10 questions" in output
    report = json.loads((run / "analysis.json").read_text())
    assert [case["kind"] for case in report["cases"]] == list(ROWS)
    assert report["groups"]["question"]["who"]["rows"] == 1
    page = Page((run / "analysis.html").read_text())
    assert not set(page.tags) & {"script", "link", "iframe", "b"}
    sources = [value for name, value in page.attributes if name == "src"]
    assert len(sources) == 1 + sum(len(groups) > 1 for groups in report["groups"].values())
    links = [value for name, value in page.attributes if name == "href"]
    assert len(links) == len(set(links)) > len(KINDS)
    assert {value.removeprefix("#") for value in links} == {v for name, v in page.attributes if name == "id"}
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "Who <b>was</b> it?" in page.texts
    assert "row 7: exact_match 0, f1 0.667, gold rank 1, 2 gold documents" in page.texts
    assert "passage 2: paris (rank 2, relevant)" in page.texts
    assert "found, not shown (1 of 1)" in page.texts
    assert sorted(path.name for path in run.iterdir()) == ["analysis.html", "analysis.json", "test_predictions.jsonl"]


def test_the_page_names_method_prompt_data_and_command(tmp_path):
    run = write_predictions(tmp_path / "run", ROWS.values())
    config = {
        "model": {"class_path": "x.Spring"},
        "data": {"class_path": "x.RagQaDataModule", "init_args": {"path": "rows/squad"}},
        "backbone": {"name": "tiny"},
        "run": {"wandb": "disabled"},
    }
    (run / "config.yaml").write_text(json.dumps(config))
    (run / "run.json").write_text(json.dumps({"started": "2026-01-02 03:04:05", "source": "../p.safetensors"}))
    assert main([str(run), "--examples", "1"]) == 0
    (note,) = (text for text in Page((run / "analysis.html").read_text()).texts if "softprompt analyze" in text)
    for part in ("Spring", str(tmp_path / "p.safetensors"), "data squad", "tiny", "tested 2026-01-02", "--examples 1"):
        assert part in note


def test_no_label_of_a_plot_is_cut():
    for count in (2, 9):
        groups = {f"group {i}": {"rows": 3, "f1": 0.5, "f1_low": 0.4, "f1_high": 0.6} for i in range(count)}
        figure = groups_figure(groups)
        figure.draw_without_rendering()
        width, height = figure.get_size_inches() * figure.dpi
        for axes in figure.axes:
            labels = [axes.xaxis.label, axes.yaxis.label, *axes.get_yticklabels()]
            for text in filter(Text.get_text, labels):
                box = text.get_window_extent()
                assert 0 <= box.x0 <= box.x1 <= width
                assert 0 <= box.y0 <= box.y1 <= height


def test_the_number_of_examples_is_an_option(tmp_path, capsys):
    run = write_predictions(tmp_path / "run", [ROWS["ungrounded"]] * 7)
    for count, heading in ((5, "ungrounded (5 of 7)"), (0, "ungrounded (0 of 7)")):
        assert main([str(run), "--examples", str(count)]) == 0
        page = Page((run / "analysis.html").read_text())
        assert page.tags.count("article") == count
        assert heading in page.texts


def test_two_runs_are_compared_by_row(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")  # folders of tests can have long names
    run = write_predictions(tmp_path / "run", [record("Paris")] * 6 + [record("Rhône")])
    other = write_predictions(tmp_path / "other", [record("Rhône")] * 6 + [record("Paris")])
    assert main([str(run), "--against", str(other)]) == 0
    output = capsys.readouterr().out
    assert f"Compared with {other} on 7 common rows" in output
    assert "+0.714 [+0.143, +1.000]" in output
    report = json.loads((run / "analysis.json").read_text())["against"]
    assert (report["f1"]["better"], report["f1"]["worse"]) == (6, 1)
    assert not (other / "analysis.json").exists()
    assert "Rows of another kind" in (run / "analysis.html").read_text()


def test_rows_are_grouped_by_added_terms(tmp_path, capsys, monkeypatch):
    """A word is a term if it became one token. The second row has a longer word, the last one a term in its answer."""
    monkeypatch.setenv("COLUMNS", "250")
    vocabulary, _ = extend_by_words(word_pieces(), ["cardiology"], tmp_path / "vocabulary")
    questions = ["Cardiology or not?", "Is it neurocardiology?", "What is cardiology?", "What is it?"]
    records, others = [], []
    for number, question in enumerate(questions):
        right = ("Paris", "cardiology") if number == 3 else ("Paris",)
        records.append(record("Paris", right, question=question, row=number))
        others.append(record("Paris" if number else "Rome", right, question=question, row=number))
    run, other = write_predictions(tmp_path / "run", records), write_predictions(tmp_path / "other", others)
    assert main([str(run), "--terms", str(vocabulary), "--against", str(other)]) == 0
    report = json.loads((run / "analysis.json").read_text())
    by_question, by_answer = (report["groups"][name] for name in ("new term in the question", TERM_IN_ANSWER))
    assert {name: group["rows"] for name, group in by_question.items()} == {"yes": 2, "no": 2}
    assert {name: group["rows"] for name, group in by_answer.items()} == {"yes": 1, "no": 3}
    differences = report["against"]["groups"]["new term in the question"]
    assert [differences[name]["f1"]["difference"] for name in ("yes", "no")] == [0.5, 0.0]
    assert "Compared by new term in the question" in capsys.readouterr().out


def test_a_folder_without_a_vocabulary_is_refused(tmp_path):
    run = write_predictions(tmp_path / "run", [record("Paris")])
    with pytest.raises(CommandError, match=r"--terms: .* has no vocabulary.json"):
        main([str(run), "--terms", str(tmp_path)])


def test_unicode_line_separators_in_a_text_do_not_end_a_record(tmp_path):
    run = write_predictions(tmp_path / "run", [record("one\u2028two\x85three")])
    assert read_run(run)[0].answer == "one\u2028two\x85three"


def test_rows_of_other_tasks_are_omitted(tmp_path):
    words = {"row": 1, "task": "mood", "input": "x", "prediction": "good", "scores": {"good": 0.5}, "target": "bad"}
    run = write_predictions(tmp_path / "run", [{**ROWS["correct"], "task": "ask"}, words])
    (row,) = read_run(run)
    assert row.groups["task"] == "ask"


PLAIN = {"row": 0, "input": "x", "prediction": "good", "scores": {"good": 0.5}, "target": "bad"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "run does not exist; expected a run folder"),
        (
            lambda folder: folder.mkdir(),
            "has no test_predictions.jsonl; expected a run folder",
        ),
        (lambda folder: write_predictions(folder, [], "test_predictions.jsonl.part"), "has not finished"),
        (
            lambda folder: write_predictions(folder / "checkpoints", [], "best.ckpt"),
            "is the folder of a training .* --ckpt_path .*best.ckpt",
        ),
        (lambda folder: write_predictions(folder, []), "has 0 rows, but none of them answers a question"),
        (
            lambda folder: write_predictions(folder, [PLAIN]),
            "1 rows, but none .*: question, references, passages, found, gold miss",
        ),
        (
            lambda folder: write_predictions(folder, [{**ROWS["correct"], "scores": None}]),
            "none of them answers a question: scores missing",
        ),
        (
            lambda folder: write_predictions(folder, []).joinpath("test_predictions.jsonl").write_text("{}\n{"),
            r"jsonl:2: expected",
        ),
        (
            lambda folder: write_predictions(folder, []).joinpath("test_predictions.jsonl").write_text("3\n"),
            "jsonl:1: expected a JSON",
        ),
    ],
)
def test_folders_without_a_question_answering_test_are_refused_and_nothing_is_written(tmp_path, make, message):
    run = tmp_path / "run"
    make(run)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CommandError, match=message):
        main([str(run)])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_comparison_that_fails_writes_nothing(tmp_path):
    run = write_predictions(tmp_path / "run", [record("x")])
    other = write_predictions(tmp_path / "other", [record("x", question="Why?")])
    for against, message in ((other, "test both on the same rows"), (tmp_path / "gone", "does not exist")):
        with pytest.raises(CommandError, match=message):
            main([str(run), "--against", str(against)])
    assert [path.name for path in run.iterdir()] == ["test_predictions.jsonl"]


@pytest.mark.parametrize("option", ["--right=0", "--right=1.5", "--examples=-1"])
def test_numbers_out_of_range_are_refused(tmp_path, option):
    message = "--examples must be at least 0" if "examples" in option else "--correct-f1 must be above 0 and at most 1"
    with pytest.raises(CommandError, match=message):
        main([str(tmp_path), option])
