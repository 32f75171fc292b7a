"""Each paper's equation as a loop, and the numbers of parameters that the papers report."""

import pytest
import torch
from tiny import CLASSES, MASK, batch_of, encode_rows
from torch.testing import assert_close

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.core.backbone_spec import BackboneSpec
from lightning_softprompt.core.types import SoftPrompt
from lightning_softprompt.methods import (
    DPT,
    IDPG,
    ULPT,
    ADePT,
    Cartridge,
    DePT,
    LatePromptTuning,
    PrefixTuning,
    PromptTuning,
    PTMoE,
    PTuning,
    PTuningV2,
    ResidualPromptTuning,
    SMoP,
    Spring,
)
from lightning_softprompt.objectives.context_distillation import ContextDistillation
from lightning_softprompt.prompts.init import SampleVocabulary, Uniform, rms
from lightning_softprompt.prompts.kv_prefix import Activations, NormalKeysValues
from lightning_softprompt.prompts.networks import HypercomplexLinear
from lightning_softprompt.readouts.class_head import ClassHead

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec")
FAMILIES = ("llama", "t5", "bert")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture
def build(backbone):
    """A function that returns a method with random parameters, so that no initial value hides a term, and a batch."""

    def build(cls, **arguments):
        module = cls(backbone=backbone.spec, **arguments)
        module.attach(backbone)
        module.eval()
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn_like(parameter)
        batch = batch_of(backbone.codec)
        return module, batch, module.prompt(batch)

    return build


# Equations


def test_residual_prompt_tuning(build):
    module, _, prompt = build(ResidualPromptTuning, length=3, bottleneck=5)
    down, _, up, norm = module.networks[0]
    for p in range(3):
        inner = (down.weight @ module.tokens[p] + down.bias).clamp(min=0)
        output = up.weight @ inner + up.bias
        deviation = (output.var(unbiased=False) + norm.eps).sqrt()
        normalized = (output - output.mean()) / deviation * norm.weight + norm.bias
        assert_close(prompt.tokens[0, p], module.tokens[p] + normalized, **CLOSE)


def test_residual_prompt_tuning_with_a_network_for_each_token(build):
    module, _, prompt = build(ResidualPromptTuning, length=3, bottleneck=5, separate=True)
    for p in range(3):
        token = module.tokens[p : p + 1]
        assert_close(prompt.tokens[0, p : p + 1], token + module.networks[p](token))


def test_dpt(build):
    module, _, prompt = build(DPT, length=3, rank=2)
    for p in range(3):
        expected = sum(module.a[p, r] * module.b[r] for r in range(2))
        assert_close(prompt.tokens[0, p], expected, **CLOSE)


def test_dpt_starts_from_the_closest_matrix_of_its_rank(backbone):
    module = DPT(length=4, rank=2, init=SampleVocabulary(), backbone=backbone.spec)
    module.attach(backbone, seed=5)
    torch.manual_seed(5)
    tokens = SampleVocabulary()(backbone, 4)
    rest = torch.linalg.svdvals(tokens)[2:].pow(2).sum().sqrt()
    assert_close((module.a @ module.b - tokens).norm(), rest, **CLOSE)


def test_random_factors_have_the_scale_of_the_embeddings(backbone):
    for cls in (DPT, ULPT):
        module = cls(length=300, rank=8, backbone=backbone.spec)
        module.attach(backbone)
        size = module.prompt(batch_of(backbone.codec)).tokens.pow(2).mean().sqrt()
        assert 0.6 < size / rms(backbone) < 1.5


def test_ulpt(build):
    module, _, prompt = build(ULPT, length=3, rank=2)
    for p in range(3):
        for h in range(module.loaded.hidden_size):
            inner = sum(module.z[p, r] * module.basis[r, h] for r in range(2))
            assert_close(prompt.tokens[0, p, h], inner * module.scale[h] + module.shift[h], **CLOSE)


def test_the_basis_of_ulpt_depends_only_on_its_seed(backbone):
    modules = [ULPT(length=3, rank=2, basis_seed=seed, backbone=backbone.spec) for seed in (4, 4, 5)]
    for number, module in enumerate(modules):
        module.attach(backbone, seed=number)
        assert "basis" not in module.state_dict()
    assert torch.equal(modules[0].basis, modules[1].basis)
    assert not torch.equal(modules[0].basis, modules[2].basis)


