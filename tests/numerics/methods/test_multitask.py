"""Methods for several tasks compared with loops, and batches of several tasks compared with single tasks."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny import CLASSES, SEQ2SEQ, TEXTS, batch_of, real
from torch.testing import assert_close

from lightning_softprompt.backbones.prompted_lm import PromptedLM
from lightning_softprompt.checkpoints.backbone_identity import backbone_identity
from lightning_softprompt.checkpoints.prompt_file import SavedPrompt, write_prompt
from lightning_softprompt.cli.commands.fold import fold
from lightning_softprompt.core.types import IGNORE
from lightning_softprompt.methods import (
    ATTEMPT,
    MPT,
    DePT,
    Folded,
    PrefixTuning,
    PromptBank,
    PromptTuning,
    SMoP,
    TransPrompt,
)
from lightning_softprompt.objectives.distillation import Distillation, Teacher
from lightning_softprompt.objectives.language_modeling import LanguageModeling
from lightning_softprompt.prompts.init import FromCheckpoint, FromText, SampleVocabulary, Uniform
from lightning_softprompt.prompts.task_factors import FromTasks, NormalFactors
from lightning_softprompt.readouts.class_head import ClassHead

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec")
FAMILIES = ("llama", "t5", "bert")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
TASKS = dict.fromkeys(("mood", "length", "tone"))
SOURCES = (FromText("is this film good ?"), SampleVocabulary())


def randomize(module, scale=1.0):
    """Sets every parameter to random values, so that no initial value hides a term."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * scale)
    return module


@pytest.fixture
def build(backbone):
    def make(cls, tasks=TASKS, **arguments):
        module = cls(backbone=backbone.spec, classes_by_task=tasks, **arguments)
        module.attach(backbone)
        return module.eval()

    return make


@pytest.fixture
def save(backbone, tmp_path):
    """A function that saves the prompt of a method and returns the path."""

    def save(module, name="prompt"):
        path = tmp_path / f"{name}.safetensors"
        write_prompt(path, SavedPrompt(module.state_dict(), backbone_identity(backbone), dict(module.hparams)))
        return str(path)

    return save


def batch_of_tasks(codec, *tasks, **options):
    return replace(batch_of(codec, **options), task_ids=torch.tensor(tasks))


# MPT


@pytest.mark.parametrize("rank", [1, 2])
def test_mpt(build, backbone, rank):
    module = randomize(build(MPT, length=3, rank=rank))
    prompt = module.prompt(batch_of_tasks(backbone.codec, 2, 0, 1, 2))
    for b, name in enumerate(("tone", "mood", "length", "tone")):
        u, v = module.u[name], module.v[name]
        for p in range(3):
            for h in range(backbone.hidden_size):
                factor = sum(u[p, r] * v[r, h] for r in range(rank))
                assert_close(prompt.tokens[b, p, h], module.shared[p, h] * factor, **CLOSE)


def test_rows_of_one_task_share_one_prompt(build, backbone):
    module = randomize(build(MPT, length=3))
    one = module.prompt(batch_of_tasks(backbone.codec, 1, 1, 1, 1)).tokens
    mixed = module.prompt(batch_of_tasks(backbone.codec, 1, 0, 1, 2)).tokens
    assert one.shape[0] == 1
    assert_close(one[0], mixed[0])


def test_the_prompt_of_a_task_is_initially_the_shared_prompt_and_not_near_zero(build, backbone, family):
    batch = batch_of_tasks(backbone.codec, 0, 1, 2, 0)
    ours = build(MPT, length=20, init=Uniform())
    ratio = {}
    for name, start in (("ours", None), ("peft", NormalFactors(0.02))):
        module = build(MPT, length=20, init=Uniform(), start=start)
        module.shared.data = ours.shared.data.clone()
        LanguageModeling()(module.lm(), batch).loss.backward()
        row_norm = module.prompt(batch).tokens.detach().norm() / 2  # the prompts of four rows are equally large
        ratio[name] = float(row_norm / module.shared.detach().norm()), float(module.shared.grad.norm())
    assert_close(ours.prompt(batch).tokens[1], ours.shared)
    assert ratio["ours"][0] == pytest.approx(1.0)
    assert ratio["peft"][0] == pytest.approx(0.02**2, rel=0.5)
    if family == "bert":  # BERT adds positions to soft tokens; the norms of other families undo a small scale
        assert ratio["peft"][1] < 0.01 * ratio["ours"][1]


