"""Says when a worker has passed a limit: of its whole process, of standing still, of a phase."""

from typing import Any

from bench.launching.deaths import COMPILE, Events, Job


class Watch:
    """Follows one worker from its start; times are readings of the parent's monotonic clock."""

    def __init__(self, job: Job, begin_s: float):
        self.job = job
        self.begin_s = self.entered_s = self.moved_s = begin_s
        self.visits = 0
        self.place = _place(Events())

    def passed(self, events: Events, now_s: float) -> str | None:
        """The limit that is passed and how, None while all hold; to be asked again and again."""
        if events.visits != self.visits:
            self.visits, self.entered_s = events.visits, now_s
        if (place := _place(events)) != self.place:
            self.place, self.moved_s = place, now_s
        job, phase = self.job, events.phase
        if now_s - self.begin_s > job.timeout_s:
            return f"timeout_s: no end within {job.timeout_s:g} s"
        limit_s = job.phase_timeouts_s.get(phase or "")
        if limit_s is not None and self.in_phase_s(events, now_s) > limit_s:
            return f"phase_timeouts_s.{phase}: more than {limit_s:g} s in this phase"
        # Compiling makes no steps; where it has a limit of its own, that one is meant.
        is_compiling = phase == COMPILE and limit_s is not None
        if now_s - self.moved_s > job.hang_timeout_s and not is_compiling:
            return f"hang_timeout_s: no new step or phase for {job.hang_timeout_s:g} s"
        return None

    def in_phase_s(self, events: Events, now_s: float) -> float:
        """Seconds of the phase the worker is in; compiling comes in many visits, hence its sum."""
        earlier_s = events.compile_s if events.phase == COMPILE else 0.0
        return earlier_s + now_s - self.entered_s


def _place(events: Events) -> tuple[Any, ...]:
    """What changes when a worker gets anywhere; a line that only says "alive" changes nothing."""
    step = (events.progress or {}).get("step")
    return (events.visits, step, len(events.stages), events.ended)
