"""Fixtures of all tests: tiny backbones, a table of methods, and isolation from the user's environment."""

import gc
import os
import random
import tempfile
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from itertools import count, product
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import tiny
import torch

from lightning_softprompt.backbones.loading import load_backbone
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.methods import (
    ATTEMPT,
    DPT,
    IDPG,
    MPT,
    ULPT,
    ADePT,
    CoCoOp,
    Combined,
    ContextAware,
    CoOp,
    DePT,
    LatePromptTuning,
    LoRA,
    MaPLe,
    NewTokens,
    PrefixTuning,
    PromptTuning,
    PTMoE,
    PTuning,
    PTuningV2,
    ResidualPromptTuning,
    SMoP,
    Spring,
    TransPrompt,
    VisualPromptTuning,
    XPrompt,
)
from lightning_softprompt.prompts.init import FromText, Normal, SampleVocabulary, Uniform
from lightning_softprompt.prompts.kv_prefix import NormalKeysValues
from lightning_softprompt.readouts.class_head import ClassHead

os.environ["HF_HUB_OFFLINE"] = "1"  # for processes that tests start
huggingface_hub.constants.HF_HUB_OFFLINE = True  # for this process, which has read the variable already
torch.set_num_threads(1)
# Kernels compiled for another instruction set abort the process, so each instruction set has a separate cache.
KERNELS = Path(tempfile.gettempdir(), f"torchinductor-{torch.backends.cpu.get_cpu_capability()}")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(KERNELS))
# A bfloat16 product compiles a kernel of several megabytes for each shape. By default, caches hold 1,024 of them.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
os.environ.setdefault("LRU_CACHE_CAPACITY", "16")
os.environ["WANDB_X_SAVE_REQUIREMENTS"] = "false"  # the list of installed packages takes 0.1 s in each run

