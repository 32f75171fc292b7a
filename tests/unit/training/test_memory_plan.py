import json
from functools import partial

import pytest
import torch
from exact import kept_by
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
from lightning_softprompt.methods import DPT, IDPG, PrefixTuning, PromptTuning, PTuning
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
METHODS = {"prompt": (PromptTuning, {"length": 7}), "prefix": (PrefixTuning, {"length": 5, "width": 16})}
ROWS, TOKENS = 7, 90


@pytest.fixture
def spec(tmp_path):
    """A function from a family to a backbone of which there is nothing but config.json."""

    def spec(family, **options):
        CONFIGS[family].save_pretrained(tmp_path / family)
        assert [path.name for path in (tmp_path / family).glob("*.json") if path.name == "config.json"]
        return BackboneSpec(name=str(tmp_path / family), **options)

    return spec


CASES = [(family, method, "float32") for family in CONFIGS for method in METHODS] + [("llama", "prompt", "bfloat16")]


@pytest.mark.parametrize(("family", "name", "dtype"), CASES)
def test_what_a_step_keeps_is_within_a_quarter_of_what_is_measured(spec, family, name, dtype):
    place, (cls, arguments) = spec(family, dtype=dtype), METHODS[name]
    backbone = Skeleton(place, CONFIGS[family]).small_copy(1, CONFIGS[family].num_hidden_layers)
    method = cls(backbone=place, **arguments)
    method.attach(backbone)
    batch = random_batch(backbone, ROWS, TOKENS)
    with torch.no_grad():
        method.step(batch)
    kept, _ = kept_by(lambda: method.step(batch)["loss"])
    tokens = int(batch.mask.sum()) // ROWS
    found = plan(cls(backbone=place, **arguments), place, Workload(ROWS, tokens, batch.targets.shape[1]))
    weights = sum(p.numel() * p.element_size() for p in backbone.parameters())
    assert found.training["kept for the backward pass"] == pytest.approx(kept, rel=0.25)
    assert found.trainable == sum(p.numel() for p in method.parameters() if p.requires_grad)
    assert found.training["frozen weights"] == pytest.approx(weights, rel=0.3)  # the real one has fewer words
    assert found.frozen == sum(p.numel() for p in Skeleton(place, CONFIGS[family]).full_size.parameters())


