from collections import Counter

import numpy as np
import pytest
from batch_samplers import (
    batches_in_epoch,
    check_order_depends_on_seed_and_epoch_only,
    check_resumes,
    flatten,
)

from lightning_softprompt.core.types import Encoded, Example
from lightning_softprompt.data.curricula.baby_steps import BabySteps
from lightning_softprompt.data.curricula.competence import Competence
from lightning_softprompt.data.curricula.easy_to_hard import EasyToHard
from lightning_softprompt.data.curricula.row_weights import ClusterWeights, SourceWeights, cluster
from lightning_softprompt.data.curricula.self_paced import SelfPaced
from lightning_softprompt.data.difficulty.losses import BareLoss, InstructionDifficulty
from lightning_softprompt.data.difficulty.tokens import PromptTokens, RandomDifficulty, Rarity, TargetTokens
from lightning_softprompt.data.prepared import PreparedRows
from lightning_softprompt.data.readers.sources import Origin
from lightning_softprompt.data.sampling.bucketing import BucketBatchSampler
from lightning_softprompt.data.sampling.epoch_indexed import EpochIndexedSampler

COUNT, BATCH = 203, 4
TARGETS = np.random.default_rng(0).permutation(COUNT) + 1  # number of target tokens: all different


class FixedLosses:
    """A model whose losses are fixed; `trained` is replaced by a test between epochs."""

    def __init__(self, losses=TARGETS):
        self.losses = self.trained = np.asarray(losses, dtype=np.float64)
        self.measured = 0

    def bare_losses(self, rows):
        return self.losses

    def losses_without_source(self, rows):
        return np.full(len(rows), 2.0)

    def current_losses(self, rows):
        self.measured += 1
        return self.trained


def make_rows(targets=TARGETS, fields=None, file=None):
    encoded = [Encoded((1, 2, 3), (2,), tuple(range(count)), (0,)) for count in targets]
    examples = [Example((fields or (lambda row: {}))(row), "") for row in range(len(encoded))]
    origins = [Origin("rows", row, file(row) if file else None) for row in range(len(encoded))]
    return PreparedRows(examples, encoded, origins)


ROWS = make_rows()


def make_sampler(curriculum=None, model=None, rows=ROWS, batch_size=BATCH, **options):
    order = None if curriculum is None else curriculum.plan(rows, model or FixedLosses()).order
    return BucketBatchSampler(rows.lengths, batch_size, order="shuffled", row_order=order, **options)


CURRICULA = {
    "competence": Competence(TargetTokens(), steps=120),
    "linear competence": Competence(TargetTokens(), steps=120, growth="linear"),
    "baby steps": BabySteps(TargetTokens(), steps=20),
    "single buckets": BabySteps(TargetTokens(), cumulative=False),
    "easy to hard": EasyToHard(TargetTokens()),
    "hard to easy": EasyToHard(TargetTokens(), reverse=True),
    "self-paced": SelfPaced(),
}
ORDERED = pytest.mark.parametrize("curriculum", CURRICULA.values(), ids=CURRICULA)


@ORDERED
def test_seed_and_step_decide_the_rows_and_a_run_resumes_exactly(curriculum):
    check_order_depends_on_seed_and_epoch_only(lambda seed: make_sampler(curriculum, seed=seed))
    for epoch, num_batches in [(0, 1), (0, 30), (1, 17)]:
        check_resumes(lambda: make_sampler(curriculum), epoch, num_batches)


@ORDERED
def test_processes_see_disjoint_rows_in_each_step_and_together_those_of_one_process(curriculum):
    rows = make_rows(np.random.default_rng(1).permutation(200) + 1)  # rows for whole steps: none is left out
    alone = make_sampler(curriculum, rows=rows, batch_size=2 * BATCH, model=FixedLosses(rows.lengths))
    ranks = [
        make_sampler(curriculum, rows=rows, rank=rank, world_size=2, model=FixedLosses(rows.lengths))
        for rank in range(2)
    ]
    for epoch in range(3):
        of_ranks = [batches_in_epoch(sampler, epoch) for sampler in ranks]
        for first, second in zip(*of_ranks, strict=True):
            assert len({*first, *second}) == 2 * BATCH
        together = [sorted(first + second) for first, second in zip(*of_ranks, strict=True)]
        assert together == [sorted(batch) for batch in batches_in_epoch(alone, epoch)]


