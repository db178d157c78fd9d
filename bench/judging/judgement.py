"""What a judgement is made of: verdicts, proofs of cells, warnings, the best cell; plain values."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from bench.judging.control import Control
from bench.judging.quality import Quality
from bench.proofs import ProofRow
from bench.reporting.strings import ENGLISH, Message, words

BASELINE = "baseline"
"""Name of the first cell."""


@dataclass(frozen=True)
class Finding:
    """One warning and what to try."""

    text: str
    advice: str


@dataclass(frozen=True)
class Trend:
    """Drift of the baseline over the blocks of one stage: last / first block of the fitted line."""

    stage: str
    ratio: float
    p_value: float
    blocks: int


@dataclass(frozen=True)
class Verdict:
    """One cell in one stage: its figures, its ratio to the baseline, and the call.

    `figure` is the median over repeats of seconds per sample (`unit` "step") or of the stage's
    seconds ("wall"). `ratio`, `low`, `high` are times relative to the baseline, below 1 = faster;
    None where nothing may be compared. `call` is a word of the vocabulary, or the status of a cell
    that gave no figure.
    """

    cell: str
    stage: str
    call: str
    reason: str = ""
    needs: int | None = None
    repeats: int = 0
    unit: str = "wall"
    figure: float | None = None
    samples: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    smallest: float | None = None
    in_effect: bool | None = None
    memory: dict[str, int] = field(default_factory=dict)
    disturbed: int = 0
    """Repeats in which this cell or the baseline was disturbed (throttled, foreign processes)."""
    unsteady: int = 0
    """Repeats whose steps never became steady."""

    @property
    def step_s(self) -> float | None:
        """Seconds of a typical micro-batch, from the judged figure."""
        if self.unit == "wall" or self.figure is None or self.samples is None:
            return None
        return self.figure * self.samples

    @property
    def samples_per_s(self) -> float | None:
        """Throughput, from the judged figure."""
        return 1 / self.figure if self.unit == "step" and self.figure else None

    @property
    def words(self) -> str:
        """The call as printed."""
        if self.call != "undecided":
            return self.call
        return f"undecided (needs {self.needs or 'over 1000'} more)"


@dataclass(frozen=True)
class CellProof(ProofRow):
    """A proof row with the cell it belongs to."""

    cell: str


@dataclass(frozen=True)
class Unmeasured:
    """Repeats of a cell that gave no figure in a stage: how many, and why."""

    cell: str
    stage: str
    status: str
    reason: str
    repeats: int


@dataclass(frozen=True)
class Best:
    """The cell to use and why; `is_baseline` when nothing proved better."""

    cell: str
    is_baseline: bool
    why: Message
    refused: bool = False
    """Nothing may be recommended, not even the baseline: it breaks the user's limit."""
    turned_down: Mapping[str, str] = field(default_factory=dict)
    """Cell with a better estimate -> why it is no choice all the same."""

    @property
    def reason(self) -> str:
        """Why, in English."""
        return str(words(ENGLISH).tell(self.why))


@dataclass(frozen=True)
class Judgement:
    """Everything a report says about a matrix that is not a raw figure."""

    tables: dict[str, list[Verdict]]
    """Measured stage or `total` -> rows, the baseline first, cells that cannot differ left out."""
    comparisons: int
    best: Best
    proofs: list[CellProof]
    quality: list[Quality]
    controls: list[Control]
    trends: list[Trend]
    unmeasured: list[Unmeasured]
    warnings: list[Finding]

    @property
    def exit_status(self) -> int:
        """0: judged or excluded for a stated reason; 1: failed, not in effect, or nothing ran."""
        failed = any(row.status not in ("unsupported", "skipped") for row in self.unmeasured)
        rows = [row for table in self.tables.values() for row in table]
        ineffective = any(row.call == "not in effect" for row in rows)
        return int(failed or ineffective or not any(row.repeats for row in rows))
