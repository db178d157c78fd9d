"""A matrix file as cells and as an order of execution; imports no torch."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails

from bench.overrides import Axes, Entry, Overrides, flatten, nest, nested, problem, refuse, show
from bench.schedule.autos import stand_in, written
from bench.schedule.budget import Duration
from core import config
from core.config import InputError, Location, did_you_mean
from core.settings import Fraction, Positive, Settings, StageName

_STRICT = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _in_running_order(stages: tuple[StageName, ...]) -> tuple[StageName, ...]:
    order = get_args(StageName)
    problems = [
        problem(f"{stage} runs before {before}; list each stage once, in running order", (place,))
        if stage != before
        else problem(f"{stage} is given twice", (place,))
        for place, (before, stage) in enumerate(itertools.pairwise(stages), start=1)
        if order.index(stage) <= order.index(before)
    ]
    if problems:
        refuse(problems)
    return stages


class WithoutGpu(BaseModel):
    """What replaces leaves of the base, values of axes and the memory limit, without a GPU here."""

    model_config = _STRICT

    base: Overrides = {}
    axes: Axes = {}
    max_memory_gib: Annotated[float, Field(gt=0)] | None = None


class Matrix(BaseModel):
    """One question and the cells that answer it.

    `axes`: dotted leaf, or a short name that only one leaf ends with -> values, the first is the
    baseline's. Design star: each cell differs from the baseline in one axis; grid: every
    combination. `exclude` and `include` mean what they mean in GitHub Actions: an exclude entry
    removes the combinations it matches; an include entry whose axis values match combinations is
    added to those, and else becomes a cell of its own with the other axes at their first value.
    """

    model_config = _STRICT

    question: Annotated[str, Field(min_length=1)]
    """One sentence, shown at the head of the report."""
    stages: Annotated[tuple[StageName, ...], Field(min_length=1), AfterValidator(_in_running_order)]
    """Measured, in running order; what they need from earlier stages is made once, unmeasured."""
    base: Annotated[Settings, BeforeValidator(nested)] = Settings()
    axes: Axes = {}
    design: Literal["star", "grid"] = "star"
    include: tuple[Entry, ...] = ()
    exclude: tuple[Entry, ...] = ()
    repeats: Positive = 5
    """Fresh processes for each cell."""
    max_repeats: Positive | None = None
    """After `repeats` blocks further ones, up to so many in all, of the baseline and the cells
    that are undecided and that those could decide. The looks in between share the error rate.
    """
    remeasures: Annotated[int, Field(ge=0)] = 1
    """How often a repeat that was disturbed (throttled, foreign processes) is measured again."""
    too_slow: Annotated[float, Field(gt=1)] | None = 5.0
    """A cell surely so many times slower than the best one after two blocks is not repeated."""
    budget_s: Duration | None = None
    """Limit of the whole run: no block is started that would not end in time."""
    cell_budget_s: Duration | None = None
    """Limit of all measured processes of one cell."""
    floor: Fraction = 0.02
    """Smallest ratio worth acting on."""
    objective: Literal["time", "memory", "both"] = "time"
    """What the best cell has least of: time of all stages, peak memory, or their product."""
    max_memory_gib: Annotated[float, Field(gt=0)] | None = None
    """A cell whose peak is above this is not recommended; a batch size `auto` stays below it."""
    warmup_steps: Annotated[int, Field(ge=0)] = 2
    """Steps at least kept in the record and left out of the judgement, which finds by itself where
    the steps become steady.
    """
    timeout_s: Annotated[float, Field(gt=0)] = 3600.0
    """Limit of one process."""
    hang_timeout_s: Annotated[float, Field(gt=0)] = 900.0
    """A process without a new step or phase for so long is ended: it hangs."""
    phase_timeouts_s: dict[str, Annotated[float, Field(gt=0)]] = {"compile": 600.0}
    """Limits of single phases of a stage, each time one is entered; `compile` counts in sum."""
    preflight: Literal["auto", "always", "never"] = "auto"
    """Before the first repeat of any cell, a short trial of each: a few steps, save, load in a
    fresh process, compare. `auto` leaves out cells that earlier runs show to be short.
    """
    preflight_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Limit of one cell's trial."""
    without_gpu: WithoutGpu | None = None

    @property
    def most_repeats(self) -> int:
        """Blocks at most."""
        return max(self.repeats, self.max_repeats or 0)

    @model_validator(mode="after")
    def _plannable(self) -> Self:
        """Refuse names and values that fit no axis, then combinations that `Settings` refuses."""
        problems = _unmatched(self)
        if not problems:
            variants = (True,) if self.without_gpu is None else (True, False)
            problems = [problem for has_gpu in variants for problem in _plan(self, has_gpu)[1]]
        if problems:
            refuse(problems)
        return self


@dataclass(frozen=True)
class Cell:
    """One configuration to measure; `key` is the content address of its settings."""

    name: str
    changed: dict[str, Any] = field(hash=False)
    """Dotted leaf -> value where the cell differs from the baseline."""
    settings: Settings
    key: str


