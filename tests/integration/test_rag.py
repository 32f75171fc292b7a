"""Questions with passages, from a corpus to an answer: the command line on a tiny backbone and a small corpus."""

import json
import logging
import subprocess
import sys
from textwrap import dedent

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from row_files import read_rows, write_rows, write_splits
from runs import load_state, read_losses, read_metrics
from safetensors.torch import load_file
from wandb_file import read_run as read_wandb_run

from lightning_softprompt import renamed_options
from lightning_softprompt.backbones.execution import context_cache, paths
from lightning_softprompt.cli.app import main
from lightning_softprompt.cli.commands.analysis.analyze import read_run
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.template import Template
from lightning_softprompt.methods import Spring
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.rag.passage_selection import PassageSettings
from lightning_softprompt.rag.prompt_reranker import PromptReranker
from lightning_softprompt.rag.qa_datamodule import RagQaDataModule
from lightning_softprompt.retrieval.retriever import Retriever
from lightning_softprompt.retrieval.search.settings import IndexSettings
from lightning_softprompt.runs.run_spec import last_folder

PER_CLASS = ("precision", "recall", "f1", "predicted")
CORPUS = {
    "dog": "the dog is sad . it never ends",
    "story": "a story about a dog and a film",
    "film": "a warm and funny film",
    "well": "all is well that ends well",
    "text": "one text",
}
QUESTIONS = [
    {"question": "is the dog sad", "answers": ["sad", "very sad"], "positive_ids": ["dog"]},
    {"question": "what film ?", "answers": ["warm", "funny"], "positive_ids": ["film"]},
    {"question": "what ends well ?", "answers": ["all"], "positive_ids": ["well"]},
    {"question": "is it a story about one dog ?", "answers": ["story"], "positive_ids": ["story"]},
    {"question": "what text ?", "answers": ["one text"], "positive_ids": ["text"]},
]


def write_questions(folder, rows):
    return write_splits(folder, train=rows, validation=rows, test=rows)


@pytest.fixture
def folder(tmp_path):
    folder = write_questions(tmp_path / "data", QUESTIONS)
    write_rows(folder / "corpus.jsonl", [{"id": name, "text": text} for name, text in CORPUS.items()])
    write_rows(folder / "questions.jsonl", [{"question": row["question"]} for row in QUESTIONS])
    return folder


@pytest.fixture
def options(folder, tmp_path, tiny_folder):
    return [
        f"--backbone.name={tiny_folder('llama')}",
        "--data=RagQaDataModule",
        f"--data.path={folder}",
        f"--data.corpus={folder}",
        "--data.index_settings={encoder: null}",
        "--data.retriever=Retriever",
        f"--data.retriever.index={tmp_path / 'index'}",
        "--data.retriever.mode=lexical",
        "--data.template={passages}{soft}{question} : {target}",
        "--data.passages.template={text} ,",
        "--data.passages.count=2",
        "--data.max_tokens=36",
        "--data.max_target_tokens=4",
        "--data.batch_size=2",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        f"--run.folder={tmp_path / 'runs'}",
    ]


@pytest.fixture
def fit(options):
    def fit(*more):
        limits = ["--trainer.max_steps=6", "--trainer.max_epochs=-1", "--trainer.log_every_n_steps=1"]
        assert main(["fit", "--model=Spring", "--model.length=4", *limits, *options, *more]) == 0
        return last_folder()

    return fit


def read_lines(name):
    return read_rows(last_folder() / name)


