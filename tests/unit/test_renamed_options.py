import json
import logging

import pytest

from lightning_softprompt import renamed_options
from lightning_softprompt.renamed_options import rename_keys, rename_settings, rename_words
from lightning_softprompt.runs.run_settings import flatten_classes


@pytest.fixture(autouse=True)
def names(monkeypatch):
    table = {"backbone.compute": "backbone.linear_backend", "data.cut": "data.side", "data.few": "data.search.count"}
    monkeypatch.setattr(renamed_options, "RENAMED", {**renamed_options.RENAMED, **table})
    renamed_options._warn.cache_clear()


def test_words_of_a_command_line_are_renamed_and_each_option_is_announced_once(caplog):
    caplog.set_level(logging.WARNING)
    words = ["fit", "--data.cut=end", "--data.init_args.cut", "start", "--data.tasks.rte.few", "3", "cut", "--cut"]
    expected = ["fit", "--data.side=end", "--data.side", "start", "--data.tasks.rte.search.count", "3", "cut", "--cut"]
    assert rename_words(words) == expected
    assert rename_words(words) == expected
    assert len(caplog.messages) == 2
    assert "data.cut is now data.side" in caplog.text


@pytest.mark.parametrize("outer", [lambda data: {"data": data}, lambda data: data])
def test_keys_of_a_config_are_renamed_in_data_modules_and_in_tasks(outer):
    module = "lightning_softprompt.data.multitask.MultitaskDataModule"
    task = "lightning_softprompt.data.tagging.TaggingDataModule"
    old = {"cut": "end", "few": 3, "search": {"k": 1}, "seed": 0}
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


RAG = "lightning_softprompt.rag.qa_datamodule.RagQaDataModule"
OLD_RAG = {
    "passages": 3, "passage": "{text}", "mode": "gold", "order": "shuffled", "gold_at": -1, "noise": {"drop": 0.5},
    "found": 9, "choices": None, "abstain": "none", "target": "any", "cite": True, "long_answers": False,
}  # fmt: skip
NEW_RAG = {
    "passages": {
        "count": 3, "template": "{text}", "mode": "gold", "order": "shuffled", "gold_position": -1,
        "noise": {"drop": 0.5},
    },
    "num_retrieved": 9,
    "answer_form": {"choices": None, "abstain": "none", "training_target": "any", "cite": True, "long": False},
}  # fmt: skip


def test_options_of_rag_data_modules_move_into_groups_once():
    assert rename_keys({"class_path": RAG, "init_args": OLD_RAG}) == {"class_path": RAG, "init_args": NEW_RAG}
    assert rename_keys({"data": {"class_path": RAG, "init_args": NEW_RAG}})["data"]["init_args"] == NEW_RAG
    mixed = {"passages": {"count": 2}, "mode": "gold"}
    assert rename_keys({"class_path": RAG, "init_args": mixed})["init_args"] == {
        "passages": {"count": 2, "mode": "gold"}
    }


@pytest.mark.parametrize("name", ["SummarizationDataModule", "other.OrderedDataModule"])
def test_options_of_other_data_modules_keep_their_names(name, tmp_path):
    options = {"target": "any", "order": "id", "passages": 3, "noise": {"drop": 1}}
    config = {"class_path": name, "init_args": options}
    assert rename_keys(config) == config
    stored = {"data.class_path": name, **{f"data.{option}": value for option, value in options.items()}}
    assert rename_settings(stored) == stored
    (tmp_path / "data.yaml").write_text(json.dumps(config))
    (tmp_path / "run.yaml").write_text(json.dumps({"data": config}))
    words = ["--data.order=id", "--data.target", "any", "--data.noise.drop", "1"]
    for source in ("--data=" + name, f"--data={tmp_path}/data.yaml", f"--config={tmp_path}/run.yaml"):
        assert rename_words(["fit", source, *words]) == ["fit", source, *words]


def test_words_of_groups_and_of_values_that_have_another_use():
    words = ["--data=RagQaDataModule", "--data.passages", "3", "--data.noise.drop=0.5", "--data.retriever.way", "dense"]
    assert rename_words(words) == [
        "--data=RagQaDataModule", "--data.passages.count", "3", "--data.passages.noise.drop=0.5",
        "--data.retriever.mode", "dense",
    ]  # fmt: skip
    unchanged = ["--data.passages={count: 3}", "--data.passages.count=3", "--data.target=summary", "--data.passages"]
    assert rename_words([*unchanged, "{mode: gold}"]) == [*unchanged, "{mode: gold}"]


def test_an_option_of_a_retriever_is_renamed_wherever_the_retriever_is():
    old, new = ({"class_path": "Retriever", "init_args": {"index": "x", name: "dense"}} for name in ("way", "mode"))
    assert rename_keys(old) == new
    assert rename_keys({"class_path": RAG, "init_args": {"retriever": old}})["init_args"] == {"retriever": new}
    assert rename_keys({"data": {"init_args": {"retriever": {"way": "dense"}}}}) == {
        "data": {"init_args": {"retriever": {"mode": "dense"}}}
    }


def test_stored_settings_of_rag_data_modules_equal_those_of_the_groups():
    stored = {"data.class_path": RAG, **{f"data.{name}": value for name, value in OLD_RAG.items()}}
    assert rename_settings({**stored, "data.retriever.way": "dense"}) == flatten_classes(
        {"class_path": RAG, "init_args": {**NEW_RAG, "retriever": {"mode": "dense"}}}, "data"
    )
