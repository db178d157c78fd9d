"""Storing from a thread: order, errors with their text, interrupts, bounded waiting."""

import threading

import numpy as np
import pytest
import torch

from core import outputs
from core.overlap import MOST_WAITING, Overlapped


def doubled(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"values": 2 * tensor}


def test_batches_are_stored_in_order_from_another_thread():
    stored, threads = [], set()

    def store(rows, values):
        threads.add(threading.get_ident())
        stored.append((rows.tolist(), values.tolist()))

    with Overlapped(doubled, store) as overlapped, torch.inference_mode():
        for i in range(20):
            overlapped(np.array([i]), torch.tensor([float(i)]))
    assert stored == [([i], [2.0 * i]) for i in range(20)]
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_the_device_need_not_wait_but_never_runs_far_ahead():
    go, given, stored = threading.Event(), [], []

    def store(rows, values):
        assert go.wait(10)
        stored.append(rows[0])

    def producer():
        with Overlapped(doubled, store) as overlapped:
            for i in range(10):
                overlapped(np.array([i]), torch.zeros(1))
                given.append(i)

    thread = threading.Thread(target=producer)
    thread.start()
    for _ in range(200):
        if len(given) == MOST_WAITING:
            break
        thread.join(0.01)
    thread.join(0.1)
    assert given == list(range(MOST_WAITING)) and not stored
    go.set()
    thread.join(10)
    assert stored == given == list(range(10))


@pytest.mark.parametrize("batches", [1, 20])
def test_an_error_of_the_thread_reaches_the_caller_with_its_text(batches):
    def store(rows, values):
        raise OSError("28: no space left on device")

    with pytest.raises(OSError, match="no space left"), Overlapped(doubled, store) as overlapped:
        for i in range(batches):
            overlapped(np.array([i]), torch.zeros(1))


def test_an_error_while_making_reaches_the_caller_too():
    def make(tensor):
        raise ValueError("cannot be made")

    with (
        pytest.raises(ValueError, match="cannot be made"),
        Overlapped(make, print) as overlapped,
    ):
        overlapped(np.array([0]), torch.zeros(1))


def test_what_was_given_before_an_interrupt_is_stored_and_the_rest_resumes(tmp_path):
    def said(scores, embedding):
        ids = torch.tensor([[1, 2]], dtype=torch.int32).expand(len(scores), 2)
        columns = {"top_ids": ids, "scores": scores, "log_sum_exp": scores[:, 0]}
        return columns | {"target_log_prob": -scores[:, 0], "embedding": embedding}

    def writer():
        return outputs.Writer(tmp_path / "teacher", samples=9, top_k=2, width=3, hashes={})

    def give(overlapped, rows):
        scores = torch.tensor([[2.0, 1.0]]).expand(len(rows), 2)
        overlapped(rows, scores, torch.ones(len(rows), 3))

    with (
        pytest.raises(KeyboardInterrupt),
        writer() as out,
        Overlapped(said, out.write) as overlapped,
    ):
        give(overlapped, np.arange(0, 3))
        give(overlapped, np.array([7, 5]))
        raise KeyboardInterrupt
    with writer() as out:
        assert out.missing().tolist() == [3, 4, 6, 8]
        with Overlapped(said, out.write) as overlapped:
            give(overlapped, out.missing())
        out.finish(np.zeros((5, 3)))
    assert outputs.Outputs.open(tmp_path / "teacher").samples == 9


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused_by_the_writer(tmp_path, bad):
    from core.stages import output_columns

    scores = torch.randn(4, 9)
    scores[2, 5] = bad
    with (
        pytest.raises(ValueError, match="not finite"),
        outputs.Writer(tmp_path / "o", samples=4, top_k=2, width=3, hashes={}) as out,
        Overlapped(lambda *given: output_columns(*given, kept=2), out.write) as overlapped,
    ):
        overlapped(np.arange(4), scores, torch.tensor([1, 2, 3, 4]), torch.ones(4, 3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_columns_of_a_gpu_arrive_whole():
    stored = []
    with Overlapped(doubled, lambda rows, values: stored.append(values.copy())) as overlapped:
        for i in range(50):
            overlapped(np.array([i]), torch.full((1 << 20,), float(i), device="cuda"))
    assert all((values == 2 * i).all() for i, values in enumerate(stored))
