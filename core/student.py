"""How SASRec is trained and scored: length-grouped batches, the losses of the student, user states.

Shapes: B users, L positions, D width, V items, N real (supervised) positions of a batch.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from core import distill, item_scores
from core.config import InputError
from core.data import Prepared, train_samples
from core.loop import autocast
from core.losses import gbce_beta, sampled_loss, sampled_softmax_loss, softmax_loss
from core.outputs import Outputs
from core.ranking import Queries, Scorer
from core.sasrec import SASRec
from core.settings import DistillSettings, StudentSettings

CHUNK_BATCHES = 12
"""Batches that are sorted by length together: large enough to save padding, small enough to keep
batches random.
"""
REDRAWS = 100
"""Tries for a negative its user has not watched; who watched nearly all keeps a watched one."""


class SequenceBatches(Dataset):
    """Training batches of one epoch: next-item pairs at every position of each user's newest items.

    Rows are grouped by length inside random chunks and cut by a token budget of `batch_size`
    average rows, so batches cost alike whatever their lengths; then the batch order is shuffled,
    and the first `most` are kept.
    """

    def __init__(
        self, prepared: Prepared, settings: StudentSettings, seed: int, most: int | None = None
    ):
        self.items = prepared.items
        lengths = np.diff(prepared.offsets) - 2  # train part: all but validation and test item
        usable = np.flatnonzero(lengths >= 2)
        self.pairs = np.minimum(lengths - 1, settings.max_length)
        # The newest `pairs` targets end just before the validation item.
        self.starts = prepared.offsets[1:] - 3 - self.pairs
        # Sample ids of `data.train_samples` run over users, then positions 1, 2, …
        samples = np.maximum(lengths - 1, 0)
        self.first_sample = np.cumsum(samples) - samples - prepared.offsets[:-1]
        random = np.random.default_rng(seed)
        order = random.permutation(usable)
        budget = settings.batch_size * self.pairs[usable].mean()
        batches = []
        for part in np.array_split(
            order, max(1, len(order) // (settings.batch_size * CHUNK_BATCHES))
        ):
            batches += _cut_by_tokens(
                part[np.argsort(-self.pairs[part], kind="stable")], self.pairs, budget
            )
        self.rows = [batches[i] for i in random.permutation(len(batches))[:most]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        users = self.rows[index]
        pairs = self.pairs[users]
        columns = np.arange(pairs.max())
        where = self.starts[users, None] + columns
        real = columns < pairs[:, None]
        inputs = np.where(real, self.items[np.where(real, where, 0)], 0)
        return {
            "users": torch.from_numpy(users),
            "items": torch.from_numpy(inputs.astype(np.int64)),
            # Flat indices of the real positions, so that the loss never sees padding.
            "positions": torch.from_numpy(np.flatnonzero(real)),
            "targets": torch.from_numpy(self.items[where[real] + 1].astype(np.int64)),
            "sample_ids": torch.from_numpy((self.first_sample[users, None] + where)[real]),
            "samples": len(users),
            "tokens": int(pairs.sum()),
            "padded_tokens": int(real.size),
        }


def _cut_by_tokens(rows: np.ndarray, lengths: np.ndarray, budget: float) -> list[np.ndarray]:
    """Cut rows sorted by falling length into batches of at most `budget` padded tokens."""
    batches, start = [], 0
    while start < len(rows):
        count = max(1, int(budget // lengths[rows[start]]))
        batches.append(rows[start : start + count])
        start += count
    return batches


class Proposal:
    """What `sampled_softmax` draws negatives from: items 1..V, each by its number of training
    targets to the power `settings.negatives_power` (0 = all alike).
    """

    def __init__(self, prepared: Prepared, settings: StudentSettings):
        ends = prepared.offsets[1:]
        held_out = np.concatenate([ends - 2, ends - 1])
        counts = np.bincount(prepared.items, minlength=prepared.num_items + 1)
        counts -= np.bincount(prepared.items[held_out], minlength=len(counts))
        # One more for each: an item nobody watched in training can still be drawn.
        weights = (counts[1:] + 1.0) ** settings.negatives_power
        self.shares_V = torch.from_numpy(weights / weights.sum())

    def draw(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """`count` ids drawn with replacement, (M,), and the log of the expected number of draws of
        each, (M,) fp32.
        """
        self.shares_V = self.shares_V.to(device)
        places = torch.rand(count, dtype=torch.float64, device=device)
        drawn = torch.searchsorted(self.shares_V.cumsum(0), places).clamp_max_(
            len(self.shares_V) - 1
        )
        return drawn + 1, (count * self.shares_V[drawn]).log().float()


def training_loss(
    model: SASRec, batch: dict, settings: StudentSettings, proposal: Proposal | None = None
) -> Tensor:
    """The student's own loss on a batch of `SequenceBatches` (scalar)."""
    states_ND = supervised_states(model, batch)
    return state_loss(states_ND, model.item_table.weight, batch["targets"], settings, proposal)


