"""Methods compared with PEFT on the same weights: logits, loss and gradients of the prompt."""

from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from peft import (
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.tuners.multitask_prompt_tuning import MultitaskPromptEmbedding
from tiny import CAUSAL, TEMPLATES, batch_of, encode_rows
from torch.testing import assert_close

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.checkpoints.backbone_identity import backbone_identity
from lightning_softprompt.checkpoints.prompt_file import SavedPrompt, write_prompt
from lightning_softprompt.core.types import IGNORE, SoftPrompt
from lightning_softprompt.methods import MPT, PrefixTuning, PTuning
from lightning_softprompt.objectives.language_modeling import LanguageModeling
from lightning_softprompt.prompts.init import FromCheckpoint
from lightning_softprompt.prompts.kv_prefix import NormalKeysValues
from lightning_softprompt.prompts.networks import perceptron
from lightning_softprompt.prompts.task_factors import FromTasks, NormalFactors

P = 4
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
TEMPLATE = TEMPLATES["front"]


@pytest.fixture
def tokens(backbone):
    return torch.randn(P, backbone.hidden_size, requires_grad=True)


def build_peft(backbone, task, tokens):
    """Return a PEFT model with the prompt. For encoder-decoders it allocates 2 P rows and reads the first P."""
    config = PromptTuningConfig(task_type=task, num_virtual_tokens=P)
    model = get_peft_model(deepcopy(backbone.model), config).eval()
    weight = model.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        weight[:P] = tokens
    return model, weight


def move_before_bos(batch):
    """Move the soft tokens before BOS as PEFT does; a template has them after it."""
    batch.slots[:] = 0
    return batch


def logits_and_loss(backbone, batch, tokens):
    lm = PromptedLM(backbone, lambda _: SoftPrompt(tokens=tokens[None]))
    return lm(batch), LanguageModeling()(lm, batch).loss


@pytest.mark.parametrize("family", CAUSAL)
def test_causal_models_agree(backbone, tokens):
    model, weight = build_peft(backbone, "CAUSAL_LM", tokens)
    for row in encode_rows(backbone.codec, TEMPLATE):
        ids, answers = torch.tensor([row.ids]), torch.tensor(row.answers)
        labels = torch.full_like(ids, IGNORE)
        labels[0, answers] = torch.tensor(row.targets)
        theirs = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
        logits, loss = logits_and_loss(backbone, move_before_bos(backbone.codec.collate([row])), tokens)
        assert_close(logits, theirs.logits[:, P + answers - 1], **CLOSE)
        assert_close(loss, theirs.loss, **CLOSE)
        (gradient,) = torch.autograd.grad(loss, tokens)
        assert_close(gradient, torch.autograd.grad(theirs.loss, weight)[0], **CLOSE)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_decoders_agree(backbone, tokens):
    model, weight = build_peft(backbone, "SEQ_2_SEQ_LM", tokens)
    for row in encode_rows(backbone.codec, TEMPLATE):
        ids = torch.tensor([row.ids])
        theirs = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.tensor([row.targets]))
        logits, loss = logits_and_loss(backbone, move_before_bos(backbone.codec.collate([row])), tokens)
        assert_close(logits, theirs.logits, **CLOSE)
        assert_close(loss, theirs.loss, **CLOSE)
        (gradient,) = torch.autograd.grad(loss, tokens)
        (their_gradient,) = torch.autograd.grad(theirs.loss, weight)
        assert_close(gradient, their_gradient[:P], **CLOSE)
        assert not their_gradient[P:].any()


@pytest.mark.parametrize("family", CAUSAL)
@torch.no_grad()
def test_left_padding_changes_the_logits_of_peft_and_not_ours(backbone, tokens):
    """PEFT inserts soft tokens before the padding, so that the positions of padded rows have a gap."""
    model, _ = build_peft(backbone, "CAUSAL_LM", tokens)
    rows = encode_rows(backbone.codec, TEMPLATE)
    padded, _ = logits_and_loss(backbone, move_before_bos(batch_of(backbone.codec, TEMPLATE)), tokens)
    errors = []
    for b, row in enumerate(rows):
        ids = torch.tensor([row.ids])
        gap = torch.zeros(1, 5, dtype=torch.long)
        mask = torch.cat([gap, torch.ones_like(ids)], 1)
        padded_ids = torch.cat([gap + backbone.codec.pad_id, ids], 1)
        peft_padded = model(input_ids=padded_ids, attention_mask=mask).logits
        peft_alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        positions = P + torch.tensor(row.answers) - 1
        expected = peft_alone[:, positions]
        errors.append((peft_padded[:, 5 + positions] - expected).abs().max())
        assert_close(padded[b : b + 1, : len(positions)], expected, **CLOSE)
    assert min(errors) > 0.1  # 2 to 4; the logits have a standard deviation of 1.4


