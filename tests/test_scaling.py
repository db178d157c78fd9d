"""The scaling study: slopes of known laws, a point measured in a child, the page and its charts."""

from pathlib import Path

import numpy as np
import pytest
from perf.scaling import PAGE, STUDIES, Found, Point, Study, main, measure, page, section, write

SIZES = [1000, 4000, 16_000, 64_000]
MIB = 1 << 20


def found(law, noise: float = 0.0, memory=lambda n: n) -> Found:
    random = np.random.default_rng(0)
    points = [
        Point(n, [law(n) * (1 + noise * random.random()) for _ in range(3)], memory(n))
        for n in SIZES
    ]
    return Found(Study("work", "rows", tuple(SIZES), None, "so it must be."), points)


@pytest.mark.parametrize(
    ("law", "slope", "straight"),
    [
        (lambda n: 1e-6 * n, 1.0, "yes"),
        (lambda n: 1e-9 * n**2, 2.0, "no: steeper"),
        (lambda n: 1e-3 * n**0.5, 0.5, "no: flatter"),
        (lambda n: 0.01 + 5e-6 * n, None, "from the larger sizes on"),
    ],
)
def test_known_laws_are_named(law, slope, straight):
    line = found(law).line(lambda p: min(p.seconds))
    assert line.straight == straight
    if slope is not None:
        assert line.slope == pytest.approx(slope) and line.last == pytest.approx(slope)
    assert line.low <= line.slope <= line.high


def test_noise_widens_the_interval_which_holds_the_truth():
    quiet, loud = (found(lambda n: n, noise).line(lambda p: p.seconds[0]) for noise in (0.01, 0.3))
    assert quiet.high - quiet.low < loud.high - loud.low
    assert loud.low < 1 < loud.high


def hold(size: int, folder: Path):
    (folder / "made").write_bytes(b"x")
    return lambda: len(np.ones(size * MIB, dtype=np.uint8))


def test_a_point_is_measured_in_a_child_with_its_own_peak():
    study = Study("hold", "MiB", (20, 60), hold, "")
    small, large = (measure(study, size) for size in study.sizes)
    assert small.size == 20 and len(small.seconds) == 3 and min(small.seconds) > 0
    assert small.written_bytes == 20 * MIB  # what the work returned
    assert 15 * MIB < small.peak_bytes < 35 * MIB
    assert 35 * MIB < large.peak_bytes - small.peak_bytes < 45 * MIB


def test_every_study_runs_at_a_small_size(tmp_path):
    small = {"rows": 2000, "items": 300, "history length": 6, "users": 300, "samples": 70}
    for study in STUDIES:
        assert len(study.sizes) >= 4 and study.why
        point = measure(study, small[study.axis])
        assert min(point.seconds) > 0, study.name


def test_the_page_holds_what_was_measured(tmp_path):
    every = [found(lambda n: 1e-6 * n), found(lambda n: 1e-9 * n**2)]
    write(every, tmp_path / PAGE.name)
    text = (tmp_path / PAGE.name).read_text()
    assert text == page(every)
    assert "2.00 (2.00 to 2.00)" in text and "so it must be." in text
    assert section(every[0]) in text and "64,000" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "scaling-cpu.svg", "scaling-memory.svg", PAGE.name,
    ]  # fmt: skip
    before = (tmp_path / "scaling-cpu.svg").read_bytes()
    write(every, tmp_path / PAGE.name)
    assert (tmp_path / "scaling-cpu.svg").read_bytes() == before


def test_the_command_measures_what_is_asked_for(tmp_path, monkeypatch, capsys):
    study = Study("hold", "MiB", (1, 2, 3), hold, "more is more.")
    monkeypatch.setattr("perf.scaling.STUDIES", [study, Study("other", "MiB", (1,), None, "")])
    main(tmp_path / "page", only="hold")
    assert "more is more." in (tmp_path / "page").read_text()
    assert capsys.readouterr().out.count('"study": "hold"') == 3
