"""Recorder and player of NVML calls: both take the place of the driver's library below the real
binding.

A trace is JSON lines: a head that says where it comes from, then one line for each C call with its
time, what was given, the code and what was filled in. To record what a sampler asks on a machine
with a GPU:

    NVML_TRACE=out.jsonl ILORA_BENCH_NVML_LIBRARY=nvml_player:recorder PYTHONPATH=tests \\
        python -m bench.metering.sampler_process samples.jsonl --device cuda:0
"""

import ctypes
import json
import os
import signal
import time
from pathlib import Path
from typing import Any, TextIO

TRACE_VARIABLE = "NVML_TRACE"
NVML = "libnvidia-ml.so.1"
NOT_FOUND = 6


# ---- C values as JSON ----


def to_json(value: Any) -> Any:
    """A structure by its fields, an array without its empty end, a pointer by its address."""
    if isinstance(value, ctypes.Union):
        return int.from_bytes(bytes(value), "little")
    if isinstance(value, ctypes.Structure):
        return {field[0]: to_json(getattr(value, field[0])) for field in value._fields_}
    if isinstance(value, ctypes.Array):
        if value._type_ is ctypes.c_char:
            return value.value.decode(errors="replace")
        items = [to_json(item) for item in value]
        while items and not any(bytes(value[len(items) - 1])):
            items.pop()
        return items
    if isinstance(value, ctypes._Pointer):
        return ctypes.cast(value, ctypes.c_void_p).value
    if isinstance(value, ctypes._SimpleCData):
        value = value.value
    return value.decode() if isinstance(value, bytes) else value


def fill(target: Any, value: Any) -> None:
    """Write into a C value what `to_json` said of one."""
    if isinstance(target, ctypes.Union):
        raw = value.to_bytes(ctypes.sizeof(target), "little")
        ctypes.memmove(ctypes.addressof(target), raw, len(raw))
    elif isinstance(target, ctypes.Structure):
        for name, part in value.items():
            old = getattr(target, name)
            if isinstance(old, ctypes.Structure | ctypes.Union | ctypes.Array):
                fill(old, part)
            else:
                setattr(target, name, part.encode() if isinstance(part, str) else part)
    elif isinstance(target, ctypes.Array) and target._type_ is ctypes.c_char:
        target.value = value.encode()
    elif isinstance(target, ctypes.Array):
        for index, part in enumerate(value):
            fill(target[index], part)
    elif isinstance(target, ctypes._Pointer):
        ctypes.c_void_p.from_buffer(target).value = value
    else:
        target.value = value


def given(arguments: tuple[Any, ...]) -> list[Any]:
    return [to_json(argument) for argument in arguments if filled(argument) is None]


def filled(argument: Any) -> Any:
    """What a call fills in through this argument, None if it is only read."""
    if type(argument).__name__ == "CArgObject":  # byref(…)
        return argument._obj
    return argument if isinstance(argument, ctypes.Array) else None


# ---- the two libraries ----


class Recorder:
    """Passes every call on to a library and writes it down."""

    def __init__(self, library: Any, file: TextIO, head: str = "recorded"):
        self._library, self._file = library, file
        self._write({"trace": head})

    def __getattr__(self, name: str) -> Any:
        try:
            function = getattr(self._library, name)
        except AttributeError:
            self._write({"function": name, "missing": True})
            raise
        if name == "nvmlErrorString":  # the binding sets its return type
            return function

        def call(*arguments: Any) -> int:
            code = function(*arguments)
            outputs = [out for argument in arguments if (out := filled(argument)) is not None]
            self._write(
                {
                    "time_s": time.monotonic(),
                    "function": name,
                    "given": given(arguments),
                    "code": code,
                    "filled": [to_json(out) for out in outputs],
                }
            )
            return code

        return call

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


class Player:
    """Answers each call as the trace did at that time since its first call.

    A call the trace does not know is a missing function, one with other arguments finds nothing; a
    line that `kills` ends the process that asks.
    """

    def __init__(self, path: Path, clock: Any = time, pids: dict[int, int] | None = None):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        self.head, calls = lines[0], [line for line in lines[1:] if "missing" not in line]
        self._clock, self._pids, self._begun_s = clock, pids or {}, None
        self._first_s = min(line["time_s"] for line in calls)
        self._answers: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for line in calls:
            by_arguments = self._answers.setdefault(line["function"], {})
            by_arguments.setdefault(json.dumps(line["given"]), []).append(line)

    def __getattr__(self, name: str) -> Any:
        if name not in self._answers:
            raise AttributeError(name)

        def call(*arguments: Any) -> int:
            answers = self._answers[name].get(json.dumps(given(arguments)))
            if answers is None:
                return NOT_FOUND
            line = self._present(answers)
            if line.get("kills"):
                os.kill(os.getpid(), signal.SIGKILL)
            outputs = [out for argument in arguments if (out := filled(argument)) is not None]
            for out, value in zip(outputs, line["filled"], strict=True):
                fill(out, self._here(value))
            return line["code"]

        return call

    def _present(self, answers: list[dict[str, Any]]) -> dict[str, Any]:
        """The last answer given until now."""
        now_s = self._clock.monotonic()
        if self._begun_s is None:
            self._begun_s = now_s
        past_s = self._first_s + now_s - self._begun_s + 1e-9
        return [answers[0], *(line for line in answers if line["time_s"] <= past_s)][-1]

    def _here(self, value: Any) -> Any:
        """Process lists with the numbers that processes have now."""
        if isinstance(value, list):
            return [self._here(item) for item in value]
        if isinstance(value, dict) and "pid" in value:
            return value | {"pid": self._pids.get(value["pid"], value["pid"])}
        return value


def __getattr__(name: str) -> Any:
    """`recorder` and `player`, made when a sampler process asks for them."""
    path = Path(os.environ.get(TRACE_VARIABLE, ""))
    if name == "recorder":
        return Recorder(ctypes.CDLL(NVML), path.open("w", encoding="utf-8"))
    if name == "player":
        return Player(path, pids={1000: os.getppid()})
    raise AttributeError(name)
