"""The observer of a profiled stage: a script says which steps are probed, counted and traced.

Worker side: imports torch.
"""

import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, schedule

from bench.profile import counting
from bench.profile.snapshots import History
from core.observe import Observer, Step

PROBES, ACTIVE = 3, 3
"""Steps on an idle device; steps in the trace."""


class Profiled(Observer):
    """The observer of a profiled stage. A script says what is done to which step, and goes on to
    its next line whenever one has ended.
    """

    def __init__(
        self,
        said: Observer,
        device: torch.device,
        history: History,
        files: dict[str, Path],
        warmup_steps: int,
    ):
        super().__init__(self._stepped, self._entered, said.on_validation)
        self.probed: list[dict[str, float]] = []
        self.counted: dict[str, float] | None = None
        self.sizes: Any = None
        self.script = self._script(1 + warmup_steps)  # the first is the observed one
        self._said, self._device, self._history, self._files = said, device, history, files
        self._phase = self._home = ""
        """Phase the stage is in; phase its steps lie in."""
        self._interrupted = False
        self._tokens = (0, 0)
        self._count_next = False
        self._counter: counting.Arithmetic | None = None
        next(self.script)
        said.learnt = lambda: self.learnt()

    def missing(self) -> str | None:
        """Why there is no trace."""
        if self._files["trace"].is_file():
            return None
        steps, needed = self.counts["micro_batches"], PROBES + 1 + 1 + ACTIVE
        return (
            f"{steps} steps: a trace needs {needed} after the warm-up, the last {1 + ACTIVE} of "
            "them in one stretch"
        )

    # ---- what the stage tells ----

    def _stepped(self, step: Step) -> None:
        self._home = self._phase
        with suppress(StopIteration):  # the script has ended
            self.script.send(step)
        self._tokens = self._inference_tokens()
        self._said.on_step(step)

    def _entered(self, phase: str) -> None:
        self._phase = phase
        self._interrupted = self._interrupted or phase != self._home
        self._said.on_phase(phase)

    def backbone_call(self, module: nn.Module, args: tuple, given: dict) -> None:
        """Also read the sizes of the backbone, the first time it is seen."""
        self.sizes = self.sizes or counting.backbone_sizes(module)
        super().backbone_call(module, args, given)

    @contextmanager
    def first_step(self) -> Iterator[None]:
        """Around the forward and backward of every step: the one to count runs under counters."""
        if not self._count_next or self._phase != self._home:
            with super().first_step():
                yield
            return
        self._count_next = False
        with self.uncompiled(), counting.Arithmetic() as self._counter:
            yield
        self.counted = {
            name: getattr(self._counter, name) for name in ("flops", "bytes", "head_flops")
        }
        self._counter = None

    @contextmanager
    def backbone(self) -> Iterator[None]:
        """Tell the counters, too, which part of a step is the backbone's."""
        with super().backbone():
            if self._counter:
                self._counter.inside_backbone = True
            yield
            if self._counter:
                self._counter.inside_backbone = False

    # ---- what is done to the steps ----

    def _script(self, before: int) -> Generator[None, Step, None]:
        """Each `yield` waits for the end of the next step."""
        for _ in range(before):
            yield
        self._history.stop()
        while len(self.probed) < PROBES:
            yield from self._probe()
        self._history.record()
        yield from self._count()
        while not self._files["trace"].is_file():
            yield from self._trace()
        self._history.save(self._files["snapshot"])

    def _probe(self) -> Generator[None, Step, None]:
        """Time one step that begins and ends with an idle device; one with a break in it is left
        out.
        """
        self._interrupted = False
        self._wait_for_device()
        begun, cpu_s, waited_s = time.perf_counter(), time.process_time(), self.loader_wait_s
        step = yield
        issued = time.perf_counter()
        self._wait_for_device()
        if self._interrupted:
            return
        tokens, padded_tokens = self._tokens_of(step)
        self.probed.append(
            {
                "seconds": time.perf_counter() - begun,
                "issue_s": issued - begun,
                "cpu_s": time.process_time() - cpu_s,
                "wait_s": self.loader_wait_s - waited_s,
                "samples": step.samples,
                "tokens": tokens,
                "padded_tokens": padded_tokens,
            }
        )

    def _count(self) -> Generator[None, Step, None]:
        """Have the next step counted; a stage that marks no steps for the census has none."""
        self._count_next = True
        step = yield
        self._count_next = False
        if self.counted is not None:
            tokens, padded_tokens = self._tokens_of(step)
            self.counted |= {
                "samples": step.samples,
                "tokens": tokens,
                "padded_tokens": padded_tokens,
            }

    def _trace(self) -> Generator[None, Step, None]:
        """Trace some steps in a row; a break among them spoils the trace."""
        on_cuda = self._device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
        # The profiler's own start falls into its warm-up.
        plan = schedule(wait=0, warmup=1, active=ACTIVE, repeat=1)
        self._interrupted = False
        with ExitStack() as until_broken:
            profiler = until_broken.enter_context(
                profile(
                    activities=activities, schedule=plan, record_shapes=True, profile_memory=True
                )
            )
            for number in range(1 + ACTIVE):
                yield
                if self._interrupted:
                    return
                if number == ACTIVE:
                    self._wait_for_device()
                profiler.step()
        with self._said.phase("trace"):
            profiler.export_chrome_trace(str(self._files["trace"]))
        self._said.on_phase(self._phase)

    def _wait_for_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _inference_tokens(self) -> tuple[int, int]:
        return self.counts["inference_tokens"], self.counts["inference_padded_tokens"]

    def _tokens_of(self, step: Step) -> tuple[int, int]:
        """Real and padded tokens of a step; where nothing is trained they are counted apart."""
        if step.tokens:
            return step.tokens, step.padded_tokens
        before, now = self._tokens, self._inference_tokens()
        return now[0] - before[0], now[1] - before[1]