@ORDERED
def test_a_batch_has_no_row_twice_and_an_epoch_has_the_same_number_of_rows(curriculum):
    sampler, plain = make_sampler(curriculum), make_sampler()
    for epoch in range(3):
        batches = batches_in_epoch(sampler, epoch)
        assert sorted(map(len, batches)) == sorted(map(len, batches_in_epoch(plain, epoch)))
        assert all(len(set(batch)) == len(batch) for batch in batches)


@pytest.mark.parametrize("growth", ["sqrt", "linear"])
def test_competence_draws_only_the_easiest_rows_and_ends_in_the_plain_order(growth):
    curriculum = Competence(TargetTokens(), steps=120, initial=0.01, growth=growth)
    power = {"sqrt": 2, "linear": 1}[growth]
    batches = flatten(batches_in_epoch(make_sampler(curriculum), epoch) for epoch in range(2))
    for step, batch in enumerate(batches):
        share = min(1, (step * (1 - 0.01**power) / 120 + 0.01**power) ** (1 / power))
        assert max(TARGETS[batch]) <= max(BATCH, round(share * COUNT)), step
    assert max(TARGETS[batches[0]]) == BATCH  # 1 % are two rows: a batch has at least its rows
    assert max(TARGETS[flatten(batches[-10:])]) > COUNT * 0.75
    # from the first epoch with c(t) = 1, the order is that without a curriculum
    assert batches_in_epoch(make_sampler(curriculum), 3) == batches_in_epoch(make_sampler(), 3)
    assert sorted(flatten(batches_in_epoch(make_sampler(curriculum), 3))) == list(range(COUNT))


def test_easy_to_hard_uses_each_row_once_and_mixes_rows_only_within_a_window():
    for reverse in (False, True):
        batches = batches_in_epoch(make_sampler(EasyToHard(TargetTokens(), reverse=reverse)), 1)
        assert sorted(flatten(batches)) == list(range(COUNT))
        window = len(batches) // 20 * BATCH
        ranks = TARGETS[flatten(batches)] - 1
        expected = np.arange(COUNT)[::-1] if reverse else np.arange(COUNT)
        distances = np.abs(ranks - expected)
        assert 0 < distances.max() < window
    once = EasyToHard(TargetTokens(), epochs=1)
    assert batches_in_epoch(make_sampler(once), 1) == batches_in_epoch(make_sampler(), 1)


