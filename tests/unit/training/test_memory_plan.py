import json
import re
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import tiny
import torch
from exact import saved_bytes
from small_tokenizers import extend_by_words
from transformers import (
    AlbertConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DistilBertConfig,
    FalconConfig,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen3Config,
    T5Config,
)

from lightning_softprompt.backbones import skeleton as skeleton_module
from lightning_softprompt.backbones.insertion.layer_stacks import Stack
from lightning_softprompt.backbones.skeleton import Skeleton, random_batch
from lightning_softprompt.cli.app import main
from lightning_softprompt.cli.commands import estimate as command
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.methods import DPT, IDPG, NewTokens, PrefixTuning, PromptTuning, PTuning
from lightning_softprompt.runs.run_spec import last_folder
from lightning_softprompt.system.errors import CommandError
from lightning_softprompt.training.memory_measurement import Workload
from lightning_softprompt.training.memory_plan import plan

CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=600, hidden_size=128, intermediate_size=320, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    ),
    "gpt2": GPT2Config(vocab_size=600, n_embd=128, n_layer=5, n_head=4, n_positions=256),
    "t5": T5Config(vocab_size=600, d_model=128, d_kv=32, d_ff=256, num_layers=4, num_heads=4, decoder_start_token_id=0),
}  # fmt: skip
METHODS = {
    "prompt": (PromptTuning, {"length": 7}),
    "prefix": (PrefixTuning, {"length": 5, "width": 16}),
    "new_tokens": (NewTokens, {"tokens": [5, 6, 7]}),
}
ROWS, TOKENS = 7, 90


@pytest.fixture
def spec(tmp_path):
    """A function from a family to the spec of a backbone that has no weights, only config.json."""

    def spec(family, **options):
        CONFIGS[family].save_pretrained(tmp_path / family)
        assert (tmp_path / family / "config.json").is_file()
        return BackboneSpec(name=str(tmp_path / family), **options)

    return spec


CASES = [*product(CONFIGS, METHODS, ["float32"]), ("llama", "prompt", "bfloat16")]


@pytest.mark.parametrize(("family", "name", "dtype"), CASES)
def test_the_estimate_of_a_step_is_within_a_quarter_of_the_measurement(spec, family, name, dtype):
    backbone_spec, (cls, arguments) = spec(family, dtype=dtype), METHODS[name]
    backbone = Skeleton(backbone_spec, CONFIGS[family]).small_copy(1, CONFIGS[family].num_hidden_layers)
    method = cls(backbone=backbone_spec, **arguments)
    method.attach(backbone)
    batch = random_batch(backbone, ROWS, TOKENS)
    with torch.no_grad():
        method.step(batch)
    expected, _ = saved_bytes(lambda: method.step(batch)["loss"])
    tokens = int(batch.mask.sum()) // ROWS
    estimate = plan(
        cls(backbone=backbone_spec, **arguments), backbone_spec, Workload(ROWS, tokens, batch.targets.shape[1])
    )
    weights = sum(p.numel() * p.element_size() for p in backbone.parameters())
    assert estimate.training["kept for the backward pass"] == pytest.approx(expected, rel=0.25)
    assert estimate.trainable == sum(p.numel() for p in method.parameters() if p.requires_grad)
    assert estimate.training["frozen weights"] == pytest.approx(weights, rel=0.3)  # the copy has a smaller vocabulary
    assert estimate.frozen == sum(p.numel() for p in Skeleton(backbone_spec, CONFIGS[family]).full_size.parameters())


def test_an_extended_vocabulary_adds_rows_to_both_tables(tiny_folder, tmp_path):
    vocabulary, rows = extend_by_words(tiny.tokenizer("llama"), ["angioplasty", "cardiology"], tmp_path / "vocabulary")
    plain = BackboneSpec(str(tiny_folder("llama")))
    spec = replace(plain, vocabulary=str(vocabulary))
    method = NewTokens(backbone=spec)
    estimate = plan(method, spec, Workload(2, 20, 20))
    hidden_size = Skeleton(spec).config.hidden_size
    assert estimate.trainable == 2 * len(rows) * hidden_size
    assert estimate.frozen == plan(PromptTuning(length=1), plain, Workload(2, 20, 20)).frozen + estimate.trainable