def cells(matrix: Matrix, has_gpu: bool) -> list[Cell]:
    """The distinct cells of `matrix`, the baseline first."""
    return _plan(matrix, has_gpu)[0]


def with_limit_of(matrix: Matrix, has_gpu: bool) -> Matrix:
    """The matrix with the limit of memory that holds on a machine with or without a GPU."""
    other = matrix.without_gpu.max_memory_gib if matrix.without_gpu and not has_gpu else None
    return matrix if other is None else matrix.model_copy(update={"max_memory_gib": other})


def schedule(cells: Sequence[Cell], repeats: int) -> list[tuple[int, Cell]]:
    """(block, cell) in order of execution.

    Blocks count from 1; each holds every cell once and starts one cell later than the one before.
    """
    return [
        (block, cells[(block - 1 + place) % len(cells)])
        for block in range(1, repeats + 1)
        for place in range(len(cells))
    ]


def load_matrix(path: Path, sets: Sequence[str] = (), base_file: Path | None = None) -> Matrix:
    """Read a matrix file; raises InputError with all mistakes.

    `base_file` (a settings file) replaces `base` as a whole. Each of `sets` is `key=value`: a key
    that starts with a field of `Matrix` (`repeats`, `axes.teacher.attn`) replaces that, any other
    is a leaf of the base. The command line beats the file: what it replaces is also taken out of
    `without_gpu`, which would undo it on a machine without a GPU. A leaf that is an axis is
    refused, because every cell overrides it. A batch size that is `auto` has a number that stands
    in for it (bench.schedule.autos).
    """
    document = config.read(path)
    if base_file is not None and isinstance(document.root.value, dict):
        base = config.read(base_file)
        document.root.value["base"] = base.root
        document.mistakes += base.mistakes
        _drop(document.root, ["without_gpu", "base"])
    for option in sets:
        above, key = _option_keys(option)
        config.put(document, option, inside=above)
        _drop(document.root, ["without_gpu", *above, *key])
    _order_axes(document.root)
    stand_in(document.root)
    matrix = config.check(document, Matrix)
    for leaf in matrix.axes:
        node = _at(document.root, ["base", *leaf.split(".")])
        if node is not None and node.place.line == 0:  # it was written on the command line
            wrong = f"{leaf} is an axis of this matrix, so every cell has its own value"
            raise InputError(f"{node.place}: {wrong}; write --set axes.{leaf}=[…]")
    return matrix


def resolved(matrix: Matrix) -> str:
    """The matrix as YAML with every key written out; reading it again gives the same cells."""
    return written(config.dump(matrix))


def _option_keys(option: str) -> tuple[list[str], list[str]]:
    """What stands above the key of `--set key=value`, and the key."""
    key = option.partition("=")[0].strip().split(".")
    return [] if key[0] in Matrix.model_fields else ["base"], key


def _order_axes(root: config.Node) -> None:
    """Axes by dotted name in the order they are written; nesting would sort them into groups."""
    axes = root.value.get("axes") if isinstance(root.value, dict) else None
    if axes is not None and isinstance(axes.value, dict):
        written = sorted(
            _ends(axes.value), key=lambda end: (end[1].key_place.line == 0, end[1].key_place)
        )
        axes.value = dict(written)


def _ends(entries: dict[str, config.Node], above: str = "") -> Iterator[tuple[str, config.Node]]:
    for key, node in entries.items():
        if isinstance(node.value, dict):
            yield from _ends(node.value, f"{above}{key}.")
        else:
            yield f"{above}{key}", node


def _drop(root: config.Node, keys: list[str]) -> None:
    group = _at(root, keys[:-1])
    if group is not None and isinstance(group.value, dict):
        group.value.pop(keys[-1], None)


def _at(node: config.Node, keys: list[str]) -> config.Node | None:
    for key in keys:
        if not isinstance(node.value, dict) or key not in node.value:
            return None
        node = node.value[key]
    return node


# ---- combinations -> cells


class Pick(NamedTuple):
    """One chosen value and where the matrix says so."""

    value: Any
    location: Location


Combination = dict[str, Pick]


def _unmatched(matrix: Matrix) -> list[InitErrorDetails]:
    """Entries of `without_gpu.axes` and `exclude` that fit no axis, or no value of it."""
    other = matrix.without_gpu.axes if matrix.without_gpu else {}
    places: list[tuple[Location, str, tuple[Any, ...]]] = [
        (("without_gpu", "axes", *leaf.split(".")), leaf, ()) for leaf in other
    ]
    for number, entry in enumerate(matrix.exclude):
        above = ("exclude", number)
        places += [((*above, *leaf.split(".")), leaf, (value,)) for leaf, value in entry.items()]
    problems = []
    for location, leaf, wanted in places:
        known = matrix.axes.get(leaf, ()) + other.get(leaf, ())
        if leaf not in matrix.axes:
            text = f"{leaf} is not an axis of this matrix{did_you_mean(leaf, matrix.axes)}"
            problems.append(problem(text, location, config.NO_SUCH_SETTING))
        elif wanted and wanted[0] not in known:
            listed = ", ".join(show(value) for value in dict.fromkeys(known))
            text = f"{show(wanted[0])} is not a value of this axis ({listed})"
            problems.append(problem(text, location))
    return problems


