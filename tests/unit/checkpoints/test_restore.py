"""Classes that files can name: plug-ins of this package, optimizers of PyTorch, and modules that the user trusts."""

import json
import sys
from functools import partial
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from hostile import nothing_happens
from lightning import LightningModule, Trainer

from lightning_softprompt import __main__ as command
from lightning_softprompt.checkpoints.prompt_file import SavedPrompt, read_prompt, write_prompt
from lightning_softprompt.checkpoints.restore import load_method
from lightning_softprompt.cli import resume_checks
from lightning_softprompt.cli.plugins import import_plugins
from lightning_softprompt.cli.run_config import read_run_config
from lightning_softprompt.methods import Folded, PromptBank, PromptTuning
from lightning_softprompt.methods.base import SoftPromptModule
from lightning_softprompt.objectives.distillation import Distillation
from lightning_softprompt.rag.prompt_reranker import PromptReranker
from lightning_softprompt.system import trust
from lightning_softprompt.training.replicas import Replicas, ReplicaSpec

FAMILIES = ("llama",)
METHOD = {"_class_path": "lightning_softprompt.methods.PromptTuning", "length": 3}
CALL = {"class_path": "os.system", "init_args": {"command": "touch created"}}
PLUGIN = """
from dataclasses import dataclass

import torch
from lightning_softprompt.prompts.init import Init

@dataclass(frozen=True)
class Ones(Init):
    def __call__(self, backbone, length):
        return torch.ones(length, backbone.hidden_size)

def call(*args, **kwargs):
    raise AssertionError("called")
"""


@pytest.fixture
def write(backbone, tmp_path):
    """A function that writes a prompt or a checkpoint of a method with arguments, and returns its path."""
    tensors = {"tokens": torch.randn(3, 32)}
    owner = {"name": backbone.spec.name, "revision": None, "fingerprint": backbone.fingerprint()}

    def write(suffix=".safetensors", **arguments):
        method = {**METHOD, "backbone": {"name": backbone.spec.name}, **arguments}
        path = tmp_path / f"p{suffix}"
        if suffix == ".safetensors":
            write_prompt(path, SavedPrompt(tensors, owner, method))
        else:
            values = {"state_dict": tensors, "backbone": owner, "hyper_parameters": method}
            torch.save({**values, "pytorch-lightning_version": "2.6.6"}, path)
        return path

    return write