def test_baby_steps_use_one_bucket_after_the_other():
    quarter = -(-COUNT // 4)
    for cumulative in (False, True):
        batches = flatten(
            batches_in_epoch(make_sampler(BabySteps(TargetTokens(), steps=20, cumulative=cumulative)), epoch)
            for epoch in range(2)
        )
        for step, batch in enumerate(batches[:80]):
            stage = step // 20
            assert max(TARGETS[batch]) <= (stage + 1) * quarter
            assert cumulative or min(TARGETS[batch]) > stage * (quarter - 1)
        assert len(set(flatten(batches[80:]))) == (len(batches) - 80) * BATCH - (BATCH - COUNT % BATCH)


def test_self_paced_uses_rows_below_a_threshold_that_grows_and_stores_their_losses():
    model = FixedLosses()
    curriculum = SelfPaced(threshold=50.0, growth=1.5)
    sampler = make_sampler(curriculum, model)
    assert max(TARGETS[flatten(batches_in_epoch(sampler, 0))]) == 49
    model.trained = model.losses[::-1].copy()
    rows = flatten(batches_in_epoch(sampler, 1))
    assert max(model.trained[rows]) == 74
    assert model.measured == 2  # once per epoch
    state = sampler.state_dict()
    model.trained = model.losses * 0 + 1  # a resumed run may not measure again in the middle of an epoch
    resumed = EpochIndexedSampler(make_sampler(curriculum, model), COUNT)
    resumed.load_state_dict({**state, "epoch": 1, "done": 3})
    first = COUNT  # index of the first row of epoch 1
    assert [[row - first for row in batch] for batch in resumed] == batches_in_epoch(sampler, 1)[3:]
    assert model.measured == 2
    assert sorted(flatten(batches_in_epoch(sampler, 2))) == list(range(COUNT))  # all are below: the plain order


def test_a_run_does_not_resume_with_other_scores_or_another_curriculum():
    state = make_sampler(Competence(TargetTokens())).state_dict()
    for other in (Competence(RandomDifficulty()), Competence(TargetTokens(), steps=7), EasyToHard(TargetTokens())):
        with pytest.raises(ValueError, match="another order of batches: curriculum was"):
            make_sampler(other).load_state_dict(state)


def test_scores():
    rows = PreparedRows(
        [Example({}, "")] * 3,
        [
            Encoded((7, 7, 9), (2,), (9,), (0,)),
            Encoded((7, 8, 5, 5), (2, 3), (5, 5), (0,)),
            Encoded((7, 7, 7, 9), (3,), (9,), (0,)),
        ],
        [Origin("rows", row, None) for row in range(3)],
    )
    model = FixedLosses([1.0, 4.0, 2.0])
    assert TargetTokens().scores(rows, model).tolist() == [1, 2, 1]
    assert PromptTokens().scores(rows, model).tolist() == [2, 2, 3]
    # token 7 occurs 6 times in 11, 9 twice, 5 twice, 8 once
    rarity = np.log(11) - np.log([6, 2, 2, 1])
    seven, nine, five, eight = rarity
    expected = [2 * seven + nine, seven + eight + 2 * five, 3 * seven + nine]
    assert np.allclose(Rarity().scores(rows, model), expected)
    assert np.allclose(Rarity(average=True).scores(rows, model), np.array(expected) / [3, 4, 4])
    assert BareLoss().scores(rows, model).tolist() == [1, 4, 2]
    assert InstructionDifficulty().scores(rows, model).tolist() == [0.5, 2, 1]
    assert len(set(RandomDifficulty().scores(ROWS, model))) == COUNT


def test_a_score_that_is_not_a_number_is_refused():
    with pytest.raises(ValueError, match="difficulty of training row 1 is nan"):
        make_sampler(EasyToHard(BareLoss()), FixedLosses([1.0, float("nan")]), make_rows([1, 2]), 1).state_dict()


def test_sources_and_clusters_are_sampled_by_their_rates():
    rows = make_rows([1] * 9, fields=lambda row: {"kind": "b" if row < 3 else "a"}, file=lambda row: f"{row < 6}")
    by_file = SourceWeights().plan(rows, FixedLosses()).weights
    assert by_file == [1 / 6] * 6 + [1 / 3] * 3
    by_column = SourceWeights(column="kind").plan(rows, FixedLosses()).weights
    assert by_column == [1 / 3] * 3 + [1 / 6] * 6
    with pytest.raises(ValueError, match="'other' is not a column"):
        SourceWeights(column="other").plan(rows, FixedLosses())
    with pytest.raises(ValueError, match="require several"):
        SourceWeights().plan(ROWS, FixedLosses())
    centers = np.array([[0, 0], [9, 9], [0, 9]], dtype=np.float32)
    vectors = centers[np.arange(30) % 3] + np.random.default_rng(0).normal(0, 0.1, (30, 2)).astype(np.float32)
    groups = cluster(vectors, 3, seed=1)
    assert Counter(groups) == {0: 10, 1: 10, 2: 10}
    assert len({(row % 3, group) for row, group in enumerate(groups)}) == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Competence(TargetTokens(), initial=0), "initial"),
        (lambda: BabySteps(TargetTokens(), buckets=0), "buckets"),
        (lambda: EasyToHard(TargetTokens(), epochs=0), "epochs"),
        (lambda: SelfPaced(growth=1.0), "growth"),
        (lambda: ClusterWeights(clusters=1), "clusters"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