def test_a_higher_rank_does_not_change_the_initial_prompt_and_learns(build, backbone):
    module = build(MPT, length=3, rank=3)
    batch = batch_of_tasks(backbone.codec, 0, 1, 2, 0)
    assert_close(module.prompt(batch).tokens, module.shared.expand(4, -1, -1))
    LanguageModeling()(module.lm(), batch).loss.backward()
    for name in TASKS:
        assert (module.v[name].grad.abs().sum(1) > 0).all()


def test_target_tasks_start_from_the_mean_of_source_factors_or_from_one_source(build, backbone, save):
    source = randomize(build(MPT, length=3, rank=2))
    path = save(source)
    shared = FromCheckpoint(path, "shared")
    target = build(MPT, {"new": None, "other": None}, length=3, rank=2, init=shared, start=FromTasks(path))
    assert_close(target.shared, source.shared)
    for letter in "uv":
        mean = sum(getattr(source, letter)[name] for name in TASKS) / 3
        assert_close(getattr(target, letter)["new"], mean)
        assert_close(getattr(target, letter)["other"], mean)
    alone = build(MPT, None, length=3, rank=2, init=shared, start=FromTasks(path, "length"))
    batch = batch_of_tasks(backbone.codec, 1, 1, 1, 1)
    assert_close(alone.prompt(batch_of(backbone.codec)).tokens, source.prompt(batch).tokens)


def test_missing_factors_are_refused(build, save):
    path = save(randomize(build(MPT, length=3)))
    with pytest.raises(ValueError, match=r"tasks \['length', 'mood', 'tone'\], expected taste"):
        build(MPT, length=3, start=FromTasks(path, "taste"))
    with pytest.raises(ValueError, match="set length to 3 and rank to 1"):
        build(MPT, length=4, start=FromTasks(path))
    with pytest.raises(ValueError, match=r"tasks \[\], expected at least one task"):
        build(MPT, length=3, start=FromTasks(save(build(PromptTuning, length=3), "plain")))


@pytest.mark.parametrize("cls", [MPT, ATTEMPT])
def test_rows_need_task_ids_if_there_are_several_tasks(build, backbone, cls):
    module = build(cls, **({"sources": SOURCES} if cls is ATTEMPT else {}))
    with pytest.raises(ValueError, match=r"have no task_ids to select one of the tasks \['mood', 'length', 'tone'\]"):
        module.prompt(batch_of(backbone.codec))
    with pytest.raises(ValueError, match="task id 3 is out of range for 3 tasks"):
        module.prompt(batch_of_tasks(backbone.codec, 0, 3, 1, 2))


@pytest.mark.parametrize(("cls", "group"), [(MPT, "factors"), (ATTEMPT, "attention")])
def test_the_parameters_of_tasks_have_a_separate_learning_rate(build, cls, group):
    arguments = {"sources": SOURCES, "attention_lr": 0.5} if cls is ATTEMPT else {"factors_lr": 0.5}
    module = build(cls, **arguments)
    optimizer = module.configure_optimizers()
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    prefixes = ("attention",) if cls is ATTEMPT else ("u.", "v.")
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == (0.5 if name.startswith(prefixes) else 0.005), name
    assert [g.get("name") for g in optimizer.param_groups] == ["prompt", group]