def _plan(matrix: Matrix, has_gpu: bool) -> tuple[list[Cell], list[InitErrorDetails]]:
    """The cells of this machine, and what is wrong with the combinations that are none."""
    combinations, problems = _combinations(matrix, has_gpu)
    base = matrix.base.model_dump()
    planned: list[tuple[Combination, Settings]] = []
    for combination in combinations:
        try:
            settings = _with(base, combination)
        except ValidationError as error:
            problems += [_blame(combination, detail["msg"]) for detail in error.errors()]
            continue
        planned.append((combination, settings))
    found: dict[str, Cell] = {}
    for combination, settings in planned:
        cell = _cell(combination, settings, planned[0][1])
        if cell.key in found:
            text = f"has the settings of the cell {found[cell.key].name}"
            problems.append(problem(text, list(combination.values())[-1].location))
        found.setdefault(cell.key, cell)
    return list(found.values()), problems


def _combinations(
    matrix: Matrix, has_gpu: bool
) -> tuple[list[Combination], list[InitErrorDetails]]:
    """Every combination with the place of each value, the baseline first, and what is wrong."""
    axes = _axes_here(matrix, has_gpu)
    baseline = {leaf: picks[0] for leaf, picks in axes.items()}
    if matrix.design == "star":
        steps = [{leaf: pick} for leaf, picks in axes.items() for pick in picks[1:]]
        originals = [baseline, *(baseline | step for step in steps)]
    else:
        grid = itertools.product(*axes.values())
        originals = [dict(zip(axes, picks, strict=True)) for picks in grid]
    problems = [
        problem("removes the baseline, the cell all others are compared with", ("exclude", number))
        for number, entry in enumerate(matrix.exclude)
        if _matches(baseline, entry)
    ]
    kept = [one for one in originals if not any(_matches(one, entry) for entry in matrix.exclude)]
    extras: list[Combination] = [{} for _ in kept]
    alone: list[Combination] = []
    for number, entry in enumerate(matrix.include):
        picks = _picks(entry, ("include", number))
        fixed = {leaf: value for leaf, value in entry.items() if leaf in axes}
        homes = [extra for one, extra in zip(kept, extras, strict=True) if _matches(one, fixed)]
        for extra in homes:
            extra.update({leaf: pick for leaf, pick in picks.items() if leaf not in axes})
        if not homes:
            alone.append(baseline | picks)
    here = _base_here(matrix, has_gpu)
    whole = [one | extra for one, extra in zip(kept, extras, strict=True)]
    return [here | one for one in whole + alone], problems


def _axes_here(matrix: Matrix, has_gpu: bool) -> dict[str, list[Pick]]:
    replaced = matrix.without_gpu.axes if matrix.without_gpu and not has_gpu else {}
    axes = {}
    for leaf, values in matrix.axes.items():
        above: Location = ("without_gpu", "axes") if leaf in replaced else ("axes",)
        path = (*above, *leaf.split("."))
        chosen = replaced.get(leaf, values)
        axes[leaf] = [Pick(value, (*path, place)) for place, value in enumerate(chosen)]
    return axes


def _base_here(matrix: Matrix, has_gpu: bool) -> Combination:
    replaced = matrix.without_gpu.base if matrix.without_gpu and not has_gpu else {}
    return _picks(replaced, ("without_gpu", "base"))


def _picks(values: dict[str, Any], above: Location) -> Combination:
    return {leaf: Pick(value, (*above, *leaf.split("."))) for leaf, value in values.items()}


def _matches(combination: Combination, entry: dict[str, Any]) -> bool:
    return all(combination[leaf].value == value for leaf, value in entry.items())


def _with(base: dict[str, Any], combination: Combination) -> Settings:
    chosen = ((tuple(leaf.split(".")), pick.value) for leaf, pick in combination.items())
    return Settings.model_validate(nest(itertools.chain(flatten(base), chosen)))


def _blame(combination: Combination, reason: str) -> InitErrorDetails:
    """Point at the value the reason names, one that is not the baseline's if there is such."""
    text = reason.removeprefix("Value error, ")
    named = [pick for leaf, pick in combination.items() if config.names_setting(text, leaf)]
    places = [pick.location for pick in named or combination.values()]
    return problem(text, min(places, key=lambda place: place[-1] == 0))


def _cell(combination: Combination, settings: Settings, baseline: Settings) -> Cell:
    here, there = (dict(_dotted_values(one)) for one in (settings, baseline))
    order = dict.fromkeys([*combination, *here])
    changed = {leaf: here[leaf] for leaf in order if here[leaf] != there[leaf]}
    name = ", ".join(f"{leaf}={show(value)}" for leaf, value in changed.items()) or "baseline"
    return Cell(name, changed, settings, settings_key(settings))


def settings_key(settings: Settings) -> str:
    """Content address of settings: 16 hex digits of the SHA-256 of their canonical JSON."""
    text = json.dumps(settings.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _dotted_values(settings: Settings) -> Iterator[tuple[str, Any]]:
    for location, value in flatten(settings.model_dump()):
        yield ".".join(str(part) for part in location), value
