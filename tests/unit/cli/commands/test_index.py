"""`softprompt index`: build, search, info."""

import json
import shlex

import pytest

from lightning_softprompt.__main__ import main
from lightning_softprompt.cli.commands import index
from lightning_softprompt.system.errors import CommandError

ROWS = [
    {"id": "film", "title": "Films", "text": "a warm and funny film"},
    {"id": "dog", "title": "Dogs", "text": "the dog is sad . it never ends"},
]


@pytest.fixture
def corpus(tmp_path):
    return write_rows(tmp_path / "corpus.jsonl", ROWS)


def write_rows(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def run(capsys, *words):
    assert index.main(list(words)) == 0
    return capsys.readouterr().out


def test_build_search_and_info(tmp_path, corpus, tiny_folder, capsys):
    folder = str(tmp_path / "index")
    built = run(capsys, "build", corpus, "--index", folder, "--encoder", str(tiny_folder("bert")))
    assert built == f"{folder}: 2 documents, 2 passages (0 duplicates removed), vectors of width 32\n"
    assert index.main(["build", corpus, "--index", folder, "--encoder", str(tiny_folder("bert"))]) == 0
    suggested = capsys.readouterr().err.splitlines()[-1]
    assert suggested == f"Next: softprompt index search {folder} 'your question'"
    assert main(shlex.split(suggested)[2:]) == 0
    assert capsys.readouterr().out.startswith("1. ")
    assert run(capsys, "search", folder, "funny film", "-k", "1").startswith("1. Films  (score ")
    output = run(capsys, "search", folder, "sad dogs", "--mode", "lexical", "--json")
    assert json.loads(output)["text"] == ROWS[1]["text"]
    assert run(capsys, "search", folder, "zebra", "--mode", "lexical") == "no passages found\n"
    output = run(capsys, "info", folder, "--check")
    assert "all checksums match" in output
    assert "language             english" in output
    assert json.loads(run(capsys, "info", folder, "--json"))["settings"]["size"] == 200


def test_documents_are_added_and_removed(tmp_path, corpus, capsys):
    folder = str(tmp_path / "index")
    run(capsys, "build", corpus, "--index", folder, "--encoder", "none")
    more = write_rows(tmp_path / "more.jsonl", [{"id": "new", "text": "a wonderful story"}])
    assert "3 documents" in run(capsys, "build", more, "--index", folder, "--add")
    assert run(capsys, "search", folder, "wonderful").startswith("1. new  (score")
    assert "2 documents" in run(capsys, "build", "--index", folder, "--remove", "new")
    assert "1 documents" in run(capsys, "build", more, "--index", folder, "--encoder", "none")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["build", "--index", "{}"], "pass a corpus to build from"),
        (["build", "{corpus}", "--index", "{}", "--remove", "a"], "--remove with a corpus requires --add"),
        (["build", "{corpus}", "--index", "{}", "--add", "--size", "7"], "omit --size"),
        (["build", "{corpus}", "--index", "{}", "--add"], "has no manifest.json|there is no index"),
        (["build", "{corpus}.gone", "--index", "{}"], "does not exist"),
        (["build", "{corpus}", "--index", "{}", "--text-column", "body"], r"corpus\.jsonl:1: no text in column 'body'"),
        (["build", "{corpus}", "--index", "{}", "--overlap", "300"], "overlap must be at least 0 and below size"),
        (["build", "{corpus}", "--index", "{}", "--encoder", "{corpus}"], "encoder .* cannot be loaded"),
        (["search", "{}", "a dog"], "there is no index"),
        (["info", "{}"], "there is no index"),
    ],
)
def test_a_failed_build_creates_no_folder(tmp_path, corpus, words, message):
    folder = tmp_path / "index"
    with pytest.raises(CommandError, match=message):
        index.main([word.replace("{corpus}", corpus).replace("{}", str(folder)) for word in words])
    assert not folder.exists()


def test_the_launcher_shows_errors_without_a_traceback(tmp_path, capsys):
    assert main(["index", "info", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("softprompt index: error: there is no index")