@pytest.fixture
def module_nearby(tmp_path, monkeypatch):
    """A module in the current folder, which is imported only if the user trusts it."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "nearby.py").write_text(PLUGIN)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    yield "nearby"
    sys.modules.pop("nearby", None)


NAMES = [
    "os.system", "subprocess.getoutput", "subprocess.Popen", "builtins.exec", "shutil.rmtree", "torch.hub.load",
    "torch.load", "torch.optim.lr_scheduler.partial", "lightning_softprompt.system.atomic_files.write_file",
    "lightning_softprompt.checkpoints.prompt_file.read_prompt", "lightning_softprompt.prompts.init.rms",
    "lightning_softprompt.methods.trained.folded.read_prompt",
    "lightning_softprompt.callbacks.reporting.predictions.PredictionWriter",
    "nearby.Ones", "nearby.call", "..", "", "a-b.c",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["_class_path", "readout", "init", "classes"])
def test_a_class_that_is_not_registered_is_refused(write, backbone, module_nearby, name, key):
    value = {"class_path": name, "init_args": {"command": "touch created"}}
    path = write(**{key: name if key == "_class_path" else value})
    import_plugins()  # a file can import modules of the package
    before = set(sys.modules)
    with nothing_happens(), pytest.raises(ValueError, match=r"p\.safetensors cannot be loaded"):
        load_method(read_prompt(path), path, backbone)
    assert not set(sys.modules) - before


@pytest.mark.parametrize("value", [
    '{"class_path": "os.system", "init_args": {"command": "touch created"}}', "os.system", ["os.system"], [CALL],
    {"init_args": CALL}, {"class_path": ["os.system"]}, {"class_path": {"class_path": "os.system"}}, True, 3,
    {"class_path": "lightning_softprompt.readouts.calibrated.Calibrated", "init_args": {"inner": CALL}},
    {"class_path": "lightning_softprompt.readouts.label_words.LabelWords", "dict_kwargs": {"aggregate": CALL}},
    {"class_path": "lightning_softprompt.readouts.label_words.LabelWords", "init_args": {"codec": None}},
])  # fmt: skip
def test_a_readout_is_a_registered_class_with_plain_arguments(write, backbone, value):
    path = write(readout=value)
    with nothing_happens(), pytest.raises(ValueError, match=r"p\.safetensors cannot be loaded: readout"):
        load_method(read_prompt(path), path, backbone)


def test_a_number_larger_than_all_tensors_is_refused_before_the_method_is_created(write, backbone, monkeypatch):
    path = write(length=10**12)
    monkeypatch.setattr(PromptTuning, "__init__", lambda *_, **__: pytest.fail("created"))
    with pytest.raises(ValueError, match=r"length is 1000000000000, more than the file has numbers"):
        load_method(read_prompt(path), path, backbone)


def loaders(path, backbone):
    """Return every function that loads a method from a file."""
    return {
        "restored": lambda: load_method(read_prompt(path), path),
        "fold": lambda: raise_error(command.main(["fold", str(path)])),
        "bank": lambda: PromptBank({"a": str(path)}, backbone=backbone.spec).attach(backbone),
        "teacher": lambda: Distillation([str(path)])._teacher(0, backbone),
        "reranker": lambda: PromptReranker(str(path)).method,
        "module": lambda: SoftPromptModule.load_from_checkpoint(path),
        "method": lambda: PromptTuning.load_from_checkpoint(path),
        "replicas": lambda: Replicas.load_from_checkpoint(path),
        "lightning": lambda: LightningModule.load_from_checkpoint(path),
    }


def raise_error(code):
    if code:
        raise ValueError("p.ckpt cannot be loaded: readout")


@pytest.mark.parametrize("loader", list(loaders(Path("p"), None)))
def test_no_way_to_load_a_file_calls_a_function(write, backbone, loader):
    path = write(".ckpt", readout=CALL, _instantiator="lightning.pytorch.cli.instantiate_module")
    with nothing_happens(), pytest.raises(ValueError, match="cannot be loaded: readout"):
        loaders(path, backbone)[loader]()


@pytest.mark.parametrize("loader", ["module", "method", "lightning"])
def test_loading_by_lightning_restores_prompt_and_optimizer(backbone, tmp_path, loader):
    module = PromptTuning(3, backbone=backbone.spec, optimizer=partial(torch.optim.SGD, lr=0.5))
    module.attach(backbone)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "p.ckpt")
    loaded = loaders(tmp_path / "p.ckpt", backbone)[loader]()
    assert torch.equal(loaded.tokens, module.tokens)
    assert loaded.configure_optimizers().defaults["lr"] == 0.5


def test_replicas_are_restored(backbone, tmp_path):
    module = Replicas(PromptTuning(3, backbone=backbone.spec), ReplicaSpec(2))
    for seed, replica in enumerate(module.methods):
        replica.attach(backbone, seed)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "p.ckpt")
    loaded = Replicas.load_from_checkpoint(tmp_path / "p.ckpt")
    for restored, original in zip(loaded.methods, module.methods, strict=True):
        assert torch.equal(restored.tokens, original.tokens)


def test_neither_optimizer_nor_schedule_is_built_for_inference(write, backbone, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "__init__", lambda *_, **__: pytest.fail("built"))
    optimizer = {"class_path": "bitsandbytes.optim.AdamW8bit", "init_args": {"lr": 0.1}}
    path = write(optimizer=optimizer, scheduler={"class_path": "nearby.Schedule"})
    before = set(sys.modules)
    method = load_method(read_prompt(path), path, backbone)
    imported = set(sys.modules) - before
    assert not [name for name in imported if name.startswith(("bitsandbytes", "nearby"))]
    assert "optimizer" not in method.hparams or method.hparams["optimizer"] is None


def test_a_module_is_imported_only_if_the_user_trusts_it(write, backbone, module_nearby, capsys):
    path = write(init={"class_path": "nearby.Ones", "init_args": {}})
    with pytest.raises(ValueError, match=r"names 'nearby\.Ones', .* give --trust nearby"):
        load_method(read_prompt(path), path, backbone)
    assert "nearby" not in sys.modules
    assert type(load_method(read_prompt(path), path, backbone, trust=["nearby"]).init).__name__ == "Ones"
    assert command.main(["fold", str(path)]) == 2
    assert command.main(["fold", str(path), "--trust", "nearby"]) == 0
    assert command.main(["fold", "--trust=nearby", str(path)]) == 0
    assert not trust.is_trusted("nearby.Ones")


def test_functions_of_a_trusted_module_are_refused(write, backbone, module_nearby):
    path = write(readout={"class_path": "nearby.call", "init_args": {}})
    with pytest.raises(ValueError, match=r"nearby\.call, which is not a class"):
        load_method(read_prompt(path), path, backbone, trust=["nearby"])


@pytest.mark.parametrize("module", ["os", "subprocess.x", "a-b", "", "builtins"])
def test_the_standard_library_is_never_trusted(module):
    with pytest.raises(ValueError, match="--trust expects"), trust.trust_modules([module]):
        pass


def test_an_installed_distribution_registers_its_modules(write, backbone, module_nearby, monkeypatch):
    entry = metadata.EntryPoint("mine", "nearby", "lightning_softprompt.plugins")
    monkeypatch.setattr(trust, "_of_distributions", lambda: (entry.module,))
    path = write(init={"class_path": "nearby.Ones"})
    assert type(load_method(read_prompt(path), path, backbone).init).__name__ == "Ones"


class UserMethod(SoftPromptModule):
    """A user's method."""

    def build(self, backbone):
        self.tokens = torch.nn.Parameter(torch.zeros(3, backbone.hidden_size))

    def prompt(self, batch):
        raise NotImplementedError


