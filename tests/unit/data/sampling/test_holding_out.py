"""How the rows of a single file are divided into training, validation and test rows."""

from collections import Counter

import pytest

from lightning_softprompt.data.sampling.holding_out import divide_rows

SHARES = {"test": 0.1, "validation": 0.1}


@pytest.mark.parametrize("sizes", [(40, 60), (5, 95), (33, 33, 34), (1, 1, 1, 97)])
def test_parts_are_disjoint_complete_and_stratified(sizes):
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    parts = divide_rows(labels, SHARES, seed=3)
    assert sorted(row for part in parts.values() for row in part) == list(range(100))
    assert {name: len(part) for name, part in parts.items()} == {"train": 80, "test": 10, "validation": 10}
    for name in SHARES:
        counts = Counter(labels[row] for row in parts[name])
        for label, size in enumerate(sizes):
            assert abs(counts[label] - size / 10) < 2


def test_the_seed_determines_the_parts():
    labels = [0, 1] * 20
    assert divide_rows(labels, SHARES, seed=1) == divide_rows(labels, SHARES, seed=1)
    assert divide_rows(labels, SHARES, seed=1) != divide_rows(labels, SHARES, seed=2)


def test_each_part_has_at_least_one_row_of_a_small_file():
    assert {name: len(part) for name, part in divide_rows([None] * 3, SHARES, seed=0).items()} == {
        "train": 1, "test": 1, "validation": 1,
    }  # fmt: skip