WIDTHS = {"vocab_size": 600, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
GROUPED = {**WIDTHS, "num_key_value_heads": 2, "head_dim": 16}
TEXT = {**GROUPED, "num_hidden_layers": 4, "sliding_window": 512}
IMAGES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
FALCON = {"vocab_size": 600, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 5}
OTHERS = {  # layer lists, nested configs, shared layers, experts, other names of sizes
    "layer types": (Qwen3Config(**GROUPED, num_hidden_layers=6, max_window_layers=2, use_sliding_window=True), 6),
    "sliding pattern": (Gemma3TextConfig(**GROUPED, num_hidden_layers=7, sliding_window=512), 7),
    "image and text": (Gemma3Config(text_config=TEXT, vision_config=IMAGES), 4),
    "inferred heads": (FalconConfig(**FALCON, multi_query=False), 5),
    "experts": (MixtralConfig(**GROUPED, num_hidden_layers=4, num_local_experts=3), 4),
    "shared layers": (AlbertConfig(**WIDTHS, embedding_size=32, num_hidden_layers=5), 5),
    "other names": (DistilBertConfig(vocab_size=600, dim=64, hidden_dim=96, n_heads=4, n_layers=4), 4),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_the_estimate_counts_the_model_that_the_config_builds(tmp_path, name):
    config, depth = OTHERS[name]
    config.save_pretrained(tmp_path)
    spec = BackboneSpec(name=str(tmp_path))
    estimate = plan(PromptTuning(backbone=spec, length=7), spec, Workload(ROWS, TOKENS, answers=2, new_tokens=3))
    is_masked = config.model_type in ("albert", "distilbert")
    model = (AutoModelForMaskedLM if is_masked else AutoModelForCausalLM).from_config(config)
    assert estimate.frozen == sum(p.numel() for p in model.parameters())
    assert estimate.training["frozen weights"] == sum(p.numel() * p.element_size() for p in model.parameters())
    backbone = Skeleton(spec, config).small_copy(1)
    method = PromptTuning(backbone=spec, length=7)
    method.attach(backbone)
    batch = random_batch(backbone, ROWS, TOKENS)
    with torch.no_grad():
        method.step(batch)
    expected, _ = saved_bytes(lambda: method.step(batch)["loss"])
    assert estimate.training["kept for the backward pass"] == pytest.approx(expected, rel=0.25)
    token_bytes = model.config.get_text_config().hidden_size * 4
    answers, keys_and_values, positions = 2, 2, TOKENS + 7 + 3
    keys = 0 if is_masked else answers * depth * keys_and_values * positions * token_bytes
    share = 1 if name == "inferred heads" else 2  # query heads for each key head
    assert estimate.answering["keys and values of answers"] == keys // share


def test_a_model_that_cannot_be_measured_is_rejected_by_name(tmp_path, monkeypatch):
    CONFIGS["llama"].save_pretrained(tmp_path)
    spec = BackboneSpec(name=str(tmp_path))
    monkeypatch.setattr(skeleton_module, "MAX_PARAMETERS", 10)
    with pytest.raises(ValueError, match="cannot be estimated: no small copy of a LlamaForCausalLM runs"):
        plan(PromptTuning(backbone=spec, length=7), spec, Workload(ROWS, TOKENS))


def test_a_stack_of_layers_has_a_beginning_and_a_repeated_period():
    def stack(kinds):
        return Stack("model", ("layers",), tuple(kinds))

    for kinds, fewest, period in (("aaaaa", 2, 1), ("daaaaa", 2, 1), ("mmmammmammma", 4, 4)):
        assert (stack(kinds).fewest, stack(kinds).period) == (fewest, period)
    assert stack("abcde").fewest == 5
    assert [stack("a" * layers).fewest for layers in (1, 2, 3, 4)] == [1, 1, 2, 2]


@pytest.mark.parametrize("cls", [PTuning, DPT, IDPG])
def test_the_estimate_counts_the_trainable_parameters(spec, cls):
    backbone_spec = spec("llama")
    estimate = plan(cls(backbone=backbone_spec), backbone_spec, Workload(2, 30))
    method = cls(backbone=backbone_spec)
    method.attach(Skeleton(backbone_spec, CONFIGS["llama"]).full_size)
    assert estimate.trainable == sum(p.numel() for p in method.parameters() if p.requires_grad) > 0


def test_optimizer_devices_replicas_and_checkpointing_change_the_estimate(spec):
    backbone_spec = spec("llama")

    def estimate(**options):
        return plan(PromptTuning(backbone=backbone_spec, length=10), backbone_spec, Workload(4, 60, **options))

    one = estimate()
    assert one.training["prompt"] == 4 * 10 * 128
    assert one.training["optimizer"] == 2 * one.training["prompt"]
    plain = PromptTuning(backbone=backbone_spec, optimizer=partial(torch.optim.SGD, lr=0.1))
    assert plan(plain, backbone_spec, Workload(4, 60)).training["optimizer"] == 0
    four = estimate(devices=4)
    assert four.wire == {"gradients": round(1.5 * one.training["prompt"])}
    assert four.start == one.training["prompt"]  # each process reads the frozen weights from disk
    full = Skeleton(backbone_spec, CONFIGS["llama"]).full_size.model
    layers = 4 * sum(p.numel() for layer in full.model.layers for p in layer.parameters())
    largest = layers / len(full.model.layers)
    sharded = plan(
        PromptTuning(backbone=backbone_spec, length=10), backbone_spec, Workload(4, 60, devices=4, sharded=True)
    )
    assert sharded.wire["weights"] == 1.5 * layers
    unsharded = one.training["frozen weights"] - layers
    assert sharded.training["frozen weights"] == unsharded + layers / 4 + 2 * largest
    pairs = plan(
        PromptTuning(backbone=backbone_spec, length=10),
        backbone_spec,
        Workload(4, 60, devices=4, sharded=True, per_copy=2),
    )
    assert pairs.wire == {**four.wire, "weights": layers}
    assert pairs.training["frozen weights"] == unsharded + layers / 2 + 2 * largest
    three = estimate(replicas=3)
    assert three.trainable == 3 * one.trainable
    checkpointed_spec = spec("llama", checkpointing=True)
    checkpointed = plan(PromptTuning(backbone=checkpointed_spec, length=10), checkpointed_spec, Workload(4, 60))
    assert checkpointed.training["kept for the backward pass"] == 5 * (4 * 60 + 10) * 128 * 4
    assert checkpointed.peak < one.peak


OPTIONS = ["--model=PromptTuning", "--model.length=100", "--data=ClassificationDataModule", "--data.labels=[bad, good]",
         "--data.template={soft}{text} is{target}", "--data.path=nowhere", "--backbone.dtype=bfloat16"]  # fmt: skip
SEVENTY = "--shape=80,8192,28672,64,8,128256"


def test_a_run_that_is_too_large_is_answered_with_what_fits(capsys):
    shape = "--shape=4,256,512,4,4,1000"
    options = [shape, *OPTIONS, "--data.max_tokens=128", "--data.batch_size=64"]
    assert command.main([*options, "--json"]) == 0
    peak = json.loads(capsys.readouterr().out)["peak"]
    memory = f"--memory={peak / 2 / 2**30}"
    assert command.main([*options, memory]) == 1
    rows = int(re.search(r"What fits: --data.batch_size (\d+) \(", capsys.readouterr().err)[1])
    assert command.main([*options, f"--data.batch_size={rows}", memory]) == 0
    assert command.main([*options, f"--data.batch_size={rows + 1}", memory]) == 1
    capsys.readouterr()
    assert command.main([*options, "--memory=0.0001"]) == 1
    assert "No batch size fits" in capsys.readouterr().err


def test_a_model_of_seventy_billion_parameters_fits_only_on_several_devices(capsys):
    small_batches = ["--data.max_tokens=128", "--data.batch_size=8", "--trainer.precision=bf16-mixed", "--json"]
    assert command.main([SEVENTY, *OPTIONS, *small_batches, "--memory=80"]) == 1
    output = capsys.readouterr()
    alone = json.loads(output.out)
    assert output.err.startswith("does not fit: ")
    assert alone["frozen"] == 70_553_706_496
    assert alone["training"]["frozen weights"] == 2 * alone["frozen"]
    assert alone["trainable"] == 100 * 8192
    assert command.main([SEVENTY, *OPTIONS, *small_batches, "--memory=80", "--devices=8", "--sharding=fsdp"]) == 0
    shared = json.loads(capsys.readouterr().out)
    assert shared["peak"] < 60 * 2**30
    unsharded = 2 * 128256 * 8192 + 8192  # embeddings, head and the last norm
    assert shared["wire"]["weights"] == round(2 * 7 / 8 * 2 * (alone["frozen"] - unsharded))


def test_the_estimate_of_a_rollout_counts_sampled_and_learned_tokens(tiny_folder, capsys):
    policy = [
        f"--backbone.name={tiny_folder('llama')}", "--model=PromptTuning", "--model.length=4",
        "--data=PromptDataModule", "--data.path=questions", "--data.batch_size=6",
        "--data.max_tokens=20", "--data.max_target_tokens=8", "--model.readout=ValueHead",
        "--model.objective=PPO", "--model.objective.reward=Length", "--model.objective.answers=3",
        "--model.objective.max_new_tokens=10", "--model.objective.epochs=2", "--model.objective.minibatches=3",
    ]  # fmt: skip
    assert command.main(["--json", *policy]) == 0
    plan = json.loads(capsys.readouterr().out)
    once = 6 * (20 + 4 + 3 * 10)
    passes = {"sampling": once, "old log-probabilities": once, "reference": once, "learning": 4 * once}
    assert plan["rollout"]["passes"] == passes
    assert (plan["rollout"]["steps"], plan["rollout"]["learned_rows"]) == (6, 6)
    assert command.main(["--speed=100", *policy]) == 0
    report = capsys.readouterr().out
    assert "6 rows of 30 tokens" in report
    assert f"{7 * once / 100:.3g} s" in report


def test_a_shape_with_missing_numbers_is_rejected():
    with pytest.raises(CommandError, match="layers,hidden,intermediate,heads,kv_heads,vocabulary as whole numbers"):
        command.main(["--shape=80,8192", *OPTIONS])


@pytest.mark.parametrize("devices", [3, "3", [0, 2, 3]], ids=str)
def test_devices_are_counted(devices):
    assert command.device_count(devices) == 3


@pytest.mark.parametrize("devices", ["auto", None])
def test_a_run_without_a_number_of_devices_is_estimated_on_one(devices):
    assert command.device_count(devices) == 1


def test_an_unknown_number_of_devices_is_an_error():
    with pytest.raises(CommandError, match="give their number with --devices"):
        command.device_count(-1)


def test_an_invalid_option_is_reported_by_name(tmp_path):
    with pytest.raises(CommandError, match="batch_size"):
        command.main(["--model=PromptTuning", "--data=ClassificationDataModule", "--data.batch_size=0"])


def test_the_estimated_size_of_a_checkpoint_is_that_of_a_run(tmp_path, rows, tiny_folder, capsys):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    options = [
        "--model=PromptTuning", "--model.length=20", f"--backbone.name={tiny_folder('llama')}",
        "--data=ClassificationDataModule", f"--data.train={tmp_path / 'train.jsonl'}", "--data.max_tokens=20",
        '--data.labels={"negative": "bad", "neutral": "one", "positive": "good"}', "--data.batch_size=2",
        "--data.template={soft}{text} it is{target}", "--trainer.accelerator=cpu", "--run.wandb=disabled",
    ]  # fmt: skip
    assert command.main(options) == 0
    output = capsys.readouterr().out
    assert "640 trainable parameters" in output
    assert "kept for the backward pass" in output
    assert command.main([*options, "--json"]) == 0
    estimate = json.loads(capsys.readouterr().out)
    limits = ["--trainer.max_steps=2", "--trainer.enable_progress_bar=false", f"--run.folder={tmp_path / 'runs'}"]
    assert main(["fit", *options, *limits]) == 0
    size = (last_folder() / "checkpoints" / "last.ckpt").stat().st_size
    assert estimate["checkpoint"] == pytest.approx(size, rel=0.25)
