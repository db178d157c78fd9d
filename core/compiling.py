"""How the teacher's backbone runs: as Python, or compiled layer by layer or whole; what compiling
cost, and whether the steps really ran in compiled code.
"""

import functools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, _dynamo, nn
from torch._guards import CompileContext
from torch.fx.experimental import _config as symbolic_shapes
from torch.utils.checkpoint import checkpoint

from core.observe import Observer

BACKEND = "inductor"
# Packed batches have one shape in training and one in scoring, and are compiled for those. Batches
# of one prompt a row have nearly each another length; for them, inductor took for a tiny OPT on
# one core (training, evaluation, item embeddings; regional / whole): True 40 / 37 s with 3 graphs;
# None, which takes the first shapes for fixed ones, 58 / 58 with 5, and the steps are no faster;
# False makes a graph for each length until the limit of 8 ends compiling.
DYNAMIC = True
REASONS, REASON_CHARACTERS = 5, 200
LIMIT_MESSAGE = "torch._dynamo hit config."


class Execution:
    """The way a backbone runs under `train.compile`, with counts of what ran how.

    `regional` compiles the forward of each decoder layer; layers that differ only in their weights
    share the code. `whole` compiles the forward of the backbone. Random numbers of compiled dropout
    are other ones than eager's; all else agrees to rounding.
    """

    def __init__(self, backbone: nn.Module, mode: str, one_shape: bool = False):
        self.mode, self.one_shape = mode, one_shape
        self.compiled_calls = 0
        """Calls into compiled graphs."""
        self.eager_calls = 0
        """Calls of layers that ran as Python though they were to run compiled."""
        self.first_layer_calls = 0
        """Calls as Python of what the first layer holds; recomputed in backward it is called again.
        """
        self.recompiles = 0
        self._plain = mode == "off"
        layers = next(m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m))
        self._first = next(layers[0].children())
        # Compiled layers get it all: with a hook of its own, the first would share no code.
        entered = self._entered
        for layer in layers[:1] if mode == "off" else layers:
            next(layer.children()).register_forward_pre_hook(entered)
        if mode != "off":
            _prepare_compiler()
            _make_traceable(backbone)
            compile_graph = self._compile_graph
            for part in layers if mode == "regional" else [backbone]:
                part.forward = self._switched(part.forward, compile_graph)

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Run as Python inside the block: a census sees no operator of a compiled graph."""
        before, self._plain = self._plain, True
        try:
            yield
        finally:
            self._plain = before

    def any_shape(self) -> AbstractContextManager:
        """Around forwards of other shapes than the batches': code for one shape is not for them."""
        return self.uncompiled() if self.one_shape else nullcontext()

    def _switched(self, forward: Callable, compile_graph: Callable) -> Callable:
        dynamic = DYNAMIC and not self.one_shape
        compiled = torch.compile(forward, backend=compile_graph, dynamic=dynamic)

        @functools.wraps(forward)
        def run(*args: Any, **options: Any) -> Any:
            return (forward if self._plain else compiled)(*args, **options)

        return run

    def _compile_graph(self, graph: torch.fx.GraphModule, inputs: list) -> Callable:
        """The backend's code for a graph, its calls counted."""
        code = _dynamo.lookup_backend(BACKEND)(graph, inputs)
        # The second number of an identity like 4/1 counts the versions of one function.
        self.recompiles += bool(CompileContext.current_compile_id().frame_compile_id)

        def counted(*args: Any) -> Any:
            self.compiled_calls += 1
            return code(*args)

        return counted

    def _entered(self, module: nn.Module, inputs: tuple) -> None:
        if torch.compiler.is_compiling():
            return  # traced, not called
        self.first_layer_calls += module is self._first
        self.eager_calls += not self._plain


