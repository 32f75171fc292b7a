import logging

import pytest

from lightning_softprompt import renamed_options
from lightning_softprompt.renamed_options import rename_keys, rename_settings, rename_words


@pytest.fixture(autouse=True)
def names(monkeypatch):
    table = {"backbone.compute": "backbone.linear_backend", "data.cut": "data.side", "data.found": "data.search.count"}
    monkeypatch.setattr(renamed_options, "RENAMED", table)
    renamed_options._warn.cache_clear()


def test_words_of_a_command_line_are_renamed_and_each_option_is_announced_once(caplog):
    caplog.set_level(logging.WARNING)
    words = ["fit", "--data.cut=end", "--data.init_args.cut", "start", "--data.tasks.rte.found", "3", "cut", "--cut"]
    expected = ["fit", "--data.side=end", "--data.side", "start", "--data.tasks.rte.search.count", "3", "cut", "--cut"]
    assert rename_words(words) == expected
    assert rename_words(words) == expected
    assert len(caplog.messages) == 2
    assert "data.cut is now data.side" in caplog.text


@pytest.mark.parametrize("outer", [lambda data: {"data": data}, lambda data: data])
def test_keys_of_a_config_are_renamed_in_data_modules_and_in_tasks(outer):
    module = "lightning_softprompt.data.multitask.MultitaskDataModule"
    task = "lightning_softprompt.data.tagging.TaggingDataModule"
    old = {"cut": "end", "found": 3, "search": {"k": 1}, "seed": 0}
    new = {"side": "end", "search": {"k": 1, "count": 3}, "seed": 0}
    tasks = {"a": {"class_path": task, "init_args": old}}
    data = {"class_path": module, "init_args": {"tasks": tasks, "other": {"cut": 1}}}
    renamed = {"class_path": module, "init_args": {
        "tasks": {"a": {"class_path": task, "init_args": new}}, "other": {"cut": 1},
    }}  # fmt: skip
    assert rename_keys(outer(data)) == outer(renamed)


def test_keys_of_other_options_and_values_that_are_no_mapping_are_unchanged():
    config = {"model": {"class_path": "X", "init_args": {"cut": 1, "compute": 2}}, "backbone": {"name": "compute"}}
    assert rename_keys(config) == config
    assert rename_keys("compute") == "compute"
    assert rename_keys({"backbone": "file.yaml"}) == {"backbone": "file.yaml"}


def test_stored_settings_are_renamed():
    stored = {"backbone.compute": "auto", "data.tasks.a.cut": "end", "data.seed": 0}
    assert rename_settings(stored) == {"backbone.linear_backend": "auto", "data.tasks.a.side": "end", "data.seed": 0}
