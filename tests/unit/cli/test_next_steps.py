"""The suggested next command."""

import shlex
from pathlib import Path

import pytest

from lightning_softprompt.cli.next_steps import QUIET_VARIABLE, command_line, suggest
from lightning_softprompt.system.trust import trust_modules


def test_commands_are_printed_to_standard_error_one_per_line(capsys, monkeypatch):
    monkeypatch.delenv(QUIET_VARIABLE, raising=False)
    suggest("softprompt one", "softprompt two")
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == "Next: softprompt one\n      softprompt two\n"


def test_nothing_is_printed_if_the_variable_is_set_or_there_is_no_command(capsys, monkeypatch):
    suggest()
    monkeypatch.setenv(QUIET_VARIABLE, "1")
    suggest("softprompt one")
    assert capsys.readouterr().err == ""


def test_control_characters_in_a_path_are_escaped(capsys):
    suggest(command_line("test", "--ckpt_path", "a\x1b[2J"))
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["run", "my run", "it's"])
def test_paths_are_quoted_and_relative_to_the_current_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command_line("index search", tmp_path / name, Path("/elsewhere")))
    assert words == ["softprompt", "index", "search", name, "/elsewhere"]


def test_trusted_modules_are_trusted_again():
    with trust_modules(["my_package.methods"]):
        assert command_line("test").endswith("--trust my_package.methods")