def shifts(batch, prompt):
    """Yield the row, index among tokens that are not padding, position, and shift of every input token."""
    for b in range(len(batch)):
        positions = batch.mask[b].nonzero()[:, 0].tolist()
        for index, position in enumerate(positions):
            yield b, index, position, prompt.shift[b, position]


def test_dept(build):
    module, batch, prompt = build(DePT, length=3, rank=2, max_tokens=5, alpha=8.0)
    assert_close(prompt.tokens[0], module.tokens)
    for b, index, position, shift in shifts(batch, prompt):
        if batch.source[b, position] and index < 5:
            product = sum(module.a[index, r] * module.b[r] for r in range(2))
            assert_close(shift, product * 8 / 2**0.5, **CLOSE)
        else:
            assert not shift.any()


def test_adept(build):
    module, batch, prompt = build(ADePT, length=3, bottleneck=4)
    down, _, up = module.network
    for b, _, position, shift in shifts(batch, prompt):
        x = module.loaded.word_embeddings[batch.input_ids[b, position]]
        inner = (down.weight @ x + down.bias).clamp(min=0)
        expected = up.weight @ inner + up.bias
        assert_close(shift, expected * batch.source[b, position], **CLOSE)


@pytest.mark.parametrize("cls", [DePT, ADePT])
def test_the_update_has_a_separate_learning_rate(build, cls):
    module, *_ = build(cls, length=3, update_lr=0.5)
    optimizer = module.configure_optimizers()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    trainable = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    for name, parameter in trainable.items():
        assert rates[id(parameter)] == (0.005 if name == "tokens" else 0.5), name
    assert len(rates) == len(trainable)


def expert_probabilities(module, batch, b):
    """Return the probabilities of the experts for a row by the equation of the papers."""
    ids = batch.input_ids[b][batch.source[b]]
    mean = module.loaded.embed(ids).mean(0)
    bias = 0 if module.router.linear.bias is None else module.router.linear.bias
    scores = module.router.linear.weight @ mean + bias
    return scores.exp() / scores.exp().sum()


def test_smop(build):
    module, batch, prompt = build(SMoP, length=2, experts=3)
    for b in range(len(batch)):
        probabilities = expert_probabilities(module, batch, b)
        best = int(probabilities.argmax())
        assert_close(prompt.tokens[b], probabilities[best] * module.tokens[best], **CLOSE)


def test_pt_moe(build):
    module, batch, prompt = build(PTMoE, length=3, rank=2, experts=3)
    for b in range(len(batch)):
        probabilities = expert_probabilities(module, batch, b)
        best = int(probabilities.argmax())
        assert_close(prompt.tokens[b], probabilities[best] * module.a[best] @ module.b, **CLOSE)