# Prefix tuning and P-tuning


def copy_weights(module, encoder, pairs):
    """Copy weights of a method to the encoder of PEFT.

    `pairs` maps a parameter of PEFT to the name of ours, or to a function that computes it from the method.
    """
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, source in pairs.items():
            weight = source(module) if callable(source) else parameters[source]
            encoder.get_parameter(name).copy_(weight)


def assert_peft_agrees(module, config, pairs, shared):
    """Compare logits and loss row by row, and the gradients of the parameters that both have in the same form."""
    backbone = module.loaded
    model = get_peft_model(deepcopy(backbone.model), config).eval()
    encoder = model.prompt_encoder["default"]
    copy_weights(module, encoder, pairs)
    parameters = dict(module.named_parameters())
    for row in encode_rows(backbone.codec, TEMPLATE):
        module.zero_grad()
        encoder.zero_grad()
        ids, answers = torch.tensor([row.ids]), torch.tensor(row.answers)
        labels = torch.full_like(ids, IGNORE)
        labels[0, answers] = torch.tensor(row.targets)
        theirs = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
        lm = module.lm()
        batch = move_before_bos(backbone.codec.collate([row]))
        shift = theirs.logits.shape[1] - ids.shape[1]  # PEFT returns logits of soft tokens, too
        assert_close(lm(batch), theirs.logits[:, shift + answers - 1], **CLOSE)
        loss = LanguageModeling()(lm, batch).loss
        assert_close(loss, theirs.loss, **CLOSE)
        loss.backward()
        theirs.loss.backward()
        for name in shared:
            assert_close(parameters[pairs[name]].grad, encoder.get_parameter(name).grad, **CLOSE)


@pytest.mark.parametrize("family", ["gpt2"])  # if heads share keys, PEFT's embeddings are as narrow as the keys
def test_projected_prefix_tuning_agrees(backbone):
    module = PrefixTuning(length=P, width=16, backbone=backbone.spec)
    module.attach(backbone)
    network = "prefixes.self.made.network"
    names = {"embedding.weight": "prefixes.self.made.tokens"}
    for parameter in ("0.weight", "0.bias", "2.weight", "2.bias"):
        names[f"transform.{parameter}"] = f"{network}.{parameter}"
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=16
    )
    assert_peft_agrees(module.eval(), config, names, names)


@pytest.mark.parametrize("family", CAUSAL)
def test_free_prefix_tuning_agrees(backbone):
    """PEFT stores [P, L * 2 * N * D], and this package [L, 2, P, N * D]."""
    module = PrefixTuning(length=P, width=None, init=NormalKeysValues(1.0), backbone=backbone.spec)
    module.attach(backbone)

    def table(module):
        return module.prefixes["self"].made.values.permute(2, 0, 1, 3).flatten(1)

    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    assert_peft_agrees(module.eval(), config, {"embedding.weight": table}, [])


@pytest.mark.parametrize("encoder", ["mlp", "wide_lstm"])
@pytest.mark.parametrize("family", CAUSAL)
def test_p_tuning_agrees(backbone, encoder):
    module = PTuning((P,), encoder, backbone=backbone.spec)
    module.attach(backbone)
    if encoder == "wide_lstm":  # PEFT's perceptron is wider than the authors'
        module.network.perceptron = perceptron([64, 64, 32])
    names = {"embedding.weight": "tokens"}
    for our_name, _ in module.named_parameters():
        if "network." not in our_name:
            continue
        name = our_name.removeprefix("network.")
        if encoder == "mlp":
            name = f"mlp_head.{name}"
        else:
            name = name.replace("lstm.", "lstm_head.").replace("perceptron", "mlp_head")
        names[name] = our_name
    config = PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=P,
        encoder_hidden_size=backbone.hidden_size,
        encoder_reparameterization_type="MLP" if encoder == "mlp" else "LSTM",
        encoder_num_layers=2,
    )
    assert_peft_agrees(module.eval(), config, names, names)