NUMBERS = count()
RUN_VARIABLES = (
    "SOFTPROMPT_RUN_FOLDER",
    "SOFTPROMPT_RUN_PROCESS",
    "LOCAL_RANK",
    "RANK",
    "NODE_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


@dataclass(frozen=True)
class Method:
    """A method as the contract suite tests it.

    Args:
        cls: Class of the method.
        arguments: Arguments of the class.
        families: Families of backbones that the method supports.
        folds: Whether its prompt is the same for every row.
        masks: Names of tensors that its state has in addition to the parameters.
    """

    cls: type
    arguments: dict[str, Any] = field(default_factory=dict)
    families: tuple[str, ...] = (*tiny.FAMILIES, *tiny.CONTRASTIVE)
    folds: bool = True
    masks: frozenset[str] = frozenset()

    def on(self, backbone, **common):
        """Return the method attached to a backbone, or to the same one loaded again if it changes the backbone."""
        module = self.cls(**{**deepcopy(self.arguments), **common, "backbone": backbone.spec})
        if module.changes_backbone:
            module.configure_model()
        else:
            module.attach(backbone)
        return module.eval()


SOURCES = [FromText("is this film good ?"), SampleVocabulary()]
LATE = (*tiny.CAUSAL, *tiny.MASKED)
PROMPT = PromptTuning(length=3)
VALUES = ("v_proj", "c_attn", "v", "value")  # names of value projections; a query of one key ignores the others
METHODS = {  # a new method is a new row
    "prompt_tuning": Method(PromptTuning, {"length": 3}),
    "prompt_tuning_uniform": Method(PromptTuning, {"length": 1, "init": Uniform()}),
    "prompt_tuning_text": Method(PromptTuning, {"length": 7, "init": FromText("is this film good ?")}),
    "prefix_tuning": Method(PrefixTuning, {"length": 3, "width": 16}),
    "prefix_tuning_free": Method(PrefixTuning, {"length": 3, "width": None}),
    "p_tuning": Method(PTuning, {"blocks": (3,)}),
    "p_tuning_mlp": Method(PTuning, {"blocks": (2,), "encoder": "mlp"}),
    "p_tuning_v2": Method(PTuningV2, {"length": 3, "init": NormalKeysValues(0.5)}),
    "p_tuning_v2_last_layer": Method(PTuningV2, {"length": 2, "layers": [-1], "width": 8}),
    "p_tuning_v2_head": Method(
        PTuningV2, {"length": 2, "init": NormalKeysValues(0.5), "readout": ClassHead}, tiny.FAMILIES
    ),
    "residual": Method(ResidualPromptTuning, {"length": 3, "bottleneck": 8}),
    "residual_separate": Method(ResidualPromptTuning, {"length": 2, "bottleneck": 8, "separate": True}),
    "dpt": Method(DPT, {"length": 4, "rank": 2}),
    "dpt_singular": Method(DPT, {"length": 4, "rank": 2, "init": SampleVocabulary()}),
    "ulpt": Method(ULPT, {"length": 4, "rank": 2}),
    "dept": Method(DePT, {"length": 3, "rank": 2, "max_tokens": 5}, folds=False),
    "adept": Method(ADePT, {"length": 3, "bottleneck": 4}, folds=False),
    "smop": Method(SMoP, {"length": 2, "experts": 2}, folds=False),
    "spring": Method(Spring, {"length": 4, "use": 3}),
    "spring_few": Method(Spring, {"length": 3, "candidates": [1, 3]}),
    "pt_moe": Method(PTMoE, {"length": 3, "rank": 2}, folds=False),
    "xprompt": Method(XPrompt, {"length": 3, "pieces": 4}, masks=frozenset({"kept_tokens", "kept_pieces"})),
    "context_aware": Method(ContextAware, {"classes": tiny.CLASSES}, tiny.CAUSAL),
    "idpg": Method(IDPG, {"length": 2, "bottleneck": 4}, folds=False),
    "idpg_hypercomplex": Method(IDPG, {"length": 2, "bottleneck": 4, "hypercomplex": 4, "pool": "last"}, folds=False),
    "mpt": Method(MPT, {"length": 3}),
    "mpt_rank": Method(MPT, {"length": 2, "rank": 2, "init": Uniform()}),
    "attempt": Method(
        ATTEMPT, {"sources": SOURCES, "length": 3, "bottleneck": 4}, folds=False, masks=frozenset({"sources"})
    ),
    "attempt_trained": Method(
        ATTEMPT, {"sources": SOURCES, "length": 2, "bottleneck": 4, "train_sources": True}, folds=False
    ),
    "transprompt": Method(TransPrompt, {"length": 3}),
    "transprompt_mlp": Method(TransPrompt, {"length": 2, "share": 0.5, "recurrent": False}),
    "late_free": Method(LatePromptTuning, {"length": 3, "layer": 1, "generator": "free"}, LATE),
    "late_state": Method(LatePromptTuning, {"length": 2, "bottleneck": 4}, LATE, folds=False),
    "late_average": Method(
        LatePromptTuning, {"length": 2, "layer": 0, "generator": "average", "bottleneck": 4}, LATE, folds=False
    ),
    "late_maximum": Method(LatePromptTuning, {"length": 2, "generator": "maximum", "bottleneck": 4}, LATE, folds=False),
    "combined_lora": Method(Combined, {"parts": [PROMPT, LoRA(rank=2, layers=VALUES)]}, folds=False),
    "combined_new_tokens": Method(
        Combined,
        {"parts": [PROMPT, NewTokens(tokens=["good", "film", "is"], update="all")]},
        tiny.FAMILIES,
        folds=False,
    ),
    "combined_prefix": Method(Combined, {"parts": [PROMPT, PrefixTuning(length=2, width=16)]}),
    "combined_prompts": Method(Combined, {"parts": [PROMPT, PTuning(blocks=(2,), encoder="mlp")]}),
    "combined_dept": Method(
        Combined, {"parts": [DePT(length=2, rank=2, max_tokens=5), IDPG(length=2, bottleneck=4)]}, folds=False
    ),
    "coop": Method(CoOp, {"length": 3, "init": Normal()}, tiny.CONTRASTIVE),
    "coop_specific": Method(
        CoOp, {"length": 2, "class_specific": True, "init": Normal(), "classes": tiny.CLASSES}, tiny.CONTRASTIVE, False
    ),
    "cocoop": Method(CoCoOp, {"length": 2, "reduction": 2}, tiny.CONTRASTIVE, folds=False),
    "vpt": Method(VisualPromptTuning, {"length": 2}, tiny.CONTRASTIVE),
    "vpt_deep": Method(VisualPromptTuning, {"length": 2, "layers": None}, tiny.CONTRASTIVE),
    "maple": Method(MaPLe, {"layers": 2}, tiny.CONTRASTIVE),
    "combined_images": Method(
        Combined, {"parts": [CoOp(length=2), VisualPromptTuning(length=2, layers=2)]}, tiny.CONTRASTIVE
    ),
}


def pytest_collection_finish():
    """Exclude what imports and collection created from garbage collection, which is then fast and frequent."""
    gc.collect()
    gc.freeze()


KINDS = ("prompt_tuning", "prefix_tuning", "dept", "idpg", "late_state")  # one method for each kind of prompt


def pytest_generate_tests(metafunc):
    """Run tests of backbones on every family or on FAMILIES of the module, and tests of methods on supported ones.

    The mark `rotate` adds arguments to a test of methods. A backbone reads only the prompt of a method, so one method
    per kind of prompt runs with all combinations of their values. Each other method runs with one combination on each
    family: the next family and the next method take the next combination.
    """
    families = getattr(metafunc.module, "FAMILIES", tiny.FAMILIES)
    rotation = metafunc.definition.get_closest_marker("rotate")
    if "method" in metafunc.fixturenames:
        cases = _method_cases(metafunc.definition.get_closest_marker("methods"), families)
        names = ("method", "family")
        if rotation is not None:
            cases = _rotate(cases, list(product(*rotation.kwargs.values())))
            names = (*names, *rotation.kwargs)
        metafunc.parametrize(names, cases.values(), ids=cases.keys())
    elif "family" in metafunc.fixturenames and not _parametrizes_family(metafunc):
        metafunc.parametrize("family", families)


def _method_cases(mark, families):
    """Return methods with families by name: all of METHODS, or the selection of the mark `methods`."""
    names = METHODS if mark is None else mark.args
    selected = families if mark is None else mark.kwargs.get("families", families)
    cases = {}
    for name in names:
        method = METHODS[name]
        for family in method.families:
            if family in families and family in selected:
                cases[f"{name}-{family}"] = (method, family)
    return cases


def _rotate(cases, combinations):
    """Return the cases with all combinations for the methods of KINDS, and with one combination for each other one."""
    methods = list(METHODS)
    rotated = {}
    for case, (method, family) in cases.items():
        name = case.removesuffix(f"-{family}")
        turn = methods.index(name) + method.families.index(family)
        selected = combinations if name in KINDS else [combinations[turn % len(combinations)]]
        for values in selected:
            rotated["-".join([case, *values])] = (method, family, *values)
    return rotated


def _parametrizes_family(metafunc):
    for mark in metafunc.definition.iter_markers("parametrize"):
        names = mark.args[0]
        if "family" in (names.split(",") if isinstance(names, str) else names):
            return True
    return False


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A function from a family (and the seed of the weights) to the folder of a tiny backbone."""
    return cache(lambda family, seed=0: tiny.save(family, tmp_path_factory.mktemp(f"{family}-{seed}"), seed))


@pytest.fixture(scope="session")
def load(tiny_folder):
    """A function from a family to a new backbone; further arguments go to BackboneSpec."""

    def load(family, seed=0, **spec):
        return load_backbone(BackboneSpec(name=str(tiny_folder(family, seed)), **spec))

    return load


@pytest.fixture(scope="session")
def load_once(load):
    """A function like `load` whose backbones are shared by tests that do not change them."""
    return cache(load)


@pytest.fixture
def backbone(family, load_once):
    """A tiny backbone of each family, shared by tests that do not change it."""
    return load_once(family)


@pytest.fixture
def classes():
    """Three classes; the first has two label words."""
    return tiny.CLASSES


@pytest.fixture
def rows():
    """Six labeled rows."""
    labels = ("positive", "negative", "negative", "positive", "neutral", "neutral")
    texts = (*tiny.TEXTS, "that dog is one dog", "what ?")
    return [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]


@pytest.fixture(autouse=True)
def isolate_test(request, monkeypatch, tmp_path_factory):
    """Restore random state, precision and environment after each test; slow tests share the user's cache."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / f"cache-{next(NUMBERS)}"))
    for name in RUN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    dtype = torch.get_default_dtype()
    torch_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    torch.set_rng_state(torch_state)
    random.setstate(python_state)
    np.random.set_state(numpy_state)
    if "WANDB_SERVICE" not in os.environ:  # the process of W&B that it named has ended
        before.pop("WANDB_SERVICE", None)
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)