def test_a_class_of_the_user_loads_its_checkpoints(backbone, tmp_path):
    module = UserMethod(backbone=backbone.spec)
    module.attach(backbone)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "p.ckpt")
    assert type(UserMethod.load_from_checkpoint(tmp_path / "p.ckpt")) is UserMethod
    with pytest.raises(ValueError, match=f"give --trust {__name__}"):
        SoftPromptModule.load_from_checkpoint(tmp_path / "p.ckpt")
    assert type(SoftPromptModule.load_from_checkpoint(tmp_path / "p.ckpt", trust=[__name__])) is UserMethod


def test_the_fingerprint_is_compared_before_anything_is_built(write, backbone, load, monkeypatch):
    path = write()
    monkeypatch.setattr(PromptTuning, "__init__", lambda *_, **__: pytest.fail("built"))
    with pytest.raises(ValueError, match=r"p\.safetensors was trained on"):
        load_method(read_prompt(path), path, load("llama", seed=1))


CALLBACK = {"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": {"setup": CALL}}
GOOD = {
    "model": {"class_path": "lightning_softprompt.methods.PromptTuning", "init_args": {"length": 3}},
    "data": {
        "class_path": "lightning_softprompt.data.classification.ClassificationDataModule",
        "init_args": {"template": "{soft}{text} {target}", "labels": {"a": "good", "b": "bad"}},
    },
    "backbone": {"name": "x"},
    "trainer": {"precision": "bf16-mixed", "max_steps": 3, "callbacks": None, "logger": False},
    "run": {"folder": "/tmp/elsewhere", "keep_last": 2, "wandb": "online"},
    "seed_everything": 7,
}


def config(tmp_path, **nouns):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**GOOD, **nouns}))
    return path


def test_plain_values_are_read_from_the_config_of_a_run(tmp_path):
    read = read_run_config(config(tmp_path))
    assert read.values["model"] == GOOD["model"]
    assert read.values["data"] == GOOD["data"]
    assert read.values["trainer"] == {"precision": "bf16-mixed", "max_steps": 3, "logger": False}
    assert read.values["run"] == {"keep_last": 2}
    assert read.values["seed_everything"] == 7
    assert not read.left_out


@pytest.mark.parametrize("nouns", [
    {"model": CALL}, {"data": CALL}, {"model": {"class_path": "nearby.Mine"}}, {"backbone": CALL}, {"replicas": CALL},
    {"model": "os.system"}, {"seed_everything": "x"}, {"run": CALL}, {"trainer": [1]}, {"backbone": {"name": [CALL]}},
    {"model": {**GOOD["model"], "init_args": {"readout": CALL}}}, {"replicas": {"count": 2, "inits": [CALL, CALL]}},
])  # fmt: skip
def test_the_config_of_a_run_cannot_name_an_untrusted_class(tmp_path, nouns):
    path = config(tmp_path, **nouns)
    with nothing_happens(), pytest.raises(ValueError, match=r"config\.yaml, the config of .* is not used: .*--config"):
        read_run_config(path)