WIDTHS = {"vocab_size": 600, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
GROUPED = {**WIDTHS, "num_key_value_heads": 2, "head_dim": 16}
TEXT = {**GROUPED, "num_hidden_layers": 4, "sliding_window": 512}
IMAGES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
FALCON = {"vocab_size": 600, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 5}
OTHERS = {  # lists of layers, nested parts, layers that share weights, experts, sizes under other names
    "layer types": (Qwen3Config(**GROUPED, num_hidden_layers=6, max_window_layers=2, use_sliding_window=True), 6),
    "sliding pattern": (Gemma3TextConfig(**GROUPED, num_hidden_layers=7, sliding_window=512), 7),
    "image and text": (Gemma3Config(text_config=TEXT, vision_config=IMAGES), 4),
    "inferred heads": (FalconConfig(**FALCON, multi_query=False), 5),
    "experts": (MixtralConfig(**GROUPED, num_hidden_layers=4, num_local_experts=3), 4),
    "shared layers": (AlbertConfig(**WIDTHS, embedding_size=32, num_hidden_layers=5), 5),
    "other names": (DistilBertConfig(vocab_size=600, dim=64, hidden_dim=96, n_heads=4, n_layers=4), 4),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_estimates_read_the_built_model(tmp_path, name):
    config, depth = OTHERS[name]
    config.save_pretrained(tmp_path)
    spec = BackboneSpec(name=str(tmp_path))
    found = plan(PromptTuning(backbone=spec, length=7), spec, Workload(ROWS, TOKENS, answers=2, new_tokens=3))
    masked = config.model_type in ("albert", "distilbert")
    model = (AutoModelForMaskedLM if masked else AutoModelForCausalLM).from_config(config)
    assert found.frozen == sum(p.numel() for p in model.parameters())
    assert found.training["frozen weights"] == sum(p.numel() * p.element_size() for p in model.parameters())
    backbone = Skeleton(spec, config).small_copy(1)
    method = PromptTuning(backbone=spec, length=7)
    method.attach(backbone)
    batch = random_batch(backbone, ROWS, TOKENS)
    with torch.no_grad():
        method.step(batch)
    kept, _ = kept_by(lambda: method.step(batch)["loss"])
    assert found.training["kept for the backward pass"] == pytest.approx(kept, rel=0.25)
    keys = 0 if masked else 2 * depth * 2 * (TOKENS + 7 + 3) * model.config.get_text_config().hidden_size * 4
    share = 1 if name == "inferred heads" else 2  # query heads to each key head
    assert found.answering["keys and values of answers"] == keys // share


def test_a_model_that_cannot_be_measured_is_refused_by_name(tmp_path, monkeypatch):
    CONFIGS["llama"].save_pretrained(tmp_path)
    spec = BackboneSpec(name=str(tmp_path))
    monkeypatch.setattr(skeleton_module, "MAX_PARAMETERS", 10)
    with pytest.raises(ValueError, match="cannot be estimated: no small copy of a LlamaForCausalLM runs"):
        plan(PromptTuning(backbone=spec, length=7), spec, Workload(ROWS, TOKENS))


def test_layers_repeat_after_a_beginning_of_their_own():
    def stack(kinds):
        return Stack("model", ("layers",), tuple(kinds))

    assert (stack("aaaaa").fewest, stack("aaaaa").period) == (2, 1)
    assert (stack("daaaaa").fewest, stack("daaaaa").period) == (2, 1)
    assert (stack("mmmammmammma").fewest, stack("mmmammmammma").period) == (4, 4)
    assert stack("abcde").fewest == 5
    assert [stack("a" * layers).fewest for layers in (1, 2, 3, 4)] == [1, 1, 2, 2]


@pytest.mark.parametrize("cls", [PTuning, DPT, IDPG])
def test_other_methods_are_counted_too(spec, cls):
    place = spec("llama")
    found = plan(cls(backbone=place), place, Workload(2, 30))
    method = cls(backbone=place)
    method.attach(Skeleton(place, CONFIGS["llama"]).full_size)
    assert found.trainable == sum(p.numel() for p in method.parameters() if p.requires_grad) > 0


def test_optimizers_devices_replicas_and_recomputed_layers_count(spec):
    place = spec("llama")
    one = plan(PromptTuning(backbone=place, length=10), place, Workload(4, 60))
    assert one.training["optimizer"] == 2 * one.training["prompt"] == 2 * 4 * 10 * 128
    plain = PromptTuning(backbone=place, optimizer=partial(torch.optim.SGD, lr=0.1))
    assert plan(plain, place, Workload(4, 60)).training["optimizer"] == 0
    four = plan(PromptTuning(backbone=place, length=10), place, Workload(4, 60, devices=4))
    assert four.wire == {"gradients": round(1.5 * one.training["prompt"])}
    assert four.start == one.training["prompt"]  # each process reads the frozen weights itself
    full = Skeleton(place, CONFIGS["llama"]).full_size.model
    layers = 4 * sum(p.numel() for layer in full.model.layers for p in layer.parameters())
    largest = layers / len(full.model.layers)
    sharded = plan(PromptTuning(backbone=place, length=10), place, Workload(4, 60, devices=4, sharded=True))
    assert sharded.wire["weights"] == 1.5 * layers
    whole = one.training["frozen weights"] - layers
    assert sharded.training["frozen weights"] == whole + layers / 4 + 2 * largest
    pairs = plan(PromptTuning(backbone=place, length=10), place, Workload(4, 60, devices=4, sharded=True, per_copy=2))
    assert pairs.wire == {**four.wire, "weights": layers}
    assert pairs.training["frozen weights"] == whole + layers / 2 + 2 * largest
    three = plan(PromptTuning(backbone=place, length=10), place, Workload(4, 60, replicas=3))
    assert three.trainable == 3 * one.trainable
    again = spec("llama", checkpointing=True)
    less = plan(PromptTuning(backbone=again, length=10), again, Workload(4, 60))
    assert less.training["kept for the backward pass"] == 5 * (4 * 60 + 10) * 128 * 4
    assert less.peak < one.peak


GIVEN = ["--model=PromptTuning", "--model.length=100", "--data=ClassificationDataModule", "--data.labels=[bad, good]",
         "--data.template={soft}{text} is{target}", "--data.path=nowhere", "--backbone.dtype=bfloat16"]  # fmt: skip
SEVENTY = "--shape=80,8192,28672,64,8,128256"


def test_a_run_of_seventy_billions_is_refused_where_it_cannot_fit(capsys):
    few = ["--data.max_tokens=128", "--data.batch_size=8", "--trainer.precision=bf16-mixed", "--json"]
    assert command.main([SEVENTY, *GIVEN, *few, "--memory=80"]) == 1
    said = capsys.readouterr()
    alone = json.loads(said.out)
    assert said.err.startswith("does not fit: ")
    assert alone["frozen"] == 70_553_706_496
    assert alone["training"]["frozen weights"] == 2 * alone["frozen"]
    assert alone["trainable"] == 100 * 8192
    assert command.main([SEVENTY, *GIVEN, *few, "--memory=80", "--devices=8", "--sharding=fsdp"]) == 0
    shared = json.loads(capsys.readouterr().out)
    assert shared["peak"] < 60 * 2**30
    whole = 2 * 128256 * 8192 + 8192  # embeddings, head and the last norm
    assert shared["wire"]["weights"] == round(2 * 7 / 8 * 2 * (alone["frozen"] - whole))


def test_numbers_that_are_no_shape_are_refused():
    with pytest.raises(CommandError, match="layers,hidden,intermediate,heads,kv_heads,vocabulary as whole numbers"):
        command.main(["--shape=80,8192", *GIVEN])


@pytest.mark.parametrize(("devices", "count"), [(4, 4), ("4", 4), ([0, 2, 3], 3), ("auto", 1), (None, 1)], ids=str)
def test_devices_are_counted(devices, count):
    assert command.device_count(devices) == count


def test_devices_that_nobody_knows_the_number_of_are_asked_for():
    with pytest.raises(CommandError, match="give their number with --devices"):
        command.device_count(-1)


def test_options_that_do_not_fit_are_told_in_a_line(tmp_path):
    with pytest.raises(CommandError, match="batch_size"):
        command.main(["--model=PromptTuning", "--data=ClassificationDataModule", "--data.batch_size=0"])


def test_the_plan_of_a_run_is_what_its_checkpoint_takes(tmp_path, rows, tiny_folder, capsys):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    options = [
        "--model=PromptTuning", "--model.length=20", f"--backbone.name={tiny_folder('llama')}",
        "--data=ClassificationDataModule", f"--data.train={tmp_path / 'train.jsonl'}", "--data.max_tokens=20",
        '--data.labels={"negative": "bad", "neutral": "one", "positive": "good"}', "--data.batch_size=2",
        "--data.template={soft}{text} it is{target}", "--trainer.accelerator=cpu", "--run.wandb=disabled",
    ]  # fmt: skip
    assert command.main(options) == 0
    told = capsys.readouterr().out
    assert "640 trainable parameters" in told
    assert "kept for the backward pass" in told
    assert command.main([*options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    limits = ["--trainer.max_steps=2", "--trainer.enable_progress_bar=false", f"--run.folder={tmp_path / 'runs'}"]
    assert main(["fit", *options, *limits]) == 0
    size = (last_folder() / "checkpoints" / "last.ckpt").stat().st_size
    assert found["checkpoint"] == pytest.approx(size, rel=0.25)