def test_one_command_builds_the_index_and_trains_another_tests_and_a_third_predicts(fit, folder, tmp_path):
    run = fit("--data.passages.noise.drop=0.2", "--data.passages.order=shuffled")
    assert (tmp_path / "index" / "manifest.json").is_file()
    assert "val/f1" in read_metrics(run)["val"]
    best = run / "checkpoints" / "best.ckpt"
    assert main(["test", f"--ckpt_path={best}"]) == 0
    metrics = read_metrics(last_folder())["test"]
    assert metrics["test/hit@1"] == 1.0
    assert metrics["test/generated"] == len(QUESTIONS)
    rows = read_lines("test_predictions.jsonl")
    assert rows[0]["input"].startswith(CORPUS["dog"])
    assert rows[0]["target"] == "sad"
    assert main(["predict", f"--ckpt_path={best}", f"--data.predict={folder / 'questions.jsonl'}"]) == 0
    assert [row["input"] for row in read_lines("predictions.jsonl")] == [row["input"] for row in rows]


def test_soft_tokens_at_each_passage_are_trained_and_missing_slots_are_reported(fit, capsys):
    run = fit("--model=PromptTuning", "--model.length=[1, 2, 3]", "--data.passages.template={soft}{text} ,")
    assert load_file(run / "prompt.safetensors")["tokens"].shape[0] == 6
    assert "val/f1" in read_metrics(run)["val"]
    with pytest.raises(AssertionError):
        fit("--model=PromptTuning", "--model.length=[1, 2, 3]")
    assert "3 soft blocks require as many slots, but the template has 1 {soft}" in capsys.readouterr().err


def test_a_trained_prompt_is_tested_with_fewer_soft_tokens(fit, options):
    prompt = f"--init_from={fit() / 'prompt.safetensors'}"
    method = ["--model=Spring", "--model.length=4"]
    scores = []
    for use in (1, 4):
        assert main(["test", *options, *method, f"--model.use={use}", prompt]) == 0
        scores.append(read_metrics(last_folder())["test"]["test/loss"])
    assert scores[0] != scores[1]


def test_a_resumed_run_draws_the_same_passages_and_lengths(fit):
    random = [
        "--data.passages.noise={distractors: 0.5, no_gold: 0.3, drop: 0.2}",
        "--data.passages.order=shuffled",
        "--data.answer_form.training_target=any",
    ]
    uninterrupted, half = fit(*random), fit(*random, "--trainer.max_steps=4")
    resumed = fit(*random, f"--ckpt_path={half / 'checkpoints' / 'last.ckpt'}")
    assert len(read_losses(uninterrupted)) == 6
    assert read_losses(uninterrupted) == read_losses(half) + read_losses(resumed)
    assert torch.equal(load_state(uninterrupted)["tokens"], load_state(resumed)["tokens"])


def test_old_option_names_mean_the_same_with_one_notice_each(fit, tmp_path, caplog):
    noise = {"distractors": 0.5, "drop": 0.2}
    new = fit(
        f"--data.passages.noise={noise}", "--data.passages.order=shuffled", "--data.passages.gold_position=-1",
        "--data.num_retrieved=4", "--data.answer_form.training_target=any", "--data.answer_form.long=true",
    )  # fmt: skip
    settings = {"noise": noise, "order": "shuffled", "gold_at": -1, "found": 4}
    (tmp_path / "old.yaml").write_text(json.dumps({"data": {"class_path": "RagQaDataModule", "init_args": settings}}))
    arguments = [
        "--data.target",
        "any",
        "--data.long_answers=true",
        "--data.passages",
        "2",
        "--data.retriever.way=lexical",
    ]
    caplog.set_level(logging.WARNING)
    renamed_options._warn.cache_clear()
    old = fit(f"--config={tmp_path / 'old.yaml'}", "--data.passage={text} ,", *arguments)
    notices = [message.split()[1] for message in caplog.messages if message.startswith("option ")]
    names = ["noise", "order", "gold_at", "found", "target", "long_answers", "passages", "retriever.way", "passage"]
    assert sorted(notices) == sorted(f"data.{name}" for name in names)
    assert read_losses(old) == read_losses(new)
    parsed = [yaml.safe_load((run / "config.yaml").read_text())["data"] for run in (old, new)]
    assert parsed[0] == parsed[1]