def rag(folder, **arguments):
    """Return the config of data that searches an index in a folder."""
    retriever = {
        "class_path": "lightning_softprompt.retrieval.retriever.Retriever",
        "init_args": {"index": str(folder)},
    }
    arguments = {"retriever": retriever, **arguments}
    return {"class_path": "lightning_softprompt.rag.qa_datamodule.RagQaDataModule", "init_args": arguments}


@pytest.mark.parametrize("arguments", [
    {"corpus": "corpus.jsonl"}, {"index_settings": {"encoder": "stranger/encoder"}},
    {"index_settings": {"unit": "stranger/tokenizer"}},
    {"index_settings": {"url": "http://127.0.0.1:9/stranger", "store": "qdrant"}},
])  # fmt: skip
@pytest.mark.parametrize("is_task", [False, True])
def test_the_config_of_a_run_cannot_build_an_index_or_name_its_model(tmp_path, arguments, is_task):
    data = rag(tmp_path / "index", **arguments)
    several = {
        "class_path": "lightning_softprompt.data.multitask.MultitaskDataModule",
        "init_args": {"tasks": {"a": data}},
    }
    path = config(tmp_path, data=several if is_task else data)
    with (
        nothing_happens(),
        pytest.raises(ValueError, match=r"(does not exist and would be|which you have not named yourself)"),
    ):
        read_run_config(path)


def test_the_config_of_a_run_can_search_an_existing_index(tmp_path):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "manifest.json").write_text("{}")
    data = rag(tmp_path / "index", corpus="corpus.jsonl", index_settings={"unit": "words"})
    assert read_run_config(config(tmp_path, data=data)).values["data"]["init_args"]["corpus"] == "corpus.jsonl"


@pytest.mark.parametrize("nouns", [
    {"trainer": {"devices": 5000}}, {"trainer": {"devices": "5000"}}, {"trainer": {"devices": list(range(99))}},
    {"trainer": {"num_nodes": 2}}, {"replicas": 10**9}, {"replicas": {"count": 10**9}},
    {"data": {**GOOD["data"], "init_args": {**GOOD["data"]["init_args"], "num_workers": 10**6}}},
])  # fmt: skip
def test_the_config_of_a_run_cannot_start_many_processes(tmp_path, nouns):
    with pytest.raises(ValueError, match="expected at most"):
        read_run_config(config(tmp_path, **nouns))


@pytest.mark.parametrize("setting", [
    {"callbacks": [CALLBACK]}, {"callbacks": CALL}, {"logger": CALL}, {"plugins": [CALL]}, {"profiler": CALL},
    {"strategy": CALL}, {"max_steps": CALL}, {"accelerator": "os.system"}, {"max_time": {"days": "x"}},
])  # fmt: skip
def test_trainer_settings_with_untrusted_classes_are_ignored(tmp_path, setting):
    read = read_run_config(config(tmp_path, trainer={"max_epochs": 2, **setting}))
    assert read.values["trainer"] == {"max_epochs": 2}
    assert list(read.left_out) == [f"trainer.{name}" for name in setting]


def test_callbacks_of_the_package_are_used(tmp_path):
    callback = {"class_path": "lightning_softprompt.callbacks.algorithms.pruning.Pruning", "init_args": {}}
    read = read_run_config(config(tmp_path, trainer={"callbacks": [callback]}))
    assert read.values["trainer"]["callbacks"] == [callback]


def test_a_command_reports_the_config_that_it_reads(tmp_path, caplog):
    path = config(tmp_path, trainer={"callbacks": [CALLBACK]})
    with caplog.at_level("INFO"):
        words = resume_checks.with_run_config(["test", "--init_from", str(tmp_path / "prompt.safetensors")])
    assert json.loads(words[2])["model"] == GOOD["model"]
    assert f"from {path}, except trainer.callbacks" in caplog.text
    with pytest.raises(ValueError, match=r"LambdaCallback.*--trust lightning\.pytorch\.callbacks"):
        resume_checks.with_run_config(["fit", "--ckpt_path", str(tmp_path / "checkpoints" / "last.ckpt")])


def test_folded_prompts_need_no_trust(write, backbone, tmp_path):
    assert command.main(["fold", str(write()), "--out", str(tmp_path / "folded.safetensors")]) == 0
    module = Folded(str(tmp_path / "folded.safetensors"), backbone=backbone.spec)
    module.attach(backbone)
    assert module.parts
