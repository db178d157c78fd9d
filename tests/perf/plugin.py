"""The guard as a pytest plugin: fixture, options, what is missing, the page; no torch.

Whatever the tests do, a name in the baseline that was not measured in a whole run fails it: a test
that is deleted, renamed, skipped or empty must not pass in silence.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from perf import baseline, page, timing
from perf.baseline import Baseline, Counters
from perf.timing import Measured

HERE = Path(__file__).parent
LEDGER = pytest.StashKey["Ledger"]()


@dataclass
class Ledger:
    """What one session measured, against what was accepted."""

    accepted: Baseline | None
    accepting: bool
    machine: str
    asked: bool = False
    """Whether any guard is to run in this session."""
    counters: dict[str, Counters] = field(default_factory=dict)
    ratios: dict[str, Measured] = field(default_factory=dict)
    unjudged: dict[str, str] = field(default_factory=dict)
    """Name -> why its time is not judged here."""
    complaints: list[str] = field(default_factory=list)

    def made_now(self) -> Baseline:
        """The baseline that accepting makes."""
        ratios = {name: found.ratio for name, found in self.ratios.items()}
        return baseline.made_now(self.counters, ratios, self.machine, self.accepted)

    @property
    def missing(self) -> list[str]:
        """Guarded names that nothing was measured for."""
        if self.accepted is None:
            return []
        seen = self.counters.keys() | self.ratios.keys() | self.unjudged.keys()
        return [name for name in self.accepted.guarded if name not in seen]


@dataclass
class Guard:
    """What a test hands its measurements to."""

    ledger: Ledger

    def counters(self, name: str, found: Counters) -> None:
        """Exact counters of one piece of work; equality with the accepted ones is the gate."""
        assert found and any(found.values()), f"{name}: measured nothing"
        self.ledger.counters[name] = found
        if self.ledger.accepting:
            return
        accepted = self._accepted().counters.get(name)
        assert accepted is not None, f"{name}: no accepted counters; {baseline.COMMAND}"
        if changed := list(baseline.changes(accepted, found)):
            self._complain(f"{name}: counters changed\n" + "\n".join(changed) + self._libraries())

    def ratio(
        self, name: str, reference: Callable[[], object], guarded: Callable[[], object]
    ) -> Measured:
        """Time of the reference / time of the guarded work; its lower bound must exceed the
        accepted limit. Skips on another class of machine.
        """
        if self.ledger.accepting:
            found = timing.compare(reference, guarded, None)
            assert baseline.finite(found.ratio), f"{name}: measured nothing"
            self.ledger.ratios[name] = found
            return found
        limits = self._accepted().ratios.get(name)
        assert limits is not None, f"{name}: no accepted ratio; {baseline.COMMAND}"
        if (made_on := self._accepted().machine_class) != self.ledger.machine:
            reason = f"accepted on {made_on}; this is {self.ledger.machine}"
            self.ledger.unjudged[name] = reason
            pytest.skip(f"{name}: {reason}: times are not judged")
        found = timing.compare(reference, guarded, limits["at_least"])
        self.ledger.ratios[name] = found
        if not found.holds(limits["at_least"]):
            self._complain(
                f"{name}: {found.ratio:.3f} ({found.low:.3f} to {found.high:.3f}, {found.blocks} "
                f"blocks) is not above {limits['at_least']}; accepted was {limits['ratio']}"
            )
        return found

    def _accepted(self) -> Baseline:
        assert self.ledger.accepted is not None, f"no accepted baseline; {baseline.COMMAND}"
        return self.ledger.accepted

    def _complain(self, text: str) -> None:
        self.ledger.complaints.append(text)
        pytest.fail(f"{text}\nIf this is meant: {baseline.COMMAND}", pytrace=False)

    def _libraries(self) -> str:
        accepted, here = self._accepted().made_with, baseline.libraries()
        other = [f"{n} {accepted[n]} -> {here[n]}" for n in accepted if accepted[n] != here.get(n)]
        return f"\nother libraries than accepted with: {', '.join(other)}" if other else ""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("perf")
    group.addoption("--perf-accept", action="store_true", help="Make the figures the baseline.")
    group.addoption("--perf-baseline", default=str(HERE / "baseline.json"), help="Its file.")
    group.addoption("--perf-page", default="reports/perf.md", help="Page written by a whole run.")


def pytest_configure(config: pytest.Config) -> None:
    accepting = config.getoption("--perf-accept", default=False)
    path = config.getoption("--perf-baseline", default=None)
    if path is None:
        return  # found on the way to other tests: the options are not there, nothing is guarded
    try:
        accepted = baseline.read(Path(path))
    except baseline.DamagedBaseline as error:
        if not accepting:
            raise pytest.UsageError(str(error)) from None
        accepted = None
    config.stash[LEDGER] = Ledger(accepted, accepting, baseline.machine_class())


@pytest.fixture
def guard(request: pytest.FixtureRequest) -> Guard:
    """Where a test hands in what it measured."""
    return Guard(request.config.stash[LEDGER])


def wanted(config: pytest.Config) -> bool:
    """Whether guards run in this session at all; without any, pytest's own status 5 says so."""
    ledger = config.stash.get(LEDGER, None)
    return ledger is not None and ledger.asked and not config.option.collectonly


def is_whole(config: pytest.Config) -> bool:
    """Whether everything below the folders given was to run."""
    chosen = any(config.getoption(name, default=None) for name in ("keyword", "deselect", "lf"))
    return not chosen and all(Path(word).is_dir() for word in config.args)


def pytest_collection_finish(session: pytest.Session) -> None:
    if ledger := session.config.stash.get(LEDGER, None):
        ledger.asked = any(item.get_closest_marker("perf") for item in session.items)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if not wanted(session.config) or not is_whole(session.config):
        return
    ledger = session.config.stash[LEDGER]
    if not ledger.accepting:
        if ledger.missing:
            ledger.complaints.append(f"guarded but not measured: {', '.join(ledger.missing)}")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        path = Path(session.config.getoption("--perf-page"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page.render(ledger), encoding="utf-8")
    elif exitstatus == 0:
        Path(session.config.getoption("--perf-baseline")).write_text(ledger.made_now().text())


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    if not wanted(config):
        return
    ledger = config.stash[LEDGER]
    say = terminalreporter.write_line
    if not is_whole(config):
        say("perf: part of the suite; what is missing was not asked, no page or baseline written")
    elif not ledger.accepting:
        for text in ledger.complaints:
            say(f"perf: {text}")
        if ledger.unjudged:
            reason = next(iter(ledger.unjudged.values()))
            say(f"perf: TIMES NOT GUARDED ({len(ledger.unjudged)} ratios; {reason}): counters only")
        say(f"perf: page {config.getoption('--perf-page')}")
    elif exitstatus != 0:
        say("perf: nothing accepted: a test failed")
    else:
        made = ledger.made_now()
        say(baseline.difference(ledger.accepted, made) or "perf: nothing changed")
        say(f"perf: accepted {made.id}; commit {config.getoption('--perf-baseline')}")
