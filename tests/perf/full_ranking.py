"""Full ranking from user states against ways that go user by user; equal ranks come first.

`python -m tests.perf.full_ranking` prints the ratios at MovieLens-1M's size, measured in turns.

Shapes: U users, D width, V items (row 0 of the vectors = padding).
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import typer
from torch import Tensor

from core import item_scores, ranking
from core.data import Prepared
from core.pipeline import prepare_process
from core.ranking import Queries
from core.settings import EvalSettings, Settings

USERS, ITEMS, WIDTH = 6040, 3706, 64
BATCH, CUTOFFS = 256, (5, 10, 20)


@dataclass
class Ranked:
    """Users with histories, states, and the vectors they are scored with."""

    prepared: Prepared
    states_UD: Tensor
    vectors_VD: Tensor

    @classmethod
    def drawn(cls, users: int, items: int = ITEMS) -> "Ranked":
        """Random states; histories as long as MovieLens-1M's, 165 items in the mean."""
        random = np.random.default_rng(0)
        lengths = 20 + random.exponential(145, users).astype(int).clip(max=items // 2)
        drawn = [random.permutation(items)[:length] + 1 for length in lengths]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        sequences = np.concatenate(drawn).astype(np.int32)
        prepared = Prepared(sequences, offsets, [""] * (items + 1), np.arange(users), {}, "")
        torch_random = torch.Generator().manual_seed(0)
        states, vectors = (
            torch.randn(rows, WIDTH, generator=torch_random) for rows in (users, items + 1)
        )
        return cls(prepared, states, vectors)

    def now(self) -> list[float]:
        """The pipeline's evaluator, metrics and loss included."""

        def score(queries: Queries) -> Iterator[tuple[np.ndarray, Tensor]]:
            for rows in queries.by_length(BATCH, 50):
                states = self.states_UD[torch.from_numpy(rows)]
                for part, scores in item_scores.in_parts(states, self.vectors_VD):
                    yield rows[part], scores

        with torch.inference_mode():
            return ranking.evaluate(score, self.prepared, "test", EvalSettings())[1]

    def by_counting_loop(self) -> list[float]:
        """The leanest loop over users in torch: product, mask, two counts; no loss, no metrics."""
        ranks = []
        with torch.inference_mode():
            for user in range(self.prepared.num_users):
                history, target = self.prepared.test(user)
                scores = self.vectors_VD @ self.states_UD[user]
                own = scores[target].clone()
                scores[torch.from_numpy(history.astype(np.int64))] = -torch.inf
                scores[0] = -torch.inf
                scores[target] = own
                above, equal = (scores > own).sum().item(), (scores == own).sum().item()
                ranks.append(above + (equal - 1) / 2)
        return ranks

    def by_sorting_loop(self) -> list[float]:
        """One user after the other as evaluation loops usually are: product, mask, full sort, the
        target's place, then its gain at each cut-off.
        """
        ranks, hits, gains = [], dict.fromkeys(CUTOFFS, 0.0), dict.fromkeys(CUTOFFS, 0.0)
        with torch.inference_mode():
            for user in range(self.prepared.num_users):
                history, target = self.prepared.test(user)
                scores = self.vectors_VD @ self.states_UD[user]
                own = scores[target].clone()
                scores[torch.from_numpy(history.astype(np.int64))] = -torch.inf
                scores[0] = -torch.inf
                scores[target] = own
                order = scores.argsort(descending=True)
                place = int((order == target).nonzero())
                for k in CUTOFFS:
                    hits[k] += place < k
                    gains[k] += 1 / np.log2(place + 2) if place < k else 0.0
                ranks.append(float(place))
        return ranks

    def by_list_loop(self) -> list[float]:
        """One user after the other with Python lists: sort all items, find the target."""
        ranks = []
        for user in range(self.prepared.num_users):
            history, target = self.prepared.test(user)
            scores = (self.vectors_VD @ self.states_UD[user]).tolist()
            seen = set(history.tolist())
            items = [item for item in range(1, len(scores)) if item == target or item not in seen]
            items.sort(key=lambda item: scores[item], reverse=True)
            ranks.append(float(items.index(target)))
        return ranks


def main(users: int = USERS, repeats: int = 5) -> None:
    """Print the ratios, CPU time of one thread, every way once in each of the repeats."""
    prepare_process(Settings())  # the allocator as in every stage, for all ways
    torch.set_num_threads(1)
    work = Ranked.drawn(users)
    ways = {
        "list loop": work.by_list_loop,
        "torch loop, sorting": work.by_sorting_loop,
        "torch loop, counting": work.by_counting_loop,
        "now": work.now,
    }
    ranks = {name: way() for name, way in ways.items()}
    same = {name: np.mean(np.array(own) == ranks["now"]) for name, own in ranks.items()}
    typer.echo(f"users {users}, items {ITEMS}, equal ranks: {same}")  # products round differently
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            begun = time.process_time()
            way()
            seconds[name].append(time.process_time() - begun)
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds["now"], strict=True)]
        typer.echo(
            f"{name}: {1000 * statistics.median(own):.0f} ms "
            f"({1000 * min(own):.0f} to {1000 * max(own):.0f}), ratio "
            f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
        )


if __name__ == "__main__":
    typer.run(main)
