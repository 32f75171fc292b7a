"""`softprompt quickstart --rag` runs offline, here on a tiny backbone with the packaged encoder."""

import pytest

from lightning_softprompt.__main__ import main

SHORT = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=1"]
SHORT += ["--trainer.limit_test_batches=2", "--trainer.log_every_n_steps=1", "--data.eval_batch_size=3"]
SHORT += ["--model.length=4", "--data.template={passages}{soft}{question} : {target}", "--data.max_tokens=40"]
SHORT += ["--data.max_target_tokens=4"]  # a tiny backbone reads 48 tokens at most


@pytest.mark.slow
def test_it_builds_trains_tests_and_compares(tmp_path, tiny_folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    backbone = f"--backbone.name={tiny_folder('llama')}"
    assert main(["quickstart", "--rag", f"--folder={tmp_path}", backbone, *SHORT]) == 0
    output = capsys.readouterr().out
    assert "34 documents, 34 passages" in output
    for part in ("5/5", "closed book", "RAG, zero-shot", "RAG + soft prompt", "paired bootstrap", "exact_match"):
        assert part in output
    assert (tmp_path / "rag-quickstart-index" / "manifest.json").is_file()


def test_an_error_of_a_step_ends_the_quickstart(tmp_path, tiny_folder, capsys):
    assert main(["quickstart", "--rag", f"--folder={tmp_path}", f"--backbone.name={tmp_path / 'none'}"]) != 0
    assert "2/5" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [[], ["--rag"]])
def test_an_unknown_option_is_refused_before_output_or_files(tmp_path, kind, capfd):
    folder = tmp_path / "runs"
    with pytest.raises(SystemExit) as ended:
        main(["quickstart", *kind, f"--folder={folder}", "--foo"])
    printed = capfd.readouterr()
    assert ended.value.code == 2
    assert "--foo" in printed.err
    assert not printed.out
    assert not folder.exists()