def test_every_expert_contributes_to_the_gradient_of_the_router_of_pt_moe(build):
    module, batch, prompt = build(PTMoE, length=3, rank=2, experts=3)
    out = torch.randn_like(prompt.tokens)
    (prompt.tokens * out).sum().backward()
    expected = torch.zeros_like(module.router.linear.bias)
    for b in range(len(batch)):
        probabilities = expert_probabilities(module, batch, b)
        of_weights = torch.stack([(out[b] * (module.a[i] @ module.b)).sum() for i in range(3)])
        jacobian = torch.diag(probabilities) - probabilities[:, None] * probabilities
        expected += jacobian @ of_weights
    assert_close(module.router.linear.bias.grad, expected.detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cls", [SMoP, PTMoE])
def test_routing_adds_noise_only_in_training_and_reports_usage_and_balance(build, cls):
    rank = {"rank": 2} if cls is PTMoE else {}
    module, batch, prompt = build(cls, length=3, noise=0.5, **rank)
    assert torch.equal(prompt.tokens, module.prompt(batch).tokens)
    module.train()
    assert not torch.equal(module.prompt(batch).tokens, module.prompt(batch).tokens)
    probabilities = torch.stack([expert_probabilities(module, batch, b) for b in range(len(batch))])
    chosen = probabilities.argmax(1)
    for number in range(module.experts):
        assert_close(prompt.logs[f"usage/expert_{number}"], (chosen == number).float().mean())
    share = torch.stack([prompt.logs[f"usage/expert_{n}"] for n in range(module.experts)])
    mean = probabilities.mean(0)
    assert_close(prompt.penalties["balance"], module.experts * (share * mean).sum(), **CLOSE)


@pytest.mark.parametrize("family", ["llama"])
def test_spring_trains_a_number_of_first_tokens_drawn_by_the_seed_of_the_run(build):
    module, batch, full_prompt = build(Spring, length=6, candidates=[2, 3, 5])
    assert torch.equal(full_prompt.tokens[0], module.tokens)
    module.train()
    torch.manual_seed(3)
    counts = [(2, 3, 5)[int(torch.randint(3, ()))] for _ in range(40)]
    assert set(counts) == {2, 3, 5}
    torch.manual_seed(3)
    for k in counts:
        prompt = module.prompt(batch)
        assert torch.equal(prompt.tokens[0], module.tokens[:k])
    module.eval().use = 4
    module(batch).sum().backward()
    assert [bool(row.any()) for row in module.tokens.grad] == [True] * 4 + [False] * 2


@pytest.mark.parametrize(
    "arguments",
    [{"candidates": [0]}, {"candidates": [1, 7]}, {"candidates": []}, {"use": 7}, {"use": 0}, {"length": 0}],
)
def test_spring_rejects_numbers_that_are_not_from_1_to_length(arguments):
    with pytest.raises(ValueError, match="candidates and use must be numbers from 1 to length"):
        Spring(**{"length": 6, **arguments})


def lstm(cell, x, layer, reverse):
    """Return the states of one direction of one layer, computed gate by gate."""
    end = f"_l{layer}" + "_reverse" * reverse
    w, u, b, c = (getattr(cell, f"{name}{end}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    state = memory = x.new_zeros(cell.hidden_size)
    states = []
    for token in reversed(x) if reverse else x:
        i, f, g, o = (w @ token + b + u @ state + c).chunk(4)
        memory = f.sigmoid() * memory + i.sigmoid() * g.tanh()
        state = o.sigmoid() * memory.tanh()
        states.append(state)
    return torch.stack(states[::-1] if reverse else states)


def test_p_tuning(build):
    module, batch, _ = build(PTuning, blocks=(3,), encoder="lstm")
    module.tokens.data = module.tokens.double()
    module.network.double()
    prompt = module.prompt(batch)
    x, cell = module.tokens, module.network.lstm
    for layer in range(2):
        x = torch.cat([lstm(cell, x, layer, reverse) for reverse in (False, True)], dim=1)
    first, _, second = module.network.perceptron
    inner = (x @ first.weight.T + first.bias).clamp(min=0)
    assert_close(prompt.tokens[0], inner @ second.weight.T + second.bias, **CLOSE)
    assert prompt.blocks == (3,)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu", "identity"])
def test_prefix_tuning(build, activation, depth):
    module, _, prompt = build(PrefixTuning, length=3, width=6, depth=depth, activation=activation)
    act = {"tanh": torch.tanh, "relu": torch.relu, "gelu": torch.nn.functional.gelu, "identity": lambda x: x}
    for kind, layers in prompt.kv.items():
        network, tokens = module.prefixes[kind].made.network, module.prefixes[kind].made.tokens
        sites = module.loaded.attentions[kind]
        assert set(layers) == set(range(len(sites)))
        for p in range(3):
            x = tokens[p]
            for linear in network[0:-1:2]:
                x = act[activation](linear.weight @ x + linear.bias)
            x = network[-1].weight @ x + network[-1].bias
            x = x.view(len(sites), 2, sites.heads, sites.size)
            for layer, (key, value) in layers.items():
                assert_close(key[0, :, p], x[layer, 0], **CLOSE)
                assert_close(value[0, :, p], x[layer, 1], **CLOSE)


def test_the_network_of_a_prefix_is_initialized_to_the_activations(backbone):
    start = Activations("very good")
    module = PrefixTuning(length=2, width=64, init=start, backbone=backbone.spec)
    module.attach(backbone)
    for kind, prefix in module.prefixes.items():
        assert_close(prefix.made(), start(backbone, kind, 2), **CLOSE)


def test_lengths_differ_by_kind_of_attention(backbone, family):
    lengths = {"encoder": 2, "cross": 4} if family == "t5" else {"self": 3}
    module = PrefixTuning(lengths=lengths, width=None, backbone=backbone.spec)
    module.attach(backbone)
    kv = module.prompt(batch_of(backbone.codec)).kv
    assert {kind: layers[0][0].shape[2] for kind, layers in kv.items()} == lengths


@pytest.mark.parametrize("lengths", [{"elsewhere": 3}, {}, {"self": 0}])
def test_lengths_without_a_valid_attention_are_rejected(backbone, lengths):
    with pytest.raises(ValueError, match="lengths requires a number of positions for some of"):
        PrefixTuning(lengths=lengths, width=None, backbone=backbone.spec).attach(backbone)


def test_p_tuning_v2_prompts_the_selected_layers(backbone):
    module = PTuningV2(length=3, layers=[-1], init=NormalKeysValues(1.0), backbone=backbone.spec)
    module.attach(backbone)
    ((_, layers),) = module.prompt(batch_of(backbone.codec)).kv.items()
    sites = next(iter(backbone.attentions.values()))
    assert set(layers) == {len(sites) - 1}
    with pytest.raises(ValueError, match="layers must be numbers from"):
        PTuningV2(layers=[len(sites)], backbone=backbone.spec).attach(backbone)


def test_a_hypercomplex_layer_is_a_sum_of_kronecker_products():
    layer = HypercomplexLinear(6, 4, 2)
    x = torch.randn(3, 6)
    weight = sum(torch.kron(rule, block) for rule, block in zip(layer.rules, layer.blocks, strict=True))
    layer.bias.data = torch.randn(4)
    assert_close(layer(x), x @ weight.T + layer.bias, **CLOSE)
    with pytest.raises(ValueError, match="hypercomplex must divide 6 and 4, got 3"):
        HypercomplexLinear(6, 4, 3)


def states_of(family, backbone, row):
    """Return the last states of a row without its answer, as transformers computes them, without that of a mask."""
    if family == "t5":
        return backbone.model.encoder(torch.tensor([row.ids])).last_hidden_state[0]
    before, after = row.ids[: row.answers[0]], row.ids[row.answers[-1] + 1 :]
    mask = [MASK] if family == "bert" else []  # one mask replaces the answer
    ids = torch.tensor([[*before, *mask, *after]])
    states = backbone.model.base_model(ids).last_hidden_state[0]
    return torch.cat([states[: len(before)], states[len(before) + len(mask) :]])


POOL = {"first": lambda states: states[0], "last": lambda states: states[-1], "mean": lambda states: states.mean(0)}


@pytest.mark.parametrize("pool", POOL)
def test_idpg(build, family, pool):
    module, _, prompt = build(IDPG, length=2, bottleneck=4, pool=pool)
    for b, row in enumerate(encode_rows(module.loaded.codec, "{soft}{text} it was {target}")):
        h = POOL[pool](states_of(family, module.loaded, row))
        inner = torch.nn.functional.gelu(module.down.weight @ h + module.down.bias)
        assert_close(prompt.tokens[b].flatten(), module.up.weight @ inner + module.up.bias, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pool", POOL)
def test_a_class_head_reads_the_last_states(backbone, family, pool):
    head = ClassHead(backbone.codec, CLASSES, pool)
    head.build(backbone)
    scores = head(PromptedLM(backbone, lambda _: SoftPrompt()), batch_of(backbone.codec))
    for b, row in enumerate(encode_rows(backbone.codec, "{soft}{text} it was {target}")):
        h = POOL[pool](states_of(family, backbone, row))
        assert_close(scores[b], head.linear.weight @ h + head.linear.bias, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", [0, 1])
@torch.no_grad()
def test_late_tokens_enter_an_encoder_before_their_layer(load, layer):
    backbone, tokens = load("bert"), torch.randn(2, 32)
    (row, *_) = encode_rows(backbone.codec, "{text}{soft} it was {target}")
    states = backbone.model.bert.embeddings(torch.tensor([row.ids]))
    slot = row.slots[0]
    for index, block in enumerate(backbone.model.bert.encoder.layer):
        if index == layer:
            states = torch.cat([states[:, :slot], tokens[None], states[:, slot:]], dim=1)
        states = block(states)
    expected = backbone.model.cls(states)[0, [n + 2 for n in row.answers]]
    logits = backbone(backbone.codec.collate([row]), SoftPrompt(hidden={layer: tokens[None]}))[0]
    assert_close(logits, expected, **CLOSE)


@pytest.mark.parametrize("layer", [0, 1])
@torch.no_grad()
def test_late_tokens_enter_a_decoder_before_their_layer_and_the_row(load, layer):
    backbone, tokens = load("gpt2"), torch.randn(2, 32)
    (row, *_) = encode_rows(backbone.codec, "{text}{soft} it was {target}")
    gpt, ids = backbone.model.transformer, torch.tensor([row.ids])
    states = gpt.wte(ids) + gpt.wpe(2 + torch.arange(ids.shape[1]))
    for number, block in enumerate(gpt.h):
        if number == layer:
            states = torch.cat([tokens[None], states], dim=1)
        size = states.shape[1]
        mask = torch.ones(size, size, dtype=torch.bool).tril()[None, None]
        states = block(states, attention_mask=mask)
    expected = backbone.model.lm_head(gpt.ln_f(states))[0, [n + 1 for n in row.answers]]
    logits = backbone(backbone.codec.collate([row]), SoftPrompt(hidden={layer: tokens[None]}))[0]
    assert_close(logits, expected, **CLOSE)


@pytest.mark.parametrize("generator", ["state", "average", "maximum"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_late_tokens_are_generated_from_the_states_of_their_layer(backbone, build, generator):
    module, batch, prompt = build(LatePromptTuning, length=2, layer=1, generator=generator, bottleneck=4)
    questions = backbone.codec.without_answers(batch)
    states = backbone.hidden_states(questions, layer=1)
    for b in range(len(batch)):
        source_states = states[b][questions.source[b]]
        if generator == "state":
            low = (module.down.weight @ source_states.mean(0) + module.down.bias).clamp(min=0)
            expected = (module.up.weight @ low + module.up.bias).view(2, -1)
        else:
            low = source_states @ module.down.weight.T + module.down.bias
            n = len(low)
            parts = [low[: (n + 1) // 2], low[n // 2 :]]  # as adaptive pooling splits
            pooled = [part.mean(0) if generator == "average" else part.amax(0) for part in parts]
            expected = torch.stack(pooled).clamp(min=0) @ module.up.weight.T + module.up.bias
        assert_close(prompt.hidden[1][b], expected, atol=1e-4, rtol=1e-4)


def test_layers_below_a_late_prompt_have_no_gradient(load):
    backbone = load("llama")
    module = LatePromptTuning(length=2, layer=1, generator="free", backbone=backbone.spec)
    module.attach(backbone)
    batch = batch_of(backbone.codec)
    module(batch)
    outputs = []
    backbone.model.model.layers[0].register_forward_hook(lambda layer, args, output: outputs.append(output))
    module(batch)
    assert outputs
    assert not any(states.requires_grad for states in outputs)


@pytest.mark.parametrize("family", ["t5"])
def test_encoder_decoders_do_not_support_late_tokens(backbone):
    with pytest.raises(ValueError, match="encoder-decoders do not support soft tokens at a middle layer"):
        backbone(batch_of(backbone.codec), SoftPrompt(hidden={1: torch.randn(1, 2, backbone.hidden_size)}))


# Numbers of parameters


class Sites:
    """Attention layers with heads of a size."""

    def __init__(self, layers, heads, size):
        self.layers, self.heads, self.size = layers, heads, size

    def __len__(self):
        return self.layers


class Shape:
    """The attributes of a backbone that methods read to create their parameters."""

    def __init__(self, width, layers=1, stacks=("self",), heads=1):
        self.hidden_size = width
        self.spec = BackboneSpec()
        self.word_embeddings = torch.ones(2, width)
        self.embedding_scale = 1.0
        self.attentions = dict.fromkeys(stacks, Sites(layers, heads, width // heads))
        self.depth = layers


BART = {"width": 1024, "layers": 12, "stacks": ("encoder", "decoder", "cross")}
GOLDEN = [
    (PromptTuning(100, init=Uniform(0.5)), {"width": 768}, 76_800),
    (PromptTuning(5, init=Uniform(0.5)), {"width": 4096}, 20_480),
    (PrefixTuning(5, width=512, init=NormalKeysValues()), {"width": 1024, "layers": 24}, 25_744_896),
    (PrefixTuning(5, width=None, init=NormalKeysValues()), {"width": 1024, "layers": 24}, 245_760),
    (PrefixTuning(100, width=800, init=NormalKeysValues()), BART, 61_823_328),
    (PrefixTuning(200, width=800, init=NormalKeysValues()), BART, 62_130_528),
    (PrefixTuning(100, width=None, init=NormalKeysValues()), BART, 7_372_800),
    (PTuning((3, 6), "lstm"), {"width": 768}, 8_278_272),
    (PTuning((9,), "wide_lstm"), {"width": 768}, 25_395_456),
    (PTuningV2(8), {"width": 1024, "layers": 24}, 393_216),
    (PTuningV2(128), {"width": 1024, "layers": 24}, 6_291_456),
    (DePT(60, 30, 256, init=Uniform(0.5)), {"width": 768}, 76_800),
    (DePT(60, 24, 512, init=Uniform(0.5)), {"width": 768}, 76_800),
    (DPT(100, 10), {"width": 768}, 8_680),
    (ULPT(100, 2), {"width": 768}, 1736),
    (ULPT(100, 256), {"width": 768}, 27_136),
    (SMoP(5, 4, init=Uniform(0.5)), {"width": 768}, 18_432),
    (Spring(1, init=Uniform(0.5)), {"width": 4096}, 4096),
    (Spring(50, init=Uniform(0.5)), {"width": 4096}, 204_800),
    (PTMoE(40, 36, 2, init=Uniform(0.5)), {"width": 2048}, 80_706),
    (ResidualPromptTuning(10, 800, init=Uniform(0.5)), {"width": 768}, 1_239_584),
    (LatePromptTuning(5, 12), {"width": 1024, "layers": 24}, 791_680),
    (LatePromptTuning(5, 12, "average"), {"width": 1024, "layers": 24}, 263_296),
    (ResidualPromptTuning(10, 400, init=Uniform(0.5)), {"width": 768}, 624_784),
]


@pytest.mark.parametrize(("module", "shape", "count"), GOLDEN, ids=lambda value: getattr(type(value), "__name__", ""))
def test_the_number_of_parameters_is_that_of_the_paper(module, shape, count):
    module.build(Shape(**shape))
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == count


def test_the_number_of_parameters_of_adept(build):
    module, *_ = build(ADePT, length=3, bottleneck=4)
    width = module.loaded.hidden_size
    tokens, down, up = 3 * width, 4 * width + 4, 4 * width + width
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == tokens + down + up


# Cartridges


@pytest.fixture
def corpus(tmp_path):
    file = tmp_path / "corpus.txt"
    file.write_text("it is a sad story about a dog that never ends well . the film was long")
    return str(file)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_an_untrained_cartridge_is_the_beginning_of_its_corpus(backbone, corpus):
    module = Cartridge(corpus, length=6, frozen=2, backbone=backbone.spec)
    module.attach(backbone)
    sites = backbone.attentions["self"]
    trainable_positions, keys_and_values = 6 - 2, 2
    position_size = keys_and_values * len(sites) * sites.heads * sites.size
    assert module.cache.made.values.numel() == trainable_positions * position_size
    batch = batch_of(backbone.codec)
    ids = torch.tensor([[*backbone.codec.start, *backbone.codec.ids("it is a sad story")]])
    for b, row in enumerate(encode_rows(backbone.codec, "{soft}{text} it was {target}")):
        logits = backbone.model(torch.cat([ids, torch.tensor([row.ids])], dim=1)).logits[0]
        expected = logits[[ids.shape[1] + answer - 1 for answer in row.answers]]
        assert_close(module(batch)[b, : len(row.targets)], expected, **CLOSE)


def test_a_cartridge_requires_a_long_enough_corpus(backbone, corpus, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.* does not exist"):
        Cartridge(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="frozen must leave some"):
        Cartridge(corpus, length=4, frozen=4)
    long = Cartridge(corpus, length=40, backbone=backbone.spec)
    with pytest.raises(ValueError, match=r"requires a backbone with one stack|fewer than length=40"):
        long.attach(backbone)


@pytest.mark.parametrize("family", ["llama"])
def test_context_distillation(backbone):
    tokens = torch.randn(1, 2, backbone.hidden_size)
    lm = PromptedLM(backbone, lambda _: SoftPrompt(tokens=tokens))
    template = "{text} never{soft} it was {target}"
    batch = batch_of(backbone.codec, template)
    loss = ContextDistillation(top=3)(lm, batch).loss
    total, count = 0.0, 0
    for row in encode_rows(backbone.codec, template):
        context, question = row.ids[: row.slots[0]], row.ids[row.slots[0] :]
        teacher = backbone.model(torch.tensor([row.ids])).logits[0].softmax(-1)
        start = backbone.embed(torch.tensor(backbone.codec.start))
        embeds = torch.cat([start, tokens[0], backbone.embed(torch.tensor(question))])
        student = backbone.model(inputs_embeds=embeds[None]).logits[0].log_softmax(-1)
        shift = len(backbone.codec.start) + tokens.shape[1] - len(context)
        for answer in row.answers:
            probabilities, words = teacher[answer - 1].topk(3)
            total -= (probabilities * student[answer - 1 + shift, words]).sum()
            count += 1
    assert_close(loss, total / count, **CLOSE)
    late = [row._replace(slots=(len(row.ids),)) for row in batch.require_encoded()]
    with pytest.raises(ValueError, match=r"before \{target\}"):
        ContextDistillation()(lm, backbone.codec.collate(late))
