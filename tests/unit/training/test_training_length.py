"""The length and logging interval of a training whose options leave them open."""

from datetime import timedelta

import pytest

from lightning_softprompt.training.training_length import default_patience, default_trainer_options


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"max_epochs": 10, "log_every_n_steps": 10}),
        ({"max_epochs": None, "max_steps": -1, "log_every_n_steps": None}, {"max_epochs": 10, "log_every_n_steps": 10}),
        ({"max_steps": 1000}, {"log_every_n_steps": 10}),
        ({"max_steps": 30}, {"log_every_n_steps": 3}),
        ({"max_steps": 4}, {"log_every_n_steps": 1}),
        ({"max_epochs": 2, "log_every_n_steps": 7}, {}),
        ({"max_epochs": -1}, {"log_every_n_steps": 10}),
        ({"max_time": timedelta(hours=1)}, {"log_every_n_steps": 10}),
    ],
)
def test_only_open_options_are_set(options, expected):
    assert default_trainer_options(options) == expected


@pytest.mark.parametrize(
    ("early_stopping", "options", "patience"),
    [
        (None, {}, 3),
        (None, {"max_steps": 10}, 0),
        (None, {"limit_val_batches": 0}, 0),
        (0, {}, 0),
        (5, {"max_steps": 10}, 5),
    ],
)
def test_a_training_without_a_limit_stops_early(early_stopping, options, patience):
    assert default_patience(early_stopping, options) == patience
