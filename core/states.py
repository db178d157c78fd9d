"""SASRec states of histories, which drive the teacher's gates: one pass for all prefixes of a user.

Shapes: Q queries, D width.
"""

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from core.ranking import Queries
from core.sasrec import SASRec


@torch.no_grad()
def encoder_states(encoder: SASRec, queries: Queries, batch_size: int = 256) -> Tensor:
    """SASRec state of every query's history, (Q, D) fp32 on the CPU; once for each split.

    Left-aligned rows give a prefix the state of that position in the longer row, so one row serves
    all prefixes of a user that fit the window; only longer histories, whose window has moved on,
    get a row of their own.
    """
    device, most = encoder.item_table.weight.device, encoder.max_length
    states = torch.empty(len(queries), encoder.item_table.weight.shape[1])
    position = np.minimum(queries.lengths, most) - 1
    # The longest row with the same first item serves the others; beyond the window the first item
    # differs for each.
    first = np.maximum(queries.ends - most, queries.starts)
    order = np.lexsort((queries.lengths, first))
    longest = np.append(first[order][1:] != first[order][:-1], True)
    serving = order[longest]
    group = np.empty(len(queries), dtype=np.int64)
    group[order] = np.cumsum(longest) - longest
    members = np.argsort(group, kind="stable")
    bounds = np.searchsorted(group[members], np.arange(len(serving) + 1))
    by_length = np.argsort(position[serving], kind="stable")
    for start in range(0, len(serving), batch_size):
        chosen = by_length[start : start + batch_size]
        items, _ = queries.newest(serving[chosen], most)
        found = encoder(torch.from_numpy(items).to(device)).float().cpu()
        rows = np.concatenate([members[bounds[g] : bounds[g + 1]] for g in chosen])
        line = np.repeat(np.arange(len(chosen)), bounds[chosen + 1] - bounds[chosen])
        states[torch.from_numpy(rows)] = found[
            torch.from_numpy(line), torch.from_numpy(position[rows])
        ]
    return states


class States:
    """The last SASRec states that were asked for, so that each validation of a training need not
    make them anew.
    """

    def __init__(self) -> None:
        self._asked: tuple = ()
        self._items, self._states = np.empty(0), torch.empty(0)

    def of(self, encoder: SASRec, queries: Queries) -> Tensor:
        """`encoder_states`, kept until other weights or other queries are asked for."""
        # The items themselves may be larger than memory; they are never written to.
        asked = (_digest(encoder), _digest_of([queries.starts, queries.ends]), id(queries.items))
        if self._asked != asked:
            self._states = encoder_states(encoder, queries)
            self._asked, self._items = asked, queries.items  # held: no other gets its id
        return self._states


def _digest(module: nn.Module) -> bytes:
    return _digest_of(value.cpu().numpy() for value in module.state_dict().values())


def _digest_of(arrays: Iterable[np.ndarray]) -> bytes:
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array).data)
    return found.digest()