def test_the_prompt_of_one_task_can_be_folded_with_its_head(build, backbone, save, tmp_path):
    tasks = {"mood": CLASSES, "tone": CLASSES}
    module = randomize(build(MPT, tasks, length=3, readout=ClassHead))
    with pytest.raises(ValueError, match="have no task_ids to select one of the tasks"):
        module.fold()
    saved = SavedPrompt(module.state_dict(), backbone_identity(backbone), dict(module.hparams))
    with pytest.raises(ValueError, match=r"unknown task 'taste'; the tasks of the prompt are \['mood', 'tone'\]"):
        fold(module, saved, "taste")
    with pytest.raises(ValueError, match=r"each task has another prompt; add --task with one of \['mood', 'tone'\]"):
        fold(module, saved)
    write_prompt(tmp_path / "tone.safetensors", fold(module, saved, "tone"))
    folded = Folded(path=str(tmp_path / "tone.safetensors"), backbone=backbone.spec, classes=CLASSES, readout=ClassHead)
    folded.attach(backbone)
    batch = batch_of_tasks(backbone.codec, 1, 1, 1, 1)
    assert_close(folded.eval()(batch), module(batch), **CLOSE)
    assert_close(folded.lm().scores(batch), module.lm().scores(batch), **CLOSE)


# ATTEMPT


@pytest.mark.parametrize("temperature", [None, 1.5])
def test_attempt(build, backbone, temperature):
    module = randomize(build(ATTEMPT, sources=SOURCES, length=3, bottleneck=4, temperature=temperature))
    batch = batch_of_tasks(backbone.codec, 2, 0, 1, 2)
    prompt = module.prompt(batch)
    shares = []
    for b, name in enumerate(("tone", "mood", "length", "tone")):
        ids = batch.input_ids[b][batch.source[b]]
        x = backbone.embed(ids).amax(0)
        inner = module.attention.down.weight @ x
        out = module.attention.up.weight @ (inner * inner.sigmoid())
        norm = module.attention.norm
        deviation = (out.var(unbiased=False) + norm.eps).sqrt()
        query = (out - out.mean()) / deviation * norm.weight + norm.bias
        candidates = [*module.sources, module.private[name]]
        t = 2.718281828 * backbone.hidden_size if temperature is None else temperature
        scores = torch.stack([(candidate.amax(0) @ query) / t for candidate in candidates])
        a = scores.exp() / scores.exp().sum()
        mixture = sum(share * candidate for share, candidate in zip(a, candidates, strict=True))
        expected = module.private[name] + mixture
        assert_close(prompt.tokens[b], expected, atol=1e-4, rtol=1e-4)
        shares.append(a)
    mean = torch.stack(shares).mean(0)
    assert_close(prompt.logs["attention/source_1"], mean[1], atol=1e-4, rtol=1e-4)
    assert_close(prompt.logs["attention/private"], mean[2], atol=1e-4, rtol=1e-4)


def test_sources_are_frozen_or_trained(build, backbone):
    for train_sources in (False, True):
        module = build(ATTEMPT, sources=SOURCES, length=3, train_sources=train_sources)
        LanguageModeling()(module.lm(), batch_of_tasks(backbone.codec, 0, 1, 2, 0)).loss.backward()
        gradient = module.sources.grad
        has_gradient = gradient is not None and bool(gradient.abs().sum() > 0)
        assert has_gradient == train_sources
        assert "sources" in module.state_dict()
    with pytest.raises(ValueError, match="ATTEMPT requires sources"):
        ATTEMPT()


# TransPrompt