@pytest.mark.parametrize("family", ["llama"])
@pytest.mark.parametrize("rank", [1, 3])
def test_multitask_prompts_agree(backbone, rank):
    names = ("a", "b", "c")
    module = MPT(length=P, rank=rank, classes_by_task=dict.fromkeys(names), backbone=backbone.spec)
    module.attach(backbone)
    config = MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, num_tasks=3, num_ranks=rank, token_dim=backbone.hidden_size,
        num_transformer_submodules=1, prompt_tuning_init="RANDOM",
    )  # fmt: skip
    theirs = MultitaskPromptEmbedding(config, backbone.model.get_input_embeddings())
    with torch.no_grad():
        for factors in (module.u, module.v):
            for factor in factors.values():
                factor.copy_(torch.randn_like(factor))
        theirs.embedding.weight.copy_(module.shared)
        theirs.prefix_task_cols.copy_(torch.stack([module.u[name] for name in names]))
        theirs.prefix_task_rows.copy_(torch.stack([module.v[name] for name in names]))
    tasks = torch.tensor([2, 0, 0, 1])
    out = torch.randn(4, P, backbone.hidden_size)
    tokens = module.prompt(replace(batch_of(backbone.codec), task_ids=tasks)).tokens
    expected = theirs(torch.arange(P).expand(4, P), tasks)
    assert_close(tokens, expected, **CLOSE)
    for result in (tokens, expected):
        (result * out).sum().backward()
    assert_close(module.shared.grad, theirs.embedding.weight.grad, atol=1e-4, rtol=1e-4)
    for number, name in enumerate(names):
        assert_close(module.u[name].grad, theirs.prefix_task_cols.grad[number], atol=1e-4, rtol=1e-4)
        assert_close(module.v[name].grad, theirs.prefix_task_rows.grad[number], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama"])
@pytest.mark.parametrize(
    ("peft_init", "start"),
    [
        ("AVERAGE_SOURCE_TASKS", FromTasks),
        ("EXACT_SOURCE_TASK", partial(FromTasks, task="b")),
        ("ONLY_SOURCE_SHARED", lambda _: NormalFactors()),
    ],
)
def test_multitask_prompts_are_initialized_from_sources_as_in_peft(backbone, tmp_path, peft_init, start):
    names, path = ("a", "b", "c"), tmp_path / "prompt.safetensors"
    source = MPT(length=P, rank=2, classes_by_task=dict.fromkeys(names), backbone=backbone.spec)
    source.attach(backbone)
    with torch.no_grad():
        for parameter in (source.shared, *source.u.values(), *source.v.values()):
            parameter.copy_(torch.randn_like(parameter))
    write_prompt(path, SavedPrompt(source.state_dict(), backbone_identity(backbone), dict(source.hparams)))
    stacked = {
        "prompt_embeddings": source.shared.detach(),
        "prefix_task_cols": torch.stack([source.u[name].detach() for name in names]),
        "prefix_task_rows": torch.stack([source.v[name].detach() for name in names]),
    }
    torch.save(stacked, tmp_path / "peft.bin")
    config = MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, num_tasks=1, num_ranks=2, token_dim=backbone.hidden_size,
        num_transformer_submodules=1, prompt_tuning_init=peft_init, prompt_tuning_init_task=1,
        prompt_tuning_init_state_dict_path=str(tmp_path / "peft.bin"),
    )  # fmt: skip
    expected = MultitaskPromptEmbedding(config, backbone.model.get_input_embeddings())
    target = MPT(
        length=P, rank=2, init=FromCheckpoint(str(path), name="shared"), start=start(str(path)),
        backbone=backbone.spec,
    )  # fmt: skip
    target.attach(backbone)
    if peft_init == "ONLY_SOURCE_SHARED":  # both draw random factors: check their scale, then set them equal
        for peft_factor, factors in ((expected.prefix_task_cols, target.u), (expected.prefix_task_rows, target.v)):
            factor = factors["task"].detach()
            assert 0.01 < factor.std() < 0.04
            assert 0.01 < peft_factor.std() < 0.04
            peft_factor.data[0] = factor
    tokens = target.prompt(batch_of(backbone.codec)).tokens
    assert_close(tokens, expected(torch.arange(P)[None], torch.tensor([0])), **CLOSE)
    assert not torch.equal(tokens[0], source.shared)
