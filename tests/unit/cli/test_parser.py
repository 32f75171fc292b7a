"""Values on the command line have the same meaning as in a file."""

import pytest
from lightning.pytorch.callbacks import Callback, Timer

import lightning_softprompt.data.classification
import lightning_softprompt.methods.input_prompts.prompt_tuning
import lightning_softprompt.rag.qa_datamodule  # noqa: F401
from lightning_softprompt.cli.app import main
from lightning_softprompt.cli.parsing.parser import Parser
from lightning_softprompt.data.datamodule import SoftPromptDataModule
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.retrieval.search.settings import IndexSettings


def test_null_in_a_nested_option_is_none_and_not_a_text():
    parser = Parser(exit_on_error=False)
    parser.add_subclass_arguments(SoftPromptDataModule, "data")
    index = ["--data.index_settings.encoder", "null", "--data.index_settings.language", "none"]
    position = ["--data.passages.gold_position", "1", "--data.passages.gold_position", "null"]
    options = parser.parse_args(["--data", "RagQaDataModule", *index, *position]).data.init_args
    settings = options.index_settings
    assert (settings.encoder, settings.language, options.passages.gold_position) == (None, "none", None)
    assert IndexSettings(**settings.as_dict()).encoder is None


def test_a_text_that_yaml_reads_as_a_mapping_is_a_text_for_options_of_type_str():
    parser = Parser(exit_on_error=False)
    parser.add_subclass_arguments(SoftPromptDataModule, "data")
    parser.add_subclass_arguments(SoftPromptModule, "model")
    template = ["--data.template", "Review: {text}", "--data.labels", "{bad: awful, good: great}"]
    text = ["--model.init", "FromText", "--model.init.text", "Classify the review: good or bad"]
    parsed = parser.parse_args(["--data", "ClassificationDataModule", *template, "--model", "PromptTuning", *text])
    data = parsed.data.init_args
    assert (data.template, data.labels) == ("Review: {text}", {"bad": "awful", "good": "great"})
    assert parsed.model.init_args.init.init_args.text == "Classify the review: good or bad"


def test_a_tilde_in_a_mapping_on_the_command_line_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = Parser(exit_on_error=False)
    parser.add_subclass_arguments(SoftPromptDataModule, "data")
    parsed = parser.parse_args(["--data", "{class_path: RagQaDataModule, init_args: {corpus: ~/docs}}"])
    assert parsed.data.init_args.corpus == f"{tmp_path}/docs"


def test_a_class_with_a_member_of_an_enumeration_as_default_is_an_option():
    parser = Parser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[Callback] | Callback | None)
    parsed = parser.parse_args(["--callbacks", "Timer", "--callbacks.duration", "00:01:00:00"])
    (callback,) = parser.instantiate_classes(parsed).callbacks
    assert isinstance(callback, Timer)
    assert "interval: step" in parser.dump(parsed)


def test_the_help_of_a_run_command_begins_with_one_line_of_usage(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: softprompt fit [OPTIONS]\n\n")
    assert "--trainer.max_steps MAX_STEPS" in text


def test_the_help_of_a_class_names_the_command_and_no_option_that_a_link_sets(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--model.help", "PromptTuning"])
    text = capsys.readouterr().out
    assert text.startswith("usage: softprompt fit [--model.length")
    for option in ("backbone", "classes", "classes_by_task", "evaluation", "data"):
        assert f"--model.{option}" not in text
    with pytest.raises(SystemExit):
        main(["fit", "--data.help", "ClassificationDataModule"])
    assert "--data.backbone" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["fit", "--model", "PromptTuning", "--model.lenth=3"])
    assert "classes_by_task" not in capsys.readouterr().err