def _prepare_compiler() -> None:
    # Dynamo keeps code and counts recompiles for each function of transformers, whatever model it
    # serves: what an earlier stage has compiled is neither this one's merit nor its limit.
    _dynamo.reset()
    # The gate's factors are found by way of a layer's hook, so they count as the layer's property,
    # whose shape is fixed unless said otherwise: one graph for each length again.
    _dynamo.config.force_nn_module_property_static_shapes = False
    # A length that happens to equal a head's width is not tied to it.
    if hasattr(symbolic_shapes, "use_duck_shape"):  # not in the oldest torch
        symbolic_shapes.use_duck_shape = False


def _make_traceable(backbone: nn.Module) -> None:
    """Give the compiler a checkpointing it accepts: one without a context for the recomputation.

    None is needed there: what the gate reads is an input of the graph, kept like any other.
    """

    def traceable(recompute: Callable) -> Callable:
        def run(function: Callable, *args: Tensor) -> Any:
            if torch.compiler.is_compiling():
                return checkpoint(function, *args, use_reentrant=False)
            return recompute(function, *args)

        return run

    for module in backbone.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = traceable(module._gradient_checkpointing_func)


@contextmanager
def account(execution: Execution, observer: Observer) -> Iterator[None]:
    """For one stage: compiling is a phase, and what came of it the fact `compile`.

    Whatever this process compiles counts, so that `off` with a graph shows.
    """
    counters = _dynamo.utils.counters
    names = ("stats", "frames", "graph_break", "inductor")
    before = {name: counters[name].copy() for name in names}
    phases: list[tuple[AbstractContextManager, float]] = []
    reached: list[str] = []

    def begins(*_: Any) -> None:
        phase = observer.phase("compile")
        phases.append((phase, time.perf_counter()))
        phase.__enter__()

    def ends(*_: Any) -> None:
        phases.pop()[0].__exit__(None, None, None)

    def notice(record: logging.LogRecord) -> bool:
        if record.msg.startswith(LIMIT_MESSAGE):
            reached.append(record.getMessage())
        return True

    def learnt() -> dict[str, float]:
        # Another thread asks, so nothing here may walk through what is being written.
        running_s = time.perf_counter() - phases[-1][1] if phases else 0.0
        breaks = sum(list(counters["graph_break"].values())) - before["graph_break"].total()
        graphs = counters["stats"]["unique_graphs"] - before["stats"]["unique_graphs"]
        return {
            "compile_s": observer.phases["compile"] + running_s,
            "graphs": graphs,
            "breaks": breaks,
        }

    observer.uncompiled, observer.learnt = execution.uncompiled, learnt
    handler, log = _dynamo.callback_handler, logging.getLogger("torch._dynamo.convert_frame")
    handler.register_start_callback(begins)
    handler.register_end_callback(ends)
    log.addFilter(notice)
    try:
        yield
    finally:
        log.removeFilter(notice)
        for callbacks, own in ((handler.start_callbacks, begins), (handler.end_callbacks, ends)):
            if own in callbacks:  # a reset for a later model drops it
                callbacks.remove(own)
        made = {name: counters[name] - before[name] for name in names}
        observer.facts["compile"] = {
            "mode": execution.mode,
            "graphs": made["stats"]["unique_graphs"],
            "breaks": made["graph_break"].total(),
            "break_reasons": _reasons(made["graph_break"]),
            "recompiles": execution.recompiles,
            "limit_reached": bool(reached),
            "seconds": float(observer.phases["compile"]),
            "cache": _cache_use(made["inductor"]),
            "compiled_frames": made["frames"]["ok"],
            "compiled_calls": execution.compiled_calls,
            "eager_calls": execution.eager_calls,
        }


def _reasons(breaks: Counter[str]) -> list[str]:
    """The commonest reasons, each on one line."""
    lines = (" ".join(str(reason).split()) for reason, _ in breaks.most_common(REASONS))
    return [line[:REASON_CHARACTERS] for line in lines]


def _cache_use(inductor: Counter[str]) -> str | None:
    """Whether the code came from inductor's cache on the disk; None where it made none."""
    hits, misses = inductor["fxgraph_cache_hit"], inductor["fxgraph_cache_miss"]
    if hits and misses:
        return "mixed"
    if hits:
        return "cached"
    return "cold" if misses else None
