"""Files of synthetic rows: their columns and origins, and their continuation after an interruption."""

import json

import pytest
import torch
from row_files import read_rows, write_rows

import lightning_softprompt as sp
from lightning_softprompt.__main__ import main
from lightning_softprompt.backbones.generation.decoding import Decoding
from lightning_softprompt.synthetic.generator import Generator
from lightning_softprompt.synthetic.writers.base import Source
from lightning_softprompt.synthetic.writers.keyword_text import KeywordText
from lightning_softprompt.synthetic.writers.label_text import LabelText
from lightning_softprompt.synthetic.writers.question_answer import QuestionAnswer
from lightning_softprompt.synthetic.writers.self_instruct import SelfInstruct
from lightning_softprompt.synthetic.writing import WritingPlan
from lightning_softprompt.synthetic.writing import write_rows as write_synthetic_rows

FRAME = "{instruction} it was {target}"
SAMPLING = Decoding(max_new_tokens=4, do_sample=True)
LABELS = LabelText({"negative": "bad", "positive": "good"}, "a {label} film about {topic}", ["dog", "wonder"])
DOCUMENTS = Source(
    [{"document": "a dog is good", "text": "wonderful funny story", "instruction": f"this is one {word}"}
     for word in ("dog", "film", "story")],
    ["d:1", "d:2", "d:3"],
)  # fmt: skip


@pytest.fixture(scope="module")
def generator(tiny_folder):
    return Generator(sp.BackboneSpec(name=str(tiny_folder("llama"))), SAMPLING, frame=FRAME, max_tokens=40)


def write(plan, generator, path):
    write_synthetic_rows(plan, generator, path)
    return read_rows(path)


def test_rows_have_their_class_text_and_origin(generator, tmp_path):
    rows = write(WritingPlan(LABELS, 6, seed=3, batch_size=4), generator, tmp_path / "rows.jsonl")
    assert [row["row"] for row in rows] == list(range(6))
    assert [row["label"] for row in rows] == ["negative", "positive"] * 3
    assert {row["topic"] for row in rows} == {"dog", "wonder"}
    for row in rows:
        origin = row["origin"]
        assert origin["columns"]["topic"] == row["topic"]
        assert origin["prompt"] == "a {label} film about {topic} it was {target}"
        assert (origin["seed"], origin["writer"], origin["source"]) == (3, "LabelText", None)
        assert origin["decoding"]["do_sample"] is True
        assert 0 <= row["num_tokens"] <= 4
        assert row["is_finished"] == (row["num_tokens"] < 4)
        assert (row["logprob"] is None) == (row["text"] == "")
    assert len({row["text"] for row in rows}) > 1
    other = write(WritingPlan(LABELS, 6, seed=4, batch_size=4), generator, tmp_path / "other.jsonl")
    assert [row["text"] for row in other] != [row["text"] for row in rows]


def test_the_log_probability_is_that_of_the_text_after_the_instruction(generator, tmp_path):
    (row,) = write(WritingPlan(LABELS, 1, seed=1), generator, tmp_path / "rows.jsonl")
    backbone = generator.bare.loaded
    prefix = backbone.codec.ids(f"a bad film about {row['topic']} it was")
    text = backbone.codec.ids(f" {row['text']}")
    logits = backbone.model(torch.tensor([[1, *prefix, *text]])).logits[0].log_softmax(-1)
    first = len(prefix)
    expected = sum(float(logits[first + place, token]) for place, token in enumerate(text)) / len(text)
    assert row["logprob"] == pytest.approx(expected, abs=1e-3)


WRITERS = {
    "labels": (LABELS, Source()),
    "keywords": (KeywordText(count=2, instruction="{keywords}", summary=True, summary_instruction="{text}"), DOCUMENTS),
    "questions": (QuestionAnswer("document", "{document}", "{question}", "{question} ?"), DOCUMENTS),
    "instructions": (SelfInstruct(human=2, machine=1, seeds=3, request_text="long :"), DOCUMENTS),
}


@pytest.mark.parametrize("name", WRITERS)
def test_an_interrupted_file_is_continued_with_the_same_rows(name, generator, tmp_path):
    writer, source = WRITERS[name]
    plan = WritingPlan(writer, 7, batch_size=3, source=source)
    expected = tmp_path / "expected.jsonl"
    write(plan, generator, expected)

    class Killed(BaseException):
        pass

    def interrupt(complete):
        if complete == 3:
            raise Killed

    path = tmp_path / "rows.jsonl"
    with pytest.raises(Killed):
        write_synthetic_rows(plan, generator, path, interrupt)
    assert not path.exists()
    part = tmp_path / "rows.jsonl.part"
    lines = part.read_text().splitlines(keepends=True)
    assert len(lines) == 3
    part.write_text("".join(lines[:2]) + lines[2][:9])  # the kill may also come while a line is written
    calls = []
    assert write_synthetic_rows(plan, generator, path, calls.append) == 2
    assert calls == [2, 3, 6, 7]
    assert path.read_bytes() == expected.read_bytes()
    assert not part.exists()


