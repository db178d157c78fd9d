"""Stores what a device has made from a thread, so that the next forward need not wait.

On a GPU the columns are made where the scores are and leave it on a stream of their own, into
pinned memory; on a CPU the thread makes them too, as that is work for the host.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

MOST_WAITING = 2
"""Batches on their way at most: memory stays bounded, and a slow disk slows the device down."""
Columns = dict[str, Tensor]


class Overlapped:
    """Calls `store(rows, **make(*tensors))`, as arrays, one batch after the other in the order
    given; `store` runs in a thread.

    What is raised there is raised by a later call, at the latest at the end of the block. A block
    that ends by an error of its own, Ctrl-C included, stores what it was given before.
    """

    def __init__(self, make: Callable[..., Columns], store: Callable[..., None]):
        self._make, self._store = make, store
        self._thread = ThreadPoolExecutor(1, "store")
        self._waiting: deque[Future] = deque()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.shutdown(wait=True)
        if error is None:
            for batch in self._waiting:
                batch.result()

    def __call__(self, rows: np.ndarray, *tensors: Tensor) -> None:
        """Store what is made of the tensors; nobody may write to them afterwards."""
        while len(self._waiting) >= MOST_WAITING:
            self._waiting.popleft().result()
        if tensors[0].is_cuda:
            host, arrived = self._to_host(self._make(*tensors))
            work = self._thread.submit(self._store_arrived, rows, host, arrived)
        else:
            work = self._thread.submit(self._store_made, rows, *tensors)
        self._waiting.append(work)

    @torch.inference_mode()
    def _store_made(self, rows: np.ndarray, *tensors: Tensor) -> None:
        columns = self._make(*tensors)
        self._store(rows, **{name: column.numpy() for name, column in columns.items()})

    def _store_arrived(self, rows: np.ndarray, host: Columns, arrived: torch.cuda.Event) -> None:
        arrived.synchronize()
        self._store(rows, **{name: column.numpy() for name, column in host.items()})

    def _to_host(self, columns: Columns) -> tuple[Columns, torch.cuda.Event]:
        device = next(iter(columns.values())).device
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        side = self._streams[device]
        side.wait_stream(torch.cuda.current_stream(device))
        host = {}
        with torch.cuda.stream(side):
            for name, column in columns.items():
                host[name] = torch.empty(column.shape, dtype=column.dtype, pin_memory=True)
                host[name].copy_(column, non_blocking=True)
                column.record_stream(side)  # its memory is not given away before it is copied
            return host, side.record_event()
