"""The metrics of an evaluation as text."""

from lightning_softprompt.reports.result_table import format_metrics


def test_main_metrics_come_first_and_intervals_are_in_their_row():
    metrics = {
        "test/mcc": 0.5,
        "test/loss": 0.25,
        "test/accuracy_low": 0.7,
        "test/accuracy_high": 0.9,
        "test/accuracy": 0.8,
    }
    assert format_metrics(metrics, "test").splitlines() == [
        "accuracy  0.8000 [0.7000, 0.9000]", "mcc       0.5000", "loss      0.2500",
    ]  # fmt: skip


def test_metrics_per_class_are_a_table_that_is_cut_off_after_twenty_classes():
    metrics = {f"val/{metric}/class {number:02d}": number / 100 for number in range(25) for metric in ("f1", "recall")}
    lines = format_metrics({"val/accuracy": 1.0, **metrics}, "val").splitlines()
    assert lines[0] == "accuracy  1.0000"
    assert lines[2].split() == ["f1", "recall"]
    assert lines[4].split() == ["class", "00", "0.0000", "0.0000"]
    assert len(lines) == 4 + 20 + 1
    assert lines[-1] == "... and 5 more, in metrics.json"


def test_the_cross_entropy_is_printed_only_if_it_differs_from_the_loss():
    equal = {"val/loss": 0.5, "val/cross_entropy": 0.50000001}  # they are averaged in another order
    assert format_metrics(equal, "val") == "loss  0.5000"
    lines = format_metrics({"val/loss": 0.5, "val/cross_entropy": 0.4}, "val").splitlines()
    assert lines == ["loss           0.5000", "cross_entropy  0.4000"]


def test_the_number_of_generated_answers_is_no_score():
    assert format_metrics({"val/rougeL": 0.5, "val/generated": 4.0}, "val") == "rougeL  0.5000"


def test_the_share_of_predictions_is_named():
    header = format_metrics({"val/f1/a": 0.5, "val/predicted/a": 0.25}, "val").splitlines()[0]
    assert header.split() == ["f1", "share", "predicted"]


def test_parts_have_their_intervals():
    metrics = {"test/general/bits": 1.5, "test/general/bits_low": 1.4, "test/general/bits_high": 1.6, "test/bits": 1.0}
    lines = format_metrics(metrics, "test").splitlines()
    assert lines[0].split() == ["bits", "1.0000"]
    assert lines[-1].split() == ["bits", "1.5000", "[1.4000,", "1.6000]"]
