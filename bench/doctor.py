"""What is wrong with this machine, or with a failed run: `python -m bench.doctor`.

Exit status: 0 nothing wrong, or a log explained · 1 problems, or a log no rule explains · 2 bad
input. The parent imports no torch: what needs it is asked in child processes with a time limit, so
that a broken library is a finding.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bench.checkup import checks, gpu_checks, library_checks, rules
from bench.checkup.checks import Facts, Finding
from bench.checkup.gather import gather
from bench.checkup.probes import ISOLATION
from core.config import InputError

CHECKS: tuple[Callable[[Facts], Finding], ...] = (
    gpu_checks.torch_and_driver,
    gpu_checks.card,
    gpu_checks.virtual_memory,
    gpu_checks.allocator_names,
    gpu_checks.allocator_settings,
    gpu_checks.image,
    library_checks.transformers,
    library_checks.safetensors,
    library_checks.bitsandbytes,
    library_checks.four_bit_on_cpu,
    library_checks.flash_attn,
    library_checks.packages,
    library_checks.compiler,
    checks.card_in_use,
    checks.distorting_variables,
    checks.containers,
    checks.hub,
    checks.shared_memory,
    checks.room,
    checks.load,
)
ORDER = ("problem", "unknown", "ok", "not applicable")
STYLES = {"problem": "bold red", "unknown": "yellow", "ok": "green", "not applicable": "dim"}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    explain: Annotated[
        str | None,
        typer.Option(metavar="LOG", help="Name the known failures in a log; - reads stdin."),
    ] = None,
    isolate: Annotated[
        bool,
        typer.Option(
            "--isolate",
            help="Also find the part at fault: one tensor, the language model alone, the model "
            "with adapters and gate, each in its own process; about 20 s.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Check this machine for the known causes of failures and of wrong figures, or explain a log.

    Exit status: 0 nothing wrong, or the log is explained; 1 problems, or no rule knows the log;
    2 bad input.
    """
    console = Console(highlight=False, force_terminal=sys.stdout.isatty())
    try:
        if explain is not None:
            status = explain_log(read_log(explain), as_json, console)
        else:
            status = examine(isolate, as_json, console)
    except InputError as error:
        print(error, file=sys.stderr)
        status = 2
    raise typer.Exit(status)


# ---- this machine ----


def examine(isolate: bool, as_json: bool, console: Console) -> int:
    """Gather, judge, print; the exit status."""
    facts = gather(isolate)
    found = judge(facts)
    if as_json:
        print(json.dumps({"findings": [asdict(one) for one in found]}, indent=1))
    else:
        show(found, console)
    return int(any(one.status == "problem" for one in found))


def judge(facts: Facts) -> list[Finding]:
    """The result of every check: problems first, then what nobody could tell."""
    found = [check(facts) for check in CHECKS]
    found += [checks.isolation_step(facts, step) for step in ISOLATION if step in facts.isolation]
    return sorted(found, key=lambda finding: ORDER.index(finding.status))


def show(found: Sequence[Finding], console: Console) -> None:
    """One line for each finding, the remedy below a problem."""
    for one in found:
        rule = f" [{one.rule}]" if one.rule else ""
        text = f"{one.check}{rule}: {one.observed}"
        console.print(f"{one.status:14s}", style=STYLES[one.status], end=" ")
        console.print(text, markup=False, soft_wrap=True)
        if one.remedy and one.status in ("problem", "unknown"):
            console.print(f"{'':14s} -> {one.remedy}", markup=False, soft_wrap=True)
    counts = {status: sum(one.status == status for one in found) for status in ORDER}
    console.print(", ".join(f"{count} {status}" for status, count in counts.items() if count))


# ---- a log ----


def read_log(source: str) -> str:
    """Text of a log file, or of stdin for `-`."""
    if source == "-":
        return sys.stdin.read()
    try:
        return Path(source).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(
            f"--explain {source}: {error.strerror}; give the log of a failed run, like "
            "reports/<matrix>/<run>/cells/<cell>-r1.log, or - for stdin"
        ) from None


def explain_log(text: str, as_json: bool, console: Console) -> int:
    """Print the rules a log matches, most specific first; 0 if there is one, else 1."""
    matches = rules.matches(text)
    if as_json:
        print(json.dumps({"matches": [_as_json(match) for match in matches]}, indent=1))
    else:
        for line in explanation(matches) if matches else unexplained(text):
            console.print(line, markup=False, soft_wrap=True)
    return int(not matches)


def _as_json(match: rules.Match) -> dict[str, Any]:
    rule = match.rule
    return {
        "rule": rule.id,
        "line_number": match.line_number,
        "line": match.line,
        "cause": rule.cause,
        "proof_command": rule.proof_command,
        "remedy": rule.remedy,
    }


def explanation(matches: Sequence[rules.Match]) -> list[str]:
    """Each rule found with its line, cause, proof and remedy."""
    lines = []
    for match in matches:
        rule = match.rule
        lines += [
            f"{rule.id}  {rule.symptom}",
            f"  line {match.line_number}: {match.line}",
            f"  cause:  {rule.cause}",
            f"  proof:  {rule.proof_command}",
            f"  remedy: {rule.remedy}",
        ]
    return lines


def unexplained(text: str) -> list[str]:
    """What to do about a log that no rule knows."""
    if not text.strip():
        silent = rules.BY_ID["D12"]
        return [
            "not determined: the log is empty",
            f"  if the process exited 0: {silent.id}, {silent.cause}",
            "  if it exited 137: it was killed; `dmesg` names a kill for memory",
        ]
    return [
        "not determined: no rule knows this log",
        "  next: python -m bench.doctor --isolate, which shows where it begins: at one tensor, at "
        "the language model alone, or with adapters and gate",
    ]


if __name__ == "__main__":
    app()