def lstm_of_two_layers(network, tokens):
    """Return the outputs, gate by gate; the second layer reads the outputs of both directions of the first."""
    output = list(tokens)
    positions = range(len(tokens))
    for layer in range(2):
        directions = []
        for direction, order in (("", positions), ("_reverse", reversed(positions))):
            w_x, w_h, b_x, b_h = (
                getattr(network, f"{name}_l{layer}{direction}")
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            h = c = torch.zeros(network.hidden_size)
            states = {}
            for p in order:
                i, f, g, o = (w_x @ output[p] + b_x + w_h @ h + b_h).chunk(4)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                states[p] = h = o.sigmoid() * c.tanh()
            directions.append(states)
        output = [torch.cat([directions[0][p], directions[1][p]]) for p in positions]
    return torch.stack(output)


@pytest.mark.parametrize("recurrent", [True, False])
@torch.no_grad()
def test_transprompt(build, backbone, recurrent):
    module = randomize(build(TransPrompt, length=3, share=0.3, recurrent=recurrent), 0.5)
    prompt = module.prompt(batch_of_tasks(backbone.codec, 2, 0, 1, 2))

    def encode(network, tokens):
        return lstm_of_two_layers(network.lstm, tokens) if recurrent else tokens

    first, _, second = module.perceptron
    for b, name in enumerate(("tone", "mood", "length", "tone")):
        mixed = 0.3 * encode(module.encode_universal, module.universal)
        mixed = mixed + 0.7 * encode(module.encode_private[name], module.private[name])
        inner = (mixed @ first.weight.T + first.bias).clamp(min=0)
        assert_close(prompt.tokens[b], inner @ second.weight.T + second.bias, **CLOSE)
    h, k = backbone.hidden_size, 3
    encoders = (k + 1) * (12 * h**2 + 16 * h) if recurrent else 0
    count = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert count == (k + 1) * 3 * h + encoders + 2 * h**2 + 2 * h
    with pytest.raises(ValueError, match="share between 0 and 1, got 10 and 2"):
        TransPrompt(share=2)


# Batches of several tasks


MIXED = {
    "mpt": (MPT, {"length": 3, "rank": 2}),
    "attempt": (ATTEMPT, {"sources": SOURCES, "length": 3}),
    "transprompt": (TransPrompt, {"length": 3}),
}


@pytest.mark.parametrize("name", MIXED)
@torch.no_grad()
def test_rows_of_several_tasks_equal_batches_of_a_single_task(build, backbone, name):
    cls, arguments = MIXED[name]
    module = randomize(build(cls, **arguments), 0.5)
    tasks = (2, 0, 1, 2)
    batch = batch_of_tasks(backbone.codec, *tasks)
    together = module(batch)
    for b, task in enumerate(tasks):
        row = batch.only([b])
        alone = module(replace(row, task_ids=torch.tensor([task])))
        assert_close(real(row, together[b : b + 1]), real(row, alone), **CLOSE)
        other = module(replace(row, task_ids=torch.tensor([(task + 1) % 3])))
        assert (other - alone).abs().max() > 1e-3


@pytest.mark.parametrize("name", MIXED)
def test_every_task_learns_only_from_its_rows(build, backbone, name):
    cls, arguments = MIXED[name]
    module = randomize(build(cls, **arguments), 0.5)
    LanguageModeling()(module.lm(), batch_of_tasks(backbone.codec, 2, 0, 2, 0)).loss.backward()
    for key, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert bool(parameter.grad.abs().sum() > 0) == ("length" not in key), key


# Distillation


def save_teachers(build, save):
    teachers = [randomize(build(PromptTuning, None, length=n), 0.5) for n in (2, 4, 3)]
    return teachers, [save(teacher, f"teacher_{n}") for n, teacher in enumerate(teachers)]


@pytest.mark.parametrize("hidden", [0.0, 0.7])
def test_distillation(build, backbone, save, hidden):
    teachers, paths = save_teachers(build, save)
    student = randomize(build(MPT, length=3), 0.5)
    tasks = (2, 0, 1, 2)
    batch = batch_of_tasks(backbone.codec, *tasks)
    objective = Distillation(paths, weight=0.9, hidden=hidden, base=LanguageModeling())
    total = 0.0
    for task in range(3):
        rows_of_task = batch.only([b for b in range(4) if tasks[b] == task])
        teacher_prompt = teachers[task].prompt(rows_of_task)
        teacher_logits, student_logits = teachers[task].lm()(rows_of_task), student.lm()(rows_of_task)
        divergence = []
        for b, u in (rows_of_task.targets != IGNORE).nonzero().tolist():
            q, p = teacher_logits[b, u].softmax(-1), student_logits[b, u].softmax(-1)
            divergence.append((q * (q.log() - p.log())).sum())
        distance = sum(divergence) / len(divergence)
        teacher_states, student_states = (
            backbone.hidden_states(rows_of_task, prompt)[rows_of_task.mask]
            for prompt in (teacher_prompt, student.prompt(rows_of_task))
        )
        state_distance = ((teacher_states - student_states) ** 2).mean()
        total += len(rows_of_task) / 4 * (distance + hidden * state_distance)
    outcome = objective(student.lm(), batch)
    assert_close(outcome.loss, LanguageModeling()(student.lm(), batch).loss + 0.9 * total, **CLOSE)
    assert_close(outcome.logs["distillation"], total, **CLOSE)
    outcome.loss.backward()
    assert student.shared.grad.abs().sum() > 0


def test_a_student_equal_to_its_teacher_has_no_distillation_loss(build, backbone, save):
    (teacher, *_), (path, *_) = save_teachers(build, save)
    objective = Distillation([path], hidden=1.0, base=LanguageModeling())
    logs = objective(teacher.lm(), batch_of_tasks(backbone.codec, 0, 1, 2, 0)).logs
    assert logs["distillation"].abs() < 1e-6


def count_passes(monkeypatch):
    """Return a list that receives an item for each pass of a teacher."""
    passes, answer = [], Teacher.answer

    def count_and_answer(*arguments):
        passes.append(1)
        return answer(*arguments)

    monkeypatch.setattr(Teacher, "answer", count_and_answer)
    return passes


@pytest.mark.parametrize("hidden", [0.0, 0.7])
def test_cached_teacher_outputs_give_the_same_loss_without_a_second_pass(build, backbone, save, hidden, monkeypatch):
    _, paths = save_teachers(build, save)
    student = randomize(build(MPT, length=3), 0.5)
    batch = batch_of_tasks(backbone.codec, 2, 0, 1, 2)
    passes = count_passes(monkeypatch)

    def train_step(disk, batch):
        student.zero_grad()
        objective = Distillation(paths, hidden=hidden, base=LanguageModeling(), disk=disk)
        loss = objective(student.lm(), batch).loss
        loss.backward()
        gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        return loss.detach(), {name: gradient.clone() for name, gradient in gradients.items()}

    live = train_step(0, batch)
    assert len(passes) == 3
    first, again = train_step(1, batch), train_step(1, batch)
    assert len(passes) == 6
    assert torch.equal(first[0], live[0])
    assert torch.equal(again[0], live[0])
    assert all(torch.equal(again[1][name], live[1][name]) for name in live[1])
    turned = batch.only([3, 2, 1, 0])
    assert_close(train_step(1, turned)[0], train_step(0, turned)[0], **CLOSE)
    other = batch_of_tasks(backbone.codec, 2, 0, 1, 2, targets=("sad", "bad", "dull", "good"))
    assert_close(train_step(1, other)[0], train_step(0, other)[0], **CLOSE)
    assert (train_step(0, other)[0] - live[0]).abs() > 1e-3


def test_teacher_outputs_are_cached_by_teacher_and_within_the_size_limit(build, backbone, save, monkeypatch):
    _, paths = save_teachers(build, save)
    student = randomize(build(MPT, length=3), 0.5)
    passes = count_passes(monkeypatch)
    batch = batch_of_tasks(backbone.codec, 0, 0, 0, 0)
    first, second = (
        Distillation([path], base=LanguageModeling(), disk=1)(student.lm(), batch).loss for path in paths[:2]
    )
    assert (first - second).abs() > 1e-3
    assert len(passes) == 2
    objective = Distillation([paths[2]], base=LanguageModeling(), disk=1)
    answers = objective._teacher(0, backbone).answers
    answers.disk = 2000  # enough for one or two of the shorter answers
    for _ in range(3):
        live = Distillation([paths[2]], base=LanguageModeling())(student.lm(), batch).loss
        assert_close(objective(student.lm(), batch).loss, live, **CLOSE)
        sizes = [file.stat().st_size for file in answers.folder.glob("*.safetensors")]
        assert 0 < sum(sizes) <= 2000


def test_a_teacher_of_another_method_is_not_trained(build, backbone, save):
    teacher = randomize(build(DePT, None, length=2, rank=2, max_tokens=6), 0.5)
    objective = Distillation([save(teacher)], base=LanguageModeling())
    student = build(MPT, length=3)
    batch = batch_of_tasks(backbone.codec, 0, 1, 2, 0)
    loss = objective(student.lm(), batch).loss
    lm = PromptedLM(backbone, teacher.prompt)
    q, p = lm(batch).log_softmax(-1), student.lm()(batch).log_softmax(-1)
    divergence = (q.exp() * (q - p)).sum(-1)
    is_target = batch.targets != IGNORE
    total = 0.0
    for rows in ([0, 3], [1], [2]):  # of each task
        total += len(rows) / 4 * divergence[rows][is_target[rows]].mean()
    assert total > 0
    assert_close(loss, LanguageModeling()(student.lm(), batch).loss + 0.9 * total, atol=1e-4, rtol=1e-4)
    loss.backward()
    assert not [n for n, _ in student.named_parameters() if "teacher" in n]
    with pytest.raises(ValueError, match="rows are of task 2, but there are 2 teachers"):
        Distillation([save(teacher), save(teacher)], base=LanguageModeling())(student.lm(), batch)


# A bank of prompts


def build_bank(build, backbone, save):
    """Return modules of several methods and lengths, a bank of their prompts, and the paths of the prompts."""
    alone = {
        "plain": build(PromptTuning, None, length=4),
        "prefix": build(PrefixTuning, None, length=2, width=None),
        "dept": build(DePT, None, length=2, rank=2, max_tokens=6),
        "smop": build(SMoP, None, length=3, experts=2),
    }
    for module in alone.values():
        randomize(module, 0.3)
    paths = {name: save(alone[name], name) for name in reversed(alone)}
    bank = PromptBank(paths, backbone=backbone.spec, classes_by_task=dict.fromkeys(alone))
    bank.attach(backbone)
    return alone, bank.eval(), paths


@torch.no_grad()
def test_rows_with_prompts_of_several_methods_equal_each_method_alone(build, backbone, save, family):
    alone, bank, _ = build_bank(build, backbone, save)
    modules = list(alone.values())
    for tasks in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 1, 3, 0), (2, 2, 2, 2)):
        batch = batch_of_tasks(backbone.codec, *tasks, template="{text}{soft} it was {target}")
        together = bank(batch)
        for b, task in enumerate(tasks):
            one = batch.only([b])
            assert_close(real(one, together[b : b + 1]), real(one, modules[task](one)), **CLOSE)
        if family == "bert":
            continue
        output = bank.lm().generate(batch, max_new_tokens=4)
        for b, task in enumerate(tasks):
            expected = modules[task].lm().generate(batch.only([b]), max_new_tokens=4)[0]
            assert output[b, : len(expected)].tolist() == expected.tolist()