def supervised_states(model: SASRec, batch: dict, item_vectors_VD: Tensor | None = None) -> Tensor:
    """States of the real positions of a batch, (N, D)."""
    return model(batch["items"], item_vectors_VD).flatten(0, 1)[batch["positions"]]


def state_loss(
    states_ND: Tensor,
    table_VD: Tensor,
    targets_N: Tensor,
    settings: StudentSettings,
    proposal: Proposal | None = None,
) -> Tensor:
    """The loss named in the settings, of states against targets (scalar, mean over positions).

    `sampled_softmax` needs the proposal, the others draw uniformly or not at all.
    """
    if settings.loss == "softmax":
        return softmax_loss(states_ND, table_VD, targets_N)
    if settings.loss == "sampled_softmax":
        negatives, log_count_M = proposal.draw(settings.num_negatives, states_ND.device)
        return sampled_softmax_loss(states_ND, table_VD, targets_N, negatives, log_count_M)
    items = len(table_VD) - 1
    negatives = torch.randint(1, items + 1, (settings.num_negatives,), device=states_ND.device)
    beta = (
        gbce_beta(settings.gbce_t, settings.num_negatives, items)
        if settings.loss == "gbce"
        else 1.0
    )
    return sampled_loss(states_ND, table_VD, targets_N, negatives, beta)


def scorer(
    model: SASRec,
    settings: StudentSettings,
    batch_size: int,
    input_VD: Tensor | None = None,
    table_VD: Tensor | None = None,
) -> Scorer:
    """Full-catalogue scores after each history, (B, V+1) in fp32, no gradients; the tables default
    to the model's.
    """

    @torch.inference_mode()
    def score(queries: Queries) -> Iterator[tuple[np.ndarray, Tensor]]:
        model.eval()
        table = model.item_table.weight if table_VD is None else table_VD
        for rows in queries.by_length(batch_size, model.max_length):
            items, lengths = queries.newest(rows, model.max_length)
            with autocast(settings.precision, table.device):
                states_BD = model.last_state(
                    torch.from_numpy(items).to(table.device),
                    torch.from_numpy(lengths).to(table.device),
                    input_VD,
                )
            for part, scores_RV in item_scores.in_parts(states_BD, table):
                yield rows[part], scores_RV

    return score