KILLED_PROGRAM = """
    import os, sys, torch
    from lightning_softprompt.__main__ import main
    from lightning_softprompt.methods.base import SoftPromptModule

    def step_or_kill(module, batch, batch_idx):
        calls.append(batch_idx)
        return os.kill(os.getpid(), 9) if len(calls) == last else step(module, batch, batch_idx)

    torch.set_num_threads(1)
    calls, last, step = [], int(sys.argv[2]), getattr(SoftPromptModule, sys.argv[1])
    setattr(SoftPromptModule, sys.argv[1], step_or_kill)
    main(sys.argv[3:])
"""


def run_and_kill(step, number, *command):
    """Runs a command in a process that SIGKILL ends in a call of a step; `number` counts calls from 1."""
    words = [sys.executable, "-c", dedent(KILLED_PROGRAM), step, str(number), *command]
    result = subprocess.run(words, check=False, capture_output=True, text=True)
    assert result.returncode == -9, result.stderr


def test_a_killed_training_resumes_with_the_same_passages(fit, options, tmp_path):
    more = ["--data.passages.noise={distractors: 0.5, drop: 0.2}", "--data.passages.order=shuffled",
            "--trainer.val_check_interval=2", "--trainer.check_val_every_n_epoch=null", "--ckpt_path=last"]  # fmt: skip
    uninterrupted = fit(*more, f"--run.folder={tmp_path / 'uninterrupted'}")
    limits = ["--trainer.max_steps=6", "--trainer.max_epochs=-1", "--trainer.log_every_n_steps=1"]
    run_and_kill("training_step", 6, "fit", "--model=Spring", "--model.length=4", *limits, *options, *more)
    (run,) = (tmp_path / "runs" / "default").iterdir()
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4
    assert fit(*more) == run
    assert torch.equal(load_state(uninterrupted)["tokens"], load_state(run)["tokens"])


def test_answers_that_were_written_before_a_kill_are_not_generated_again(options, folder, tmp_path, monkeypatch):
    questions = f"--data.predict={folder / 'questions.jsonl'}"
    command = ["predict", *options, "--model=Spring", "--model.length=4", questions]
    uninterrupted, output = tmp_path / "uninterrupted.jsonl", f"--run.predictions={tmp_path / 'out.jsonl'}"
    assert main([*command, f"--run.predictions={uninterrupted}"]) == 0
    run_and_kill("predict_step", 3, *command, output)
    rows, step = [], SoftPromptModule.predict_step

    def record(module, batch, batch_idx):
        rows.extend(batch.row_ids)
        return step(module, batch, batch_idx)

    monkeypatch.setattr(SoftPromptModule, "predict_step", record)
    assert main([*command, output]) == 0
    assert rows == [4]
    assert (tmp_path / "out.jsonl").read_bytes() == uninterrupted.read_bytes()


def read_sections(wandb_run):
    """Return the names of the logged metrics by their section on W&B."""
    sections = {}
    for name in {name for row in wandb_run.history for name in row if "/" in name}:
        section, _, metric = name.partition("/")
        sections.setdefault(section, set()).add(metric)
    return sections


