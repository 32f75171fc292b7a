"""Two processes give the results of one process with all rows, whether the backbone is copied or sharded."""

import csv
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from forks import fork_command, torchrun_environments, wait_for
from lightning.pytorch.strategies import ModelParallelStrategy
from row_files import read_rows, write_rows, write_splits

from lightning_softprompt.checkpoints.checkpoint_file import load_checkpoint
from lightning_softprompt.checkpoints.prompt_file import read_prompt
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.distributed.sharding import spec_for_sharding
from lightning_softprompt.distributed.strategy import ShardedStrategy, refuse_untested_strategy

UNSIGNALLED = "--run.accept_changes=trainer.callbacks"  # the resumed run has no callback that stops it
STEPS = 7  # an epoch has 5
STRATEGIES = {"ddp": ["--trainer.strategy=ddp"], "sharded": ["--trainer.strategy=sharded"]}
SPEED = ("speed/", "lr")  # columns that do not depend on the rows
SLOW = ["--model.optimizer=AdamW", "--model.optimizer.lr=1e-4"]  # so that steps do not magnify rounding
FIT = [
    "--model=PromptTuning", "--model.length=3", *SLOW, "--trainer.max_epochs=-1", f"--trainer.max_steps={STEPS}",
    "--trainer.log_every_n_steps=1", "--trainer.val_check_interval=5",
]  # fmt: skip


@pytest.fixture
def classification(tmp_path, rows, tiny_folder):
    """Options of a classification task whose splits do not divide by two and have different numbers of batches."""
    twice = rows * 2
    data = write_splits(tmp_path / "data", train=rows * 3 + rows[:2], validation=twice[:9], test=twice[:5])
    return [
        "--data=ClassificationDataModule", f"--data.path={data}", "--data.template={soft}{text} it is{target}",
        '--data.labels={"negative": "bad", "neutral": "one", "positive": "good"}', "--data.eval_batch_size=4",
        f"--backbone.name={tiny_folder('llama')}",
    ]  # fmt: skip


