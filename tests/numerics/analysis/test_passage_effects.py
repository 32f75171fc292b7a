"""Effects of passages on every family, against one forward pass for each subset, differences, and attention weights."""

import pytest
import torch
from tiny import CAUSAL, SEQ2SEQ
from torch.testing import assert_close

from lightning_softprompt.analysis.context_cite import linear_effects
from lightning_softprompt.analysis.passage_effects import SOFT_TOKENS, PassageEffects, mean_over_heads, passage_masses
from lightning_softprompt.analysis.shapley import members_of, subsets_to_score
from lightning_softprompt.backbones.tokenization.token_names import NamedPiece, name_tokens
from lightning_softprompt.core.types import Answer, Slot, SoftPrompt, Text

FAMILIES = (*CAUSAL, *SEQ2SEQ)
PASSAGES = ["a warm and funny film", "the dog is sad", "all is well that ends well", "one text"]
ANSWERS = ["very sad", "a funny film"]


class Row:
    """A question with passages before the soft tokens, as `rag.passage_ablation.AblationRow`."""

    def __init__(self, codec, passages=PASSAGES, question="is it long ?"):
        self.codec, self.passages, self.question = codec, passages, question

    @property
    def num_passages(self):
        return len(self.passages)

    def encode(self, arrangement, answer, question=None):
        pieces = [
            NamedPiece(Text(f"{self.passages[index]} , "), f"passage {index + 1}")
            for index in arrangement
            if index is not None and self.passages[index]
        ]
        pieces += [NamedPiece(Slot()), NamedPiece(Text(question or self.question), "question")]
        pieces += [NamedPiece(Text(" :")), NamedPiece(Answer(" "))]
        row = self.codec.encode([named.piece for named in pieces], answer, None, True)
        return row, name_tokens(self.codec, pieces, row)


def tokens_of(backbone):
    tokens = torch.randn(1, 3, backbone.hidden_size)
    return lambda batch: SoftPrompt(tokens=tokens)


def tokens_by_row(backbone):
    """Soft tokens that depend on the text of each row."""

    def prompt(batch):
        mean = (backbone.embed(batch.input_ids) * batch.source[..., None]).sum(1, keepdim=True)
        return SoftPrompt(tokens=mean.expand(-1, 2, -1))

    return prompt


def no_prompt(backbone):
    return lambda batch: SoftPrompt()


def keys_and_values(backbone):
    pairs = {}
    for kind, sites in backbone.attentions.items():
        shape = (1, sites.heads, 2, sites.size)
        pairs[kind] = {layer: (torch.randn(shape), torch.randn(shape)) for layer in range(len(sites))}
    return lambda batch: SoftPrompt(kv=pairs)


PROMPTS = [tokens_of, tokens_by_row, no_prompt, keys_and_values]


def log_probability(backbone, prompt, row, arrangement, answer):
    """log p(answer) of one row from the logits of one forward pass."""
    batch = backbone.codec.collate([row.encode(arrangement, answer)[0]])
    logits = backbone(batch, prompt(batch))
    return logits.double().log_softmax(-1).gather(2, batch.targets[..., None]).sum()


@torch.no_grad()
@pytest.mark.parametrize("make_prompt", PROMPTS)
@pytest.mark.parametrize("subsets_per_batch", [1, 2, 16])
def test_batches_of_subsets_have_the_scores_of_single_passes(backbone, make_prompt, subsets_per_batch):
    row, prompt = Row(backbone.codec, PASSAGES[:3]), make_prompt(backbone)
    subsets = subsets_to_score(3)
    scores = PassageEffects(backbone, prompt, subsets_per_batch).score_subsets(row, ANSWERS, subsets)
    assert scores.shape == (8, 2)
    for subset, scores_of_subset in zip(subsets, scores, strict=True):
        arrangement = [index for index, is_member in enumerate(members_of(subset, 3)) if is_member]
        expected = [log_probability(backbone, prompt, row, arrangement, answer) for answer in ANSWERS]
        assert_close(scores_of_subset, torch.stack(expected), atol=1e-5, rtol=1e-5)
    assert scores.std(0).min() > 0.01


@pytest.mark.parametrize("make_prompt", PROMPTS)
def test_effects_add_up_and_an_empty_passage_has_none(backbone, make_prompt):
    row = Row(backbone.codec, [*PASSAGES[:2], "", PASSAGES[3]])
    for effects in PassageEffects(backbone, make_prompt(backbone)).measure(row, ANSWERS):
        assert sum(effects.shapley) == pytest.approx(effects.log_p_all - effects.log_p_none, abs=1e-6)
        assert effects.shapley[2] == pytest.approx(0, abs=1e-5)
        assert effects.leave_one_out[2] == pytest.approx(0, abs=1e-5)
        assert effects.gradient[2] == 0
        assert min(abs(effects.shapley[index]) for index in (0, 1, 3)) > 1e-3
        assert effects.num_tokens == len(effects.text.split()) + 1
        assert effects.effects == effects.shapley