def test_metrics_of_retrieval_have_a_section_of_their_own_on_wandb(fit, folder, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = fit("--run.wandb=offline")
    assert main(["test", f"--ckpt_path={run / 'checkpoints' / 'best.ckpt'}"]) == 0
    tested = last_folder()
    of_training, of_test = read_sections(read_wandb_run(run)), read_sections(read_wandb_run(tested))
    assert {"precision", "recall", "f1", "loss"} <= of_training["val"] & of_test["test"]  # of the words of answers
    assert {"precision@1", "recall@1", "hit@1", "ndcg@1", "mrr"} <= of_training["val_retrieval"]
    intervals = {f"precision@1{end}" for end in ("", "_low", "_high")}
    assert intervals <= of_test["test_retrieval"]
    for name in of_training["val"] | of_test["test"]:
        assert "@" not in name
        assert "mrr" not in name
    metrics = read_metrics(tested)["test"]
    (row,) = read_wandb_run(tested).rows("test_retrieval/precision@1")
    assert row["test_retrieval/precision@1"] == metrics["test/precision@1"]  # files have one section per stage
    # choices have metrics of classes, too
    write_questions(folder, [{**row, "answers": ("yes", "no")[n % 2]} for n, row in enumerate(QUESTIONS)])
    choices = fit('--data.answer_form.choices={"yes": "good", "no": "bad"}', "--run.wandb=offline")
    sections = read_sections(read_wandb_run(choices))
    assert "precision@1" in sections["val_retrieval"]
    assert sections["val_by_class"] == {f"{name}/{c}" for name in PER_CLASS for c in ("yes", "no")}
    assert sections["val"] == {"accuracy", "macro_f1", "mcc", "loss", "predictions"}


@pytest.mark.parametrize("readout", ["LabelWords", "RankedChoices"])
def test_choices_are_scored(fit, folder, readout):
    questions = [{**row, "answers": ("yes", "no")[n % 2]} for n, row in enumerate(QUESTIONS)]
    write_questions(folder, questions)
    run = fit('--data.answer_form.choices={"yes": "good", "no": "bad"}', f"--model.readout={readout}")
    metrics = read_metrics(run)["val"]
    assert 0 <= metrics["val/accuracy"] <= 1
    assert metrics["val/predicted/yes"] + metrics["val/predicted/no"] == pytest.approx(1)
    assert metrics["val/hit@1"] == 1.0
    assert main(["test", f"--ckpt_path={run / 'checkpoints' / 'best.ckpt'}"]) == 0
    tested = read_metrics(last_folder())["test"]
    assert tested["test/mrr_low"] <= tested["test/mrr"] == metrics["val/mrr"]
    rows = read_lines("test_predictions.jsonl")
    assert [row["references"] for row in rows] == [[row["answers"]] for row in questions]
    kinds = [row.kind for row in read_run(last_folder())]
    assert kinds == ["correct" if row["prediction"] == row["target"] else "wrong choice" for row in rows]


def test_the_answer_to_a_question_without_an_answer_is_to_abstain(fit, folder):
    write_questions(folder, [*QUESTIONS, {"question": "what bad dog ?", "answers": []}])
    run = fit("--data.answer_form.abstain=it is dull")
    assert "val/abstain_recall" in read_metrics(run)["val"]


def test_an_index_of_another_corpus_is_refused(fit, options, folder, capsys):
    fit()
    write_rows(folder / "corpus.jsonl", [{"id": "cat", "text": "a cat"}])
    assert main(["fit", "--model=Spring", "--model.length=4", *options]) == 2
    assert "it lacks the document 'cat'. Remove the folder to rebuild the index" in capsys.readouterr().err


def test_a_missing_index_is_reported(options, capsys):
    assert main(["fit", "--model=Spring", "--model.length=4", *options, "--data.corpus=null"]) == 2
    assert "there is no index" in capsys.readouterr().err


class CallCounter(Callback):
    """Records the number of calls at the end of each epoch."""

    def __init__(self, calls):
        self.calls, self.by_epoch = calls, []

    def on_train_epoch_end(self, trainer, pl_module):
        self.by_epoch.append(len(self.calls))


@pytest.mark.parametrize(("order", "is_recomputed"), [("score", False), ("shuffled", True)])
def test_passages_before_the_soft_tokens_run_through_the_backbone_in_the_first_epoch_only(
    folder, tmp_path, tiny_folder, monkeypatch, order, is_recomputed
):
    """Passages in a shuffled order are another text and are encoded again."""
    calls, compute = [], context_cache.keys_and_values

    def count(*args):
        calls.append(1)
        return compute(*args)

    monkeypatch.setattr(context_cache, "MIN_FROZEN_TOKENS", 1)
    monkeypatch.setattr(paths, "keys_and_values", count)
    data = RagQaDataModule(
        template="{passages}{soft}{question} : {target}",
        passages=PassageSettings(template="{text} ,", count=2, order=order),
        retriever=Retriever(str(tmp_path / "index"), "lexical"), corpus=str(folder), path=str(folder),
        index_settings=IndexSettings(encoder=None),
        backbone=BackboneSpec(name=str(tiny_folder("llama"))), max_tokens=36, max_target_tokens=4, batch_size=2,
    )  # fmt: skip
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    counter = CallCounter(calls)
    trainer = Trainer(
        max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, use_distributed_sampler=False, callbacks=[counter],
    )  # fmt: skip
    trainer.fit(Spring(length=3, backbone=data.spec), data)
    contexts = {example.fields["passages"] for example in data.split("train").examples}
    assert counter.by_epoch[0] >= (1 if is_recomputed else len(contexts))
    assert (counter.by_epoch[-1] > counter.by_epoch[0]) is is_recomputed


def test_a_prompt_trained_on_relevance_reranks_retrieved_passages(options, tmp_path):
    of_questions = ("--data=", "--data.template", "--data.passage", "--data.max_target")
    shared = [option for option in options if not option.startswith(of_questions)]
    relevance = ["--data=RelevanceDataModule", "--data.template={soft}{question} : {passage} {target}",
                 "--data.words={relevant: good, irrelevant: bad}", "--data.negatives=2"]  # fmt: skip
    limits = ["--trainer.max_steps=20", "--trainer.max_epochs=-1", "--trainer.val_check_interval=10",
              "--trainer.check_val_every_n_epoch=null"]  # fmt: skip
    assert main(["fit", "--model=PromptTuning", "--model.length=3", *relevance, *shared, *limits]) == 0
    run, question = last_folder(), "is the dog sad"
    assert "val/f1/relevant" in read_metrics(run)["val"]
    reranker = PromptReranker(str(run / "prompt.safetensors"), max_tokens=36, batch_size=2, device="cpu")
    index = Retriever(str(tmp_path / "index"), "lexical").index
    passages = [index.passages[row] for row in range(len(index))]
    scores = reranker.scores(question, passages)
    lm, codec = reranker.method.lm(), reranker.method.loaded.codec
    words = codec.tokenizer.convert_tokens_to_ids(["bad", "good"])
    for passage, score in zip(passages, scores, strict=True):
        pieces = Template("{soft}is the dog sad : {text} {target}").pieces({"text": passage.text})
        batch = codec.collate([codec.encode(pieces, "good")])
        logits = lm.backbone(batch, lm.prompt(batch))[0, 0, words]
        assert score == pytest.approx(float(logits.log_softmax(-1)[1]), abs=1e-4)
    reranked = Retriever(str(tmp_path / "index"), "lexical", reranker=reranker).search([question], 2)[0]
    retrieved = Retriever(str(tmp_path / "index"), "lexical").search([question])[0]
    candidates = {hit.passage.document for hit in retrieved}
    ranking = [passages[n].document for n in sorted(range(len(passages)), key=lambda n: -scores[n])]
    expected = [document for document in ranking if document in candidates][:2]
    assert [hit.passage.document for hit in reranked] == expected
    reranking = [
        "--data.retriever.reranker=PromptReranker", "--data.retriever.reranker.device=cpu",
        f"--data.retriever.reranker.path={run / 'prompt.safetensors'}",
    ]  # fmt: skip
    assert main(["test", "--model=Spring", "--model.length=4", *options, *reranking]) == 0
    context = "".join(f"{CORPUS[name]} ," for name in expected)
    assert read_lines("test_predictions.jsonl")[0]["input"] == f"{context}is the dog sad :"


def test_a_prompt_that_was_not_trained_on_relevance_is_refused(fit):
    reranker = PromptReranker(str(fit() / "prompt.safetensors"), device="cpu")
    with pytest.raises(ValueError, match="has no classes instead of 'relevant'; train it with RelevanceDataModule"):
        reranker.scores("is it ?", [])
    with pytest.raises(ValueError, match="no prompt at"):
        _ = PromptReranker("nowhere.safetensors").identity
