"""Batches of histories, the student's losses, scores and checkpoints, the distilled student."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from tiny import STUDENT, close, encoder, prepared

from core import data, distill, ranking, student
from core.config import InputError
from core.data import Prepared
from core.outputs import Outputs, Writer
from core.sasrec import SASRec
from core.settings import DataSettings, DistillSettings, EvalSettings, StudentSettings


def split(lengths: list[int], items: int = 400) -> Prepared:
    """Users with histories of these lengths; items drawn at random."""
    random = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    sequences = random.integers(1, items + 1, offsets[-1]).astype(np.int32)
    titles = ["", *map(str, range(1, items + 1))]
    return Prepared(sequences, offsets, titles, np.arange(len(lengths)), {}, "")


def epoch(cut: Prepared, seed: int = 0, **changed) -> list[dict]:
    given_settings = StudentSettings(**{"max_length": 50, "batch_size": 8} | changed)
    batches = student.SequenceBatches(cut, given_settings, seed)
    return [batches[i] for i in range(len(batches))]


# ---- batches ----


@limits(deadline=None, max_examples=60)
@given(st.lists(st.integers(3, 30), min_size=1, max_size=40), st.integers(1, 12), st.integers(0, 9))
def test_every_training_target_exactly_once_and_by_its_sample_id(lengths, batch_size, seed):
    cut = split([*lengths, 6])
    users, positions = data.train_samples(cut)
    found = []
    for batch in epoch(cut, seed, batch_size=batch_size):
        ids, width = batch["sample_ids"].numpy(), batch["items"].shape[1]
        rows = batch["positions"].numpy() // width
        assert batch["users"].numpy()[rows].tolist() == users[ids].tolist()
        where = cut.offsets[users[ids]] + positions[ids]
        assert batch["targets"].tolist() == cut.items[where].tolist()
        shown = batch["items"].flatten()[batch["positions"]]
        assert shown.tolist() == cut.items[where - 1].tolist()  # each input is the item before
        found += ids.tolist()
    assert sorted(found) == list(range(len(users)))


def test_held_out_items_are_neither_input_nor_target():
    cut = split([3, 4, 5, 12, 30])
    marked = cut.items.copy()
    ends = cut.offsets[1:]
    marked[ends - 1], marked[ends - 2] = 399, 398  # test and validation items
    marked = np.where(np.isin(np.arange(len(marked)), [*(ends - 1), *(ends - 2)]), marked, 7)
    cut = dataclasses.replace(cut, items=marked.astype(np.int32))
    for batch in epoch(cut):
        assert set(batch["targets"].tolist()) == {7}
        assert set(batch["items"].flatten().tolist()) <= {0, 7}


def test_a_window_keeps_the_newest_targets():
    cut = split([20])
    (batch,) = epoch(cut, max_length=5)
    assert batch["items"].tolist() == [cut.items[12:17].tolist()]
    assert batch["targets"].tolist() == cut.items[13:18].tolist()
    assert batch["sample_ids"].tolist() == [12, 13, 14, 15, 16]


def test_users_without_a_pair_to_learn_from_are_left_out():
    (batch,) = epoch(split([3, 4, 3]))
    assert batch["users"].tolist() == [1]
    assert batch["samples"] == 1


def test_little_is_padding_and_batches_cost_alike():
    cut = data.prepare(DataSettings())
    settings = StudentSettings()
    batches = student.SequenceBatches(cut, settings, seed=1)
    counts = [(b["tokens"], b["padded_tokens"]) for b in (batches[i] for i in range(len(batches)))]
    tokens, padded = np.array(counts).T
    assert 1 - tokens.sum() / padded.sum() <= 0.15
    budget = settings.batch_size * batches.pairs[batches.pairs > 0].mean()
    assert padded.max() <= budget
    assert np.median(padded) > 0.9 * budget


def test_counts_describe_the_batch():
    for batch in epoch(split([4, 9, 14, 30])):
        assert batch["samples"] == len(batch["users"]) == len(batch["items"])
        assert batch["tokens"] == len(batch["positions"]) == int((batch["items"] > 0).sum())
        assert batch["padded_tokens"] == batch["items"].numel()


def test_seeds_decide_the_order():
    cut = split(list(range(4, 40)))
    users = [[b["users"].tolist() for b in epoch(cut, seed)] for seed in (0, 0, 1)]
    assert users[0] == users[1] != users[2]
    longest_first = [b["items"].shape[1] for b in epoch(cut)]
    assert longest_first != sorted(longest_first, reverse=True)  # batches come in random order


# ---- losses ----


@pytest.mark.parametrize("loss", ["softmax", "sampled_softmax", "bce", "gbce"])
def test_each_loss_trains_every_weight(loss):
    settings = STUDENT.model_copy(update={"loss": loss, "num_negatives": 5})
    model = encoder(settings).train()
    batch = student.SequenceBatches(prepared(), settings, 0)[0]
    proposal = student.Proposal(prepared(), settings)
    value = student.training_loss(model, batch, settings, proposal)
    value.backward()
    assert value.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad.any(), name
    assert not model.item_table.weight.grad[0].any()


def test_the_loss_sees_real_positions_only():
    model, batch = encoder(), student.SequenceBatches(prepared(), STUDENT, 0)[0]
    logits = model(batch["items"]) @ model.item_table.weight.t()
    logits[..., 0] = float("-inf")
    labels = torch.full(batch["items"].shape, -100)
    labels.view(-1)[batch["positions"]] = batch["targets"]
    wanted = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert close(student.training_loss(model, batch, STUDENT), wanted)


@pytest.mark.parametrize("power", [0.0, 0.75, 1.0])
def test_a_proposal_draws_by_training_targets_and_tells_its_expected_counts(power):
    cut = split([3, 12, 40], items=6)
    settings = StudentSettings(loss="sampled_softmax", negatives_power=power)
    proposal = student.Proposal(cut, settings)
    seen = np.concatenate([cut.train_sequence(user) for user in range(3)])
    weights = (np.bincount(seen, minlength=7)[1:] + 1.0) ** power
    torch.manual_seed(0)
    drawn, log_counts = proposal.draw(40_000, torch.device("cpu"))
    expected = 40_000 * weights / weights.sum()
    assert torch.allclose(log_counts.exp(), torch.from_numpy(expected).float()[drawn - 1])
    found = np.bincount(drawn.numpy(), minlength=7)[1:]
    assert np.all(np.abs(found - expected) < 5 * np.sqrt(expected))


def test_gbce_and_bce_differ_by_their_beta(monkeypatch):
    seen = {}

    def spy(states, table, targets, negatives, beta):
        seen["negatives"], seen["beta"] = negatives, beta
        return states.sum()

    monkeypatch.setattr(student, "sampled_loss", spy)
    states, table = torch.zeros(2, 4), torch.zeros(11, 4)
    for loss, beta in (("bce", 1.0), ("gbce", 0.625)):
        settings = StudentSettings(loss=loss, num_negatives=5, gbce_t=0.84375)
        student.state_loss(states, table, torch.tensor([1, 2]), settings)
        assert seen["beta"] == pytest.approx(beta, abs=1e-6)
    many = StudentSettings(loss="bce", num_negatives=5000)
    student.state_loss(states, table, torch.tensor([1, 2]), many)
    assert set(seen["negatives"].tolist()) == set(range(1, 11))  # both ends, never padding


def test_it_learns_a_rule():
    """The next item is the one after it: two dozen steps must find that."""
    items = 20
    walks = [(start + np.arange(12)) % items + 1 for start in range(items)] * 3
    cut = dataclasses.replace(
        split([12] * len(walks), items), items=np.concatenate(walks).astype(np.int32)
    )
    settings = StudentSettings(hidden_size=32, num_blocks=1, max_length=12, batch_size=20)
    torch.manual_seed(0)
    model = SASRec(items, settings).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for seed in range(10):
        for batch in epoch(cut, seed, max_length=12, batch_size=20):
            optimizer.zero_grad()
            student.training_loss(model, batch, settings).backward()
            optimizer.step()
    score = student.scorer(model, settings, 16)
    found, _ = ranking.evaluate(score, cut, "test", EvalSettings(top_k=(1, 10), mask_seen=False))
    assert found["recall@1"] == 1.0


# ---- scores ----


def all_scores(score, queries) -> torch.Tensor:
    found = torch.full((len(queries), prepared().num_items + 1), float("nan"))
    for rows, scores in score(queries):
        assert found[rows].isnan().all()
        found[rows] = scores
    assert found.isfinite().all()
    return found


@pytest.mark.parametrize("batch_size", [1, 7, 500])
def test_scores_are_those_of_each_history_alone(batch_size):
    model, cut = encoder().train(), prepared()
    queries = ranking.held_out(cut, "test")
    assert (queries.lengths > STUDENT.max_length).any()  # the window matters
    assert (queries.lengths < STUDENT.max_length).any()
    found = all_scores(student.scorer(model, STUDENT, batch_size), queries)
    assert not model.training  # dropout is off
    for row, user in enumerate(cut.eval_users):
        history, _ = cut.test(user)
        newest = torch.from_numpy(history[-STUDENT.max_length :].astype(np.int64))[None]
        state = model.last_state(newest, torch.tensor([newest.shape[1]]))
        assert close(found[row], (state @ model.item_table.weight.t())[0].detach())


def test_scores_carry_no_gradient_and_stay_fp32_in_a_mixed_body():
    settings = STUDENT.model_copy(update={"precision": "bf16-mixed"})
    queries = ranking.held_out(prepared(), "test")
    _, scores = next(student.scorer(encoder(), settings, 8)(queries))
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    _, exact = next(student.scorer(encoder(), STUDENT, 8)(queries))
    assert close(scores, exact, 0.05)
    assert not torch.equal(scores, exact)  # the body did run in bf16


def test_given_tables_replace_the_models():
    model, queries = encoder(), ranking.held_out(prepared(), "test")
    own = model.item_table.weight.detach()
    plain = all_scores(student.scorer(model, STUDENT, 64), queries)
    doubled = all_scores(student.scorer(model, STUDENT, 64, own, 2 * own), queries)
    other_input = all_scores(student.scorer(model, STUDENT, 64, 2 * own, own), queries)
    assert close(doubled, 2 * plain)
    assert not close(other_input, plain, 1e-3)


# ---- checkpoints ----


def test_a_checkpoint_gives_back_the_model(tmp_path):
    model = encoder()
    student.save_student(model, tmp_path / "best")
    loaded = student.load_student(tmp_path / "best", prepared().num_items, STUDENT)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    items = prepared().num_items
    with pytest.raises(InputError, match="no such checkpoint; run the stage student_fit"):
        student.load_student(tmp_path, items, STUDENT)
    student.save_student(encoder(), tmp_path)
    with pytest.raises(InputError, match=r"does not fit.*item_table\.weight: found"):
        student.load_student(tmp_path, items + 1, STUDENT)
    deeper = STUDENT.model_copy(update={"num_blocks": 2})
    with pytest.raises(InputError, match=r"blocks\.1.*found None, wanted"):
        student.load_student(tmp_path, items, deeper)
    state = encoder().state_dict() | {"extra": torch.zeros(1)}
    student.write_student(state, tmp_path)
    with pytest.raises(InputError, match=r"extra: found \(1,\), wanted None"):
        student.load_student(tmp_path, items, STUDENT)


# ---- learning from the teacher ----


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Outputs:
    """Outputs in which a sample's log-sum-exp and target log-probability tell its id."""
    cut = prepared()
    samples, top, width = len(data.train_samples(cut)[0]), 10, 12
    random = np.random.default_rng(1)
    ids = np.array([random.permutation(cut.num_items)[:top] + 1 for _ in range(samples)])
    folder = tmp_path_factory.mktemp("teacher") / "outputs"
    with Writer(folder, samples=samples, top_k=top, width=width, hashes={}) as writer:
        row = np.arange(samples)
        writer.write(
            row,
            ids.astype(np.int32),
            np.tile(-np.arange(top, dtype=np.float32), (samples, 1)),
            (1 + row / samples).astype(np.float32),
            (-row / samples).astype(np.float32),
            random.standard_normal((samples, width)).astype(np.float32),
        )
        writer.finish(random.standard_normal((cut.num_items + 1, width)).astype(np.float32))
    return Outputs.open(folder)