@torch.no_grad()
def test_32_rows_with_8_prompts_of_3_methods_and_4_lengths_equal_each_prompt_alone(build, backbone, save, family):
    cases = [(PromptTuning, {}), (PrefixTuning, {"width": None}), (DePT, {"rank": 2, "max_tokens": 6})]
    alone = []
    for number, length in enumerate((1, 2, 3, 5) * 2):
        cls, options = cases[number % 3]
        alone.append(randomize(build(cls, None, length=length, **options), 0.3))
    names = [f"task_{number}" for number in range(8)]
    paths = {name: save(module, name) for name, module in zip(names, alone, strict=True)}
    bank = PromptBank(paths, backbone=backbone.spec, classes_by_task=dict.fromkeys(names))
    bank.attach(backbone)
    generator = torch.Generator().manual_seed(3)
    tasks = torch.randperm(32, generator=generator).remainder(8).tolist()
    texts = [TEXTS[row % 4] + " dull" * (row % 5) for row in range(32)]
    targets = [("good", "bad", "very good")[row % 3] for row in range(32)]
    batch = batch_of(backbone.codec, "{soft}{text} it was {target}", texts, targets)
    batch = replace(batch, task_ids=torch.tensor(tasks))
    together = bank.eval()(batch)
    output = None if family == "bert" else bank.lm().generate(batch, max_new_tokens=4)
    for b, task in enumerate(tasks):
        one = batch.only([b])
        assert_close(real(one, together[b : b + 1]), real(one, alone[task](one)), **CLOSE)
        if output is not None:
            expected = alone[task].lm().generate(one, max_new_tokens=4)[0]
            assert output[b, : len(expected)].tolist() == expected.tolist()