def test_a_file_of_other_settings_is_not_continued(generator, tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    write(WritingPlan(LABELS, 2, seed=0), generator, path)
    path.rename(tmp_path / "rows.jsonl.part")
    identity = WritingPlan(LABELS, 2, seed=0).identity(generator)
    (tmp_path / "rows.jsonl.part.json").write_text(json.dumps(identity))
    assert write_synthetic_rows(WritingPlan(LABELS, 2, seed=1), generator, path) == 0
    assert "seed was 0 and is 1" in caplog.text


def test_keywords_questions_and_instructions_are_scored(generator, tmp_path):
    for name in ("keywords", "questions", "instructions"):
        writer, source = WRITERS[name]
        rows = write(WritingPlan(writer, 4, batch_size=2, source=source), generator, tmp_path / f"{name}.jsonl")
        assert [row["origin"]["source"] is not None for row in rows] == [True] * 4
        for row in rows:
            if name == "keywords":
                found = [word in row["text"].split() for word in row["keywords"]]
                assert row["scores"] == {"keywords": sum(found) / 2}
                assert set(row["keywords"]) <= {"wonderful", "funny", "story"}
                assert "summary" in row
            elif name == "questions":
                assert row["scores"]["in_document"] == float(bool(row["answer"]) and row["answer"] in row["document"])
                assert 0 <= row["scores"]["round_trip_f1"] <= 1
            else:
                assert set(row) >= {"instruction", "output"}
                assert 0 <= row["scores"]["similarity"] <= 1


def test_a_trained_prompt_writes(tiny_folder, tmp_path):
    rows = [{"label": label, "text": text} for label, text in (("good", "a funny film"), ("bad", "a dull film"))]
    data = sp.SummarizationDataModule(
        backbone=sp.BackboneSpec(name=str(tiny_folder("llama"))), train=rows, template="{soft}{label} text : {target}",
        document="label", target="text", max_tokens=24, max_target_tokens=8, cache=False,
    )  # fmt: skip
    method = sp.PromptTuning(length=3, data=data)
    method.configure_model()
    prompt = sp.save_prompt(method, tmp_path / "prompt.safetensors")
    out = tmp_path / "rows.jsonl"
    command = ["write", str(out), "--writer=PromptText", "--writer.values={label: [good, bad]}", "--count=4"]
    options = [f"--prompt={prompt}", "--decoding.max_new_tokens=4", "--decoding.do_sample=false", "--decoding.top_p=1"]
    assert main([*command, *options]) == 0
    written = read_rows(out)
    assert [row["label"] for row in written] == ["good", "bad"] * 2
    expected = sp.load_prompt(prompt).generate([{"label": "good"}, {"label": "bad"}], max_new_tokens=4)
    assert [row["text"] for row in written] == expected * 2
    assert written[0]["origin"]["prompt"].startswith(f"{prompt} (")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--writer=LabelTexts"], "LabelTexts"),
        (["--writer=LabelText"], "labels"),
        (["--writer=LabelText", "--writer.labels={a: b}"], "at least two classes"),
        (["--writer=QuestionAnswer"], "requires source rows"),
        (["--writer=PromptText", "--writer.values={label: [good]}"], "requires a trained prompt"),
        (["--writer=LabelText", "--writer.labels={a: b, c: d}", "--count=0"], "at least 1"),
        (["--writer=LabelText", "--writer.labels={a: b, c: d}", "--frame=x"], "the frame must contain"),
        (["--writer=LabelText", "--writer.labels={a: b, c: d}", "--writer.instruction={topic}"], "topics are given"),
    ],
)
def test_mistakes_are_reported_without_a_traceback(options, message, tmp_path, tiny_folder, capsys):
    backbone = f"--backbone.name={tiny_folder('llama')}"
    assert main(["write", str(tmp_path / "rows.jsonl"), backbone, *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_writer_explains_its_options(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["write", "--writer.help", "LabelText"])
    assert stop.value.code == 0
    assert "the instruction inserts as" in capsys.readouterr().out


def test_source_rows_are_read_from_a_file(tmp_path, tiny_folder):
    source = write_rows(tmp_path / "documents.jsonl", [{"document": "a dog is good"}, {"document": "a funny film"}])
    out = tmp_path / "rows.jsonl"
    options = ["--source", str(source), "--count=2", "--backbone.name", str(tiny_folder("llama"))]
    options += ["--frame={instruction}{target}", "--decoding.max_new_tokens", "3", "--max_tokens=40"]
    assert main(["write", "--writer=QuestionAnswer", *options, str(out)]) == 0
    assert [row["origin"]["source"] for row in read_rows(out)] == [f"{source}:1", f"{source}:2"]