def learner(stored: Outputs, **given_settings) -> student.Distilled:
    torch.manual_seed(0)
    return student.Distilled(prepared(), stored, STUDENT, DistillSettings(**given_settings)).eval()


def test_each_position_gets_its_own_teacher_row_whatever_the_order(stored, monkeypatch):
    seen = []
    monkeypatch.setattr(
        distill, "distillation_loss", lambda scores, batch, settings, own: seen.append(batch)
    )
    model, samples = learner(stored), len(data.train_samples(prepared())[0])
    for seed, batch_size in ((0, 4), (5, 64)):
        settings = STUDENT.model_copy(update={"batch_size": batch_size})
        batches = student.SequenceBatches(prepared(), settings, seed)
        for index in range(len(batches)):
            model.loss(batches[index])
            ids, found = batches[index]["sample_ids"], seen.pop()
            assert close(found.target_log_prob_B, -ids / samples)
            assert torch.equal(found.targets_B, batches[index]["targets"])
            wanted = torch.from_numpy(stored.rows(ids.numpy())["top_ids"].astype(np.int64))
            assert torch.equal(found.teacher_ids_BK, wanted)
            # −log p of a candidate: log-sum-exp minus its score.
            distance = (1 + ids / samples)[:, None] + torch.arange(10)
            assert close(found.candidate_distance_BK, distance)