class Distilled(nn.Module):
    """A student that learns from stored teacher outputs: SASRec, and the teacher's item embeddings
    in its input.

    In mode `paper` the mixed vector is the item's embedding everywhere; `reference` leaves the
    output table alone. Once trained, the vectors are folded into tables: the saved student needs no
    teacher.
    """

    def __init__(
        self,
        prepared: Prepared,
        stored: Outputs,
        settings: StudentSettings,
        distillation: DistillSettings,
    ):
        super().__init__()
        self.model = SASRec(prepared.num_items, settings)
        self.settings, self.distillation, self.stored = settings, distillation, stored
        self.watched = _watched_keys(prepared)
        self.proposal = Proposal(prepared, settings)
        self.mixed = None
        if distillation.ed_weight:
            teacher_V1H = _standardised(torch.from_numpy(np.array(stored.item_embeddings)).float())
            self.mixed = distill.ItemEmbedding(
                teacher_V1H, settings.hidden_size, distillation.ed_weight
            )
        if distillation.alpha:
            users, positions = train_samples(prepared)
            targets = prepared.items[prepared.offsets[users] + positions].astype(np.int64)
            self.register_buffer(
                "propensity",
                distill.propensity(
                    torch.from_numpy(targets), prepared.num_items, distillation.propensity_power
                ),
            )

    def vectors(self) -> tuple[Tensor, Tensor]:
        """Input vectors and output table, both (V+1, D)."""
        table_VD = self.model.item_table.weight
        input_VD = table_VD if self.mixed is None else self.mixed(table_VD)
        return input_VD, input_VD if self.distillation.mode == "paper" else table_VD

    def loss(self, batch: dict) -> Tensor:
        """The student's own loss plus what the teacher says of every real position (scalar)."""
        input_VD, table_VD = self.vectors()
        states_ND = supervised_states(self.model, batch, input_VD)
        own = state_loss(states_ND, table_VD, batch["targets"], self.settings, self.proposal)
        if not self.distillation.lam and not self.distillation.alpha:
            return own
        rows = self.stored.rows(batch["sample_ids"].cpu().numpy())
        device, targets_N = states_ND.device, batch["targets"]
        ids_NK = torch.from_numpy(rows["top_ids"].astype(np.int64)).to(device)
        distance_NK = rows["log_sum_exp"][:, None] - rows["scores"]  # −log p of each candidate
        negatives = self._negatives(batch).to(device)
        teacher_batch = distill.TeacherBatch(
            teacher_ids_BK=ids_NK,
            target_log_prob_B=torch.from_numpy(rows["target_log_prob"]).to(device),
            targets_B=targets_N,
            negatives_BN=negatives[:, None],
            candidate_distance_BK=torch.from_numpy(distance_NK).to(device),
            propensity_V1=self.propensity if self.distillation.alpha else None,
        )
        scores_NV = states_ND @ table_VD.t().to(states_ND.dtype)
        return distill.distillation_loss(scores_NV, teacher_batch, self.distillation, own)

    def _negatives(self, batch: dict) -> Tensor:
        """One item for each real position that its user does not watch in the train part, (N,)."""
        items = len(self.model.item_table.weight)
        users_N = batch["users"].cpu()[batch["positions"].cpu() // batch["items"].shape[1]]
        drawn_N = torch.randint(1, items, users_N.shape)
        for _ in range(REDRAWS):
            seen_N = torch.from_numpy(_is_in(self.watched, (users_N * items + drawn_N).numpy()))
            if not seen_N.any():
                break
            drawn_N[seen_N] = torch.randint(1, items, (int(seen_N.sum()),))
        return drawn_N

    def scorer(self, batch_size: int) -> Scorer:
        """Scores with the vectors as they are when scoring begins."""

        def score(queries: Queries) -> Iterator[tuple[np.ndarray, Tensor]]:
            with torch.no_grad():
                input_VD, table_VD = self.vectors()
            return scorer(self.model, self.settings, batch_size, input_VD, table_VD)(queries)

        return score

    def save(self, folder: Path) -> None:
        """Write a plain student; `input_vectors.npy` beside it where input and output tables
        differ.
        """
        with torch.no_grad():
            input_VD, table_VD = self.vectors()
        state = self.model.state_dict() | {"item_table.weight": table_VD}
        write_student(state, folder)
        if input_VD is not table_VD:
            np.save(folder / "input_vectors.npy", input_VD.cpu().numpy())


def _watched_keys(prepared: Prepared) -> np.ndarray:
    """user · (V+1) + item of every interaction of the train part, sorted."""
    users = np.repeat(np.arange(prepared.num_users), np.diff(prepared.offsets))
    keys = users * (prepared.num_items + 1) + prepared.items
    held_out = np.concatenate([prepared.offsets[1:] - 2, prepared.offsets[1:] - 1])
    return np.unique(np.delete(keys, held_out))


def _is_in(sorted_keys: np.ndarray, keys: np.ndarray) -> np.ndarray:
    where = np.searchsorted(sorted_keys, keys)
    return sorted_keys[np.minimum(where, len(sorted_keys) - 1)] == keys


def _standardised(vectors_V1H: Tensor) -> Tensor:
    """Centre and scale the item rows: language-model states share a large common part."""
    items = vectors_V1H[1:]
    centred = items - items.mean(0)
    return F.pad(centred / centred.std().clamp_min(1e-6), (0, 0, 1, 0))


def save_student(model: SASRec, folder: Path) -> None:
    """Write the weights as `model.safetensors`."""
    write_student(model.state_dict(), folder)


def write_student(state: dict[str, Tensor], folder: Path) -> None:
    """Write a SASRec state dictionary into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous().cpu() for k, v in state.items()}, folder / "model.safetensors")


def load_student(folder: Path, items: int, settings: StudentSettings) -> SASRec:
    """Read a student back on the CPU. Raises InputError when keys or shapes are not exactly this
    model's.
    """
    model = SASRec(items, settings)
    path = folder / "model.safetensors"
    if not path.is_file():
        raise InputError(
            f"{path}: no such checkpoint; run the stage student_fit first, or give its folder"
        )
    state = load_file(path)
    found = {name: tuple(value.shape) for name, value in state.items()}
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if found != wanted:
        wrong = sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
        raise InputError(
            f"{path}: checkpoint does not fit the student settings; first difference {wrong[0]}: "
            f"found {found.get(wrong[0])}, wanted {wanted.get(wrong[0])}"
        )
    model.load_state_dict(state)
    return model