@pytest.fixture
def summarization(tmp_path, tiny_folder):
    """Options of a task with answers of different lengths, which take different numbers of generation steps."""
    texts = ("a warm and funny film", "dull", "is it a sad story ?", "a dog and a dog", "well", "bad film", "one")
    rows = [{"document": text, "summary": text.partition(" ")[2] or text} for text in texts]
    data = write_splits(tmp_path / "data", train=rows * 2, validation=rows[:5], test=rows)
    return [
        "--data=SummarizationDataModule", f"--data.path={data}", "--data.template={soft}{document} :{target}",
        "--data.eval_batch_size=1", "--data.max_target_tokens=9", f"--backbone.name={tiny_folder('llama')}",
    ]  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A function that runs a command in `world` processes and returns the folder of the run."""

    def run(experiment, command, *options, world=1, expected=0):
        argv = [
            command, f"--run.experiment={experiment}", f"--run.folder={tmp_path}", "--run.wandb=disabled",
            "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", f"--trainer.devices={world}", *options,
        ]  # fmt: skip
        environments = torchrun_environments(world) if world > 1 else [{}]
        commands = [fork_command(argv, tmp_path / f"log_{n}", env) for n, env in enumerate(environments)]
        codes, run.logs = zip(*map(wait_for, commands), strict=True)
        assert codes == (expected,) * world, "\n\n".join(run.logs)
        return max((tmp_path / experiment).glob("*/"), key=lambda path: path.name, default=None)

    return run


def read_table(folder):
    """Returns the logged metrics without metrics of speed."""
    rows = csv.DictReader((folder / "metrics.csv").open())
    return [{name: float(v) for name, v in row.items() if v and not name.startswith(SPEED)} for row in rows]


def check_same(one, two):
    """Checks that both runs logged equal metrics; norms of gradients can differ more by the order of their sums."""
    a, b = read_table(one), read_table(two)
    assert [row.keys() for row in a] == [row.keys() for row in b]
    for x, y in zip(a, b, strict=True):
        assert y.pop("prompt/grad_norm", 0) == pytest.approx(x.pop("prompt/grad_norm", 0), rel=1e-4)
        assert y == pytest.approx(x, rel=1e-6, abs=1e-6)


def files_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_two_processes_train_and_test_as_one(run, classification, tmp_path):
    one = run("one", "fit", *FIT, *classification, "--data.batch_size=4")
    a = read_prompt(one / "prompt.safetensors")
    for name, strategy in STRATEGIES.items():
        two = run(name, "fit", *FIT, *classification, "--data.batch_size=2", *strategy, world=2)
        check_same(one, two)
        b = read_prompt(two / "prompt.safetensors")
        torch.testing.assert_close(b.tensors, a.tensors, rtol=1e-6, atol=1e-6)
        assert a.backbone == b.backbone
        states = [load_checkpoint(folder / "checkpoints/last.ckpt") for folder in (one, two)]
        assert states[0].keys() == states[1].keys()
        assert states[0]["state_dict"].keys() == states[1]["state_dict"].keys()
        assert files_of(one) == files_of(two)


@pytest.mark.parametrize("count", [5, 1], ids=["unequally many batches", "fewer rows than processes"])
def test_two_processes_test_each_row_once(run, classification, tmp_path, count):
    test_path = tmp_path / "data" / "test.jsonl"
    write_rows(test_path, read_rows(test_path)[:count])
    options = ["--model=PromptTuning", "--model.length=3", *classification, "--data.eval_batch_size=2"]
    alone = run("one", "test", *options)
    for name, strategy in STRATEGIES.items():
        shared = run(name, "test", *options, *strategy, world=2)
        check_same(alone, shared)
        records, expected = (read_rows(folder / "test_predictions.jsonl") for folder in (shared, alone))
        assert [record["row"] for record in records] == list(range(count))
        for record, other in zip(records, expected, strict=True):
            assert record.pop("scores") == pytest.approx(other.pop("scores"), abs=2e-6)
            assert record == other


def test_two_processes_train_and_generate_as_one(run, summarization):
    fit = ["--model=PrefixTuning", "--model.length=2", "--model.width=null", *FIT[2:]]
    fit += ["--trainer.max_steps=4", "--trainer.val_check_interval=3", *summarization]
    one = run("one", "fit", *fit, "--data.batch_size=4")
    for name, strategy in STRATEGIES.items():
        check_same(one, run(name, "fit", *fit, "--data.batch_size=2", *strategy, world=2))


def test_a_sharded_run_resumes_on_two_processes_or_on_one(run, classification):
    sharded = [*FIT, *classification, "--data.batch_size=2", *STRATEGIES["sharded"]]
    whole = run("whole", "fit", *sharded, world=2)
    signal = [{"class_path": "signals.SignalAt", "init_args": {"batch": 2, "name": "SIGTERM"}}]
    half = run("half", "fit", *sharded, f"--trainer.callbacks={json.dumps(signal)}", world=2, expected=143)
    half = half / "checkpoints/last.ckpt"
    rest = run("rest", "fit", *sharded, f"--ckpt_path={half}", UNSIGNALLED, world=2)
    state = [load_checkpoint(folder / "checkpoints/last.ckpt") for folder in (whole, rest)]
    assert torch.equal(state[0]["state_dict"]["tokens"], state[1]["state_dict"]["tokens"])
    assert read_table(rest)[:2] == read_table(whole)[3:5]
    alone = run("alone", "fit", *FIT, *classification, "--data.batch_size=4", f"--ckpt_path={half}", UNSIGNALLED)
    torch.testing.assert_close(
        load_checkpoint(alone / "checkpoints/last.ckpt")["state_dict"], state[0]["state_dict"], rtol=1e-6, atol=1e-6
    )


def test_two_processes_send_each_other_the_prompt_and_no_weights(run, summarization, tmp_path, tiny_folder):
    wire = json.dumps([{"class_path": "wire.Wire", "init_args": {"folder": str(tmp_path)}}])
    model = ["--model=PromptTuning", "--model.length=24"]
    data = [*summarization, "--data.max_tokens=20", "--data.batch_size=1"]
    steps = ["--trainer.max_steps=12", "--trainer.limit_val_batches=0", "--trainer.log_every_n_steps=100"]
    run("two", "fit", *model, *data, *steps, f"--trainer.callbacks={wire}", *STRATEGIES["ddp"], world=2)
    prompt = 24 * 32 * 4
    weights = sum(path.stat().st_size for path in tiny_folder("llama").glob("*.safetensors"))
    for rank in range(2):
        start, *sent = json.loads((tmp_path / f"sent_{rank}.json").read_text())
        steady = [b - a for a, b in itertools.pairwise(sent)][2:]
        assert start < 16 * 1024 < weights / 4  # exchanged before the first step
        assert all(prompt < size < prompt + 1536 for size in steady)  # the prompt, counts of rows, checks, headers


def test_strategies_that_shard_the_prompt_are_refused():
    with pytest.raises(ValueError, match="ModelParallelStrategy is not tested with soft prompts"):
        refuse_untested_strategy(ModelParallelStrategy())
    refuse_untested_strategy(ShardedStrategy())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"linear_backend": "bf16"}, "stores a copy of all weights"),
        ({"compiled": True}, "does not support sharded weights"),
    ],
)
def test_a_sharded_backbone_is_not_converted(spec, message):
    with pytest.raises(ValueError, match=message):
        spec_for_sharding(SimpleNamespace(device_mesh=object()), BackboneSpec(**spec))
    assert spec_for_sharding(SimpleNamespace(device_mesh=object()), BackboneSpec()).linear_backend == "plain"
    assert spec_for_sharding(SimpleNamespace(device_mesh=None), BackboneSpec(**spec)) == BackboneSpec(**spec)


def test_a_method_that_changes_the_backbone_does_not_shard_it(run, classification):
    options = ["--model=FullFineTuning", "--trainer.max_steps=1", *classification, *STRATEGIES["sharded"]]
    run("full", "fit", *options, expected=2)
    assert "a method that changes the backbone cannot shard it" in run.logs[0]


def test_two_processes_measure_a_corpus_as_one(run, tiny_folder, tmp_path):
    texts = ["a warm and funny film about a dog", "dull", "it is a sad story . it is good", "well", "one bad film"]
    data = write_splits(tmp_path / "data", **{name: [{"text": text} for text in texts] for name in ("train", "test")})
    write_splits(tmp_path / "general", test=[{"text": text} for text in texts[:3]])
    options = [
        "--model=PromptTuning", "--model.length=3", "--data=CorpusDataModule", f"--data.path={data}",
        f"--data.corpora={{general: {tmp_path / 'general'}}}", "--data.window=16", "--data.eval_batch_size=2",
        f"--backbone.name={tiny_folder('llama')}",
    ]  # fmt: skip
    alone = run("one", "test", *options)
    shared = run("two", "test", *options, "--trainer.strategy=ddp", world=2)
    expected, measured = (json.loads((folder / "metrics.json").read_text())["test"] for folder in (alone, shared))
    assert expected.pop("test/loss")
    measured.pop("test/loss")
    assert measured == pytest.approx(expected, rel=1e-5)
    assert measured["test/documents"] == 5
    assert measured["test/general/documents"] == 3