@torch.no_grad()
def test_a_bank_loads_the_class_head_of_each_prompt_and_its_state_can_be_reloaded(build, backbone, save, family):
    if family in SEQ2SEQ:
        pytest.skip("class heads do not differ by architecture")
    classes = {"mood": CLASSES, "tone": CLASSES}
    alone = {
        name: randomize(build(PromptTuning, None, length=n, classes=CLASSES, readout=ClassHead), 0.5)
        for n, name in enumerate(classes, 2)
    }
    paths = {name: save(module, name) for name, module in alone.items()}
    bank = PromptBank(paths, backbone=backbone.spec, classes_by_task=classes, readout=ClassHead)
    bank.attach(backbone)
    batch = batch_of_tasks(backbone.codec, 1, 1, 1, 1)
    assert_close(bank.eval().lm().scores(batch), alone["tone"].lm().scores(batch), **CLOSE)
    state = bank.state_dict()
    assert not [key for key in state if "backbone" in key]
    reloaded = PromptBank(paths, backbone=backbone.spec, classes_by_task=classes, readout=ClassHead)
    reloaded.attach(backbone)
    randomize(reloaded).load_state_dict(state)
    assert torch.equal(reloaded.eval()(batch), bank(batch))


def test_a_bank_requires_a_prompt_for_each_task_of_this_backbone(build, backbone, save, family, load):
    _, bank, paths = build_bank(build, backbone, save)
    with pytest.raises(ValueError, match="have no task_ids to select one of the prompts"):
        bank.prompt(batch_of(backbone.codec))
    with pytest.raises(ValueError, match="one for each of the tasks"):
        PromptBank(paths, classes_by_task={"plain": None})
    with pytest.raises(ValueError, match="PromptBank requires prompts"):
        PromptBank()
    other = load(family, seed=1)
    with pytest.raises(ValueError, match="was trained on"):
        PromptBank(paths, backbone=other.spec).attach(other)


# Numbers of parameters


EIGHT = {f"task_{n}": None for n in range(8)}
SIX = [Uniform(0.5)] * 6


@pytest.mark.parametrize(
    ("module", "count"),
    [
        (MPT(100, init=Uniform(0.5)), 77_668),
        (MPT(100, init=Uniform(0.5), classes_by_task=EIGHT), 8 * 10_468),
        (ATTEMPT(SIX, 100, init=Uniform(0.5)), 231_936),
        (ATTEMPT(SIX, 100, init=Uniform(0.5), classes_by_task=EIGHT), 8 * 96_192),
    ],
    ids=["mpt", "mpt of eight", "attempt", "attempt of eight"],
)
def test_the_number_of_parameters_is_that_of_the_paper(module, count):
    module.build(SimpleNamespace(hidden_size=768))
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == count