def test_negatives_are_unwatched_items_from_the_whole_catalogue(stored, monkeypatch):
    drawn, cut = [], prepared()
    monkeypatch.setattr(
        distill, "distillation_loss", lambda scores, batch, settings, own: drawn.append(batch)
    )
    model = learner(stored, mode="reference")
    batches = student.SequenceBatches(cut, STUDENT, 0)
    found = set()
    for index in [i for _ in range(20) for i in range(len(batches))]:
        batch = batches[index]
        model.loss(batch)
        users = batch["users"][batch["positions"] // batch["items"].shape[1]].tolist()
        negatives = drawn.pop().negatives_BN
        assert negatives.shape == (len(users), 1)
        for user, item in zip(users, negatives[:, 0].tolist(), strict=True):
            assert item not in cut.train_sequence(user)
        found |= set(negatives[:, 0].tolist())
    assert found == set(range(1, cut.num_items + 1))


def test_without_a_weight_the_teacher_is_silent(stored):
    model = learner(stored, lam=0.0, ed_weight=0.0)
    batch = student.SequenceBatches(prepared(), STUDENT, 0)[0]
    assert torch.equal(model.loss(batch), student.training_loss(model.model, batch, STUDENT))
    loud = learner(stored, lam=0.8, ed_weight=0.0)
    assert loud.loss(batch) > student.training_loss(loud.model, batch, STUDENT)


@pytest.mark.parametrize("mode", ["paper", "reference"])
def test_the_saved_student_needs_no_teacher(stored, tmp_path, mode):
    model = learner(stored, mode=mode, ed_weight=0.5, alpha=0.1)
    batch = student.SequenceBatches(prepared(), STUDENT, 0)[0]
    model.train().loss(batch).backward()
    assert model.mixed.projector.weight.grad.any()
    queries = ranking.held_out(prepared(), "test")
    wanted = all_scores(model.scorer(64), queries)
    model.save(tmp_path)
    loaded = student.load_student(tmp_path, prepared().num_items, STUDENT)
    path = tmp_path / "input_vectors.npy"
    assert path.is_file() == (mode == "reference")
    vectors = torch.from_numpy(np.load(path)) if path.is_file() else None
    assert close(all_scores(student.scorer(loaded, STUDENT, 64, vectors), queries), wanted, 1e-6)
    plain = all_scores(student.scorer(model.model, STUDENT, 64), queries)
    assert not close(plain, wanted, 1e-2)  # the teacher's vectors do act


def test_a_scorer_made_before_training_scores_the_trained_vectors(stored):
    model = learner(stored)
    score, queries = model.scorer(64), ranking.held_out(prepared(), "test")
    before = all_scores(score, queries)
    with torch.no_grad():
        model.mixed.projector.weight.normal_()
    assert not close(all_scores(score, queries), before, 1e-2)