def test_many_passages_have_linear_and_leave_one_out_effects(load):
    backbone = load("llama")
    row = Row(backbone.codec, ["a", "dog", "is", "sad", "and", "funny", ""])
    prompt = tokens_of(backbone)
    (effects,) = PassageEffects(backbone, prompt).measure(row, ANSWERS[:1])
    assert effects.shapley is None
    assert effects.interactions is None
    assert effects.effects == effects.linear
    subsets = subsets_to_score(7)
    scores = PassageEffects(backbone, prompt, 16).score_subsets(row, ANSWERS[:1], subsets)[:, 0].tolist()
    expected = linear_effects(dict(zip(subsets, scores, strict=True)), 7, effects.num_tokens)
    assert effects.linear == pytest.approx(expected, abs=1e-4)
    assert max(map(abs, effects.linear)) > 1e-2
    with torch.no_grad():
        complete = log_probability(backbone, prompt, row, range(7), ANSWERS[0])
        for index in range(7):
            rest = [other for other in range(7) if other != index]
            expected = complete - log_probability(backbone, prompt, row, rest, ANSWERS[0])
            assert effects.leave_one_out[index] == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("make_prompt", PROMPTS)
def test_gradients_are_finite_differences(load, family, make_prompt):
    """The embeddings of a passage are scaled up and down, in the embedding module of the model."""
    backbone = load(family, packed=False).double()
    row, prompt = Row(backbone.codec), make_prompt(backbone)
    (effects,) = PassageEffects(backbone, prompt).measure(row, ANSWERS[:1])
    encoded, names = row.encode(range(4), ANSWERS[0])
    batch = backbone.codec.collate([encoded])
    constant = prompt(batch)
    embed = backbone.embed
    step = 1e-5 if family == "t5" else 1e-3  # the activation of T5 has kinks; the norms of Llama compute in float32

    @torch.no_grad()
    def score(factor, name):
        factors = torch.tensor([factor if other == name else 1.0 for other in names])
        backbone.embed = lambda ids: embed(ids) * factors[None, :, None].double()
        try:
            logits = backbone(batch, constant)
            return float(logits.log_softmax(-1).gather(2, batch.targets[..., None]).sum())
        finally:
            del backbone.embed

    for number, gradient in enumerate(effects.gradient, start=1):
        name = f"passage {number}"
        difference = (score(1 + step, name) - score(1 - step, name)) / (2 * step)
        assert gradient == pytest.approx(difference, abs=5e-4, rel=1e-3)
    assert max(map(abs, effects.gradient)) > 0.01


@torch.no_grad()
@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("arrangement", [[0, 1, 2, 3], [3, 2, 1, 0], [None, 1, None, 3]])
def test_attention_of_parts_is_that_of_transformers(load, family, arrangement):
    backbone = load(family)
    row, prompt = Row(backbone.codec), tokens_of(backbone)
    effects = PassageEffects(backbone, prompt)
    masses, num_tokens = effects.attention(row, arrangement, ANSWERS[0])
    bare_masses, _ = effects.attention(row, arrangement, ANSWERS[0], question="what ?", is_prompted=False)
    check_attention(backbone, row, prompt, arrangement, masses)
    check_attention(backbone, row, no_prompt(backbone), arrangement, bare_masses, "what ?")
    assert num_tokens[SOFT_TOKENS] == 3
    assert num_tokens["passage 2"] == len(PASSAGES[1].split()) + 1
    means = passage_masses(mean_over_heads(masses), 4)
    assert [mean > 0 for mean in means] == [index in arrangement for index in range(4)]


def check_attention(backbone, row, prompt, arrangement, masses, question=None):
    """Compares masses with the attention weights that transformers returns in its eager implementation."""
    encoded, names = row.encode(arrangement, ANSWERS[0], question)
    batch = backbone.codec.collate([encoded])
    rows = backbone.splice(batch, prompt(batch))
    backbone.model.set_attn_implementation("eager")
    out = backbone.model(inputs_embeds=rows.embeds, output_attentions=True)
    num_soft = rows.embeds.shape[1] - len(names)
    spliced_names = [([SOFT_TOKENS] * num_soft + names)[position] for position in rows.order[0].tolist()]
    columns = rows.columns[0][list(encoded.answers)] - 1
    for number, layer in enumerate(out.attentions):
        weights = layer[0][:, columns].mean(1)  # [heads, K]
        totals = torch.zeros(len(weights))
        for name, by_layer in masses.items():
            keys = [key for key, other in enumerate(spliced_names) if other == name]
            by_head = torch.tensor(by_layer[number])
            assert_close(by_head, weights[:, keys].sum(1), atol=1e-5, rtol=0)
            totals += by_head
        assert_close(totals, torch.ones(len(weights)), atol=1e-5, rtol=0)
    if backbone.path is not None:
        backbone.path.enter()


@torch.no_grad()
def test_only_methods_with_an_effect_count_as_prompts(load):
    backbone = load("llama")
    row = Row(backbone.codec)
    assert PassageEffects(backbone, tokens_of(backbone)).has_prompt(row, ANSWERS[0])
    assert PassageEffects(backbone, keys_and_values(backbone)).has_prompt(row, ANSWERS[0])
    assert not PassageEffects(backbone, no_prompt(backbone)).has_prompt(row, ANSWERS[0])
