"""The comparison with other implementations: the desk, equality before rates, blocks, the page."""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from perf.peers import compare, contenders, page
from perf.peers.contenders import CONTENDERS, OWN, Contender, Running, Unable
from perf.peers.desk import Split, windows

from core import data
from core.settings import DataSettings, SyntheticSettings

ABOUT = {"digest": "d", "targets": 1000, "parameters": 5000}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    settings = DataSettings(synthetic=SyntheticSettings(users=40, items=30, mean_length=8))
    found = tmp_path_factory.mktemp("peers") / "split"
    data.save(data.prepare(settings), found)
    return found


def start(tmp_path: Path, body: str) -> Running:
    """A contender whose program is `body`."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(contenders.HERE)!r})\n" + textwrap.dedent(body)
    )
    return Running([sys.executable, script], {}, (tmp_path / "log").open("w"))


HONEST = """
    import numpy as np
    from desk import Desk
    print("a library's own chatter")
    desk = Desk(lambda held_out: np.full((3, 10), held_out), {"digest": "d"})
    going_on = desk.begin()
    while going_on:
        sum(range(300_000))
        going_on = desk.step_done(7)
"""


def test_the_desk_counts_steps_and_time_and_ranks_between_commands(tmp_path):
    running = start(tmp_path, HONEST)
    assert running.about["digest"] == "d"
    first, second = running.train(1), running.train(3)
    assert (first["steps"], first["targets"]) == (1, 7)
    assert (second["steps"], second["targets"]) == (3, 21)
    assert second["cpu_s"] > first["cpu_s"] > 0
    assert second["peak_rss_mib"] > 1
    answer, best = running.top(2, tmp_path / "top.npy")
    assert answer["users"] == 3 and (best == 2).all()
    running.stop()
    assert running.process.returncode == 0


def test_a_loop_that_ends_before_it_was_stopped_still_ranks(tmp_path):
    ends = HONEST.replace("while going_on:", "for step in range(2):") + "\n    desk.over()\n"
    running = start(tmp_path, ends)
    assert running.train(2)["steps"] == 2
    assert running.train(3)["steps"] == 0
    assert running.top(1, tmp_path / "top.npy")[0]["users"] == 3
    assert running.train(3)["steps"] == 0
    running.stop()
    assert running.process.returncode == 0


def test_a_contender_that_ends_is_told_by_its_last_words(tmp_path):
    with pytest.raises(Unable, match=r"does not run: ImportError: no such thing"):
        start(tmp_path, "raise ImportError('no such thing')")
    running = start(tmp_path, HONEST.replace("sum(range(300_000))", "raise MemoryError('full')"))
    with pytest.raises(Unable, match="MemoryError: full"):
        running.train(1)


def test_all_are_asked_for_the_rows_of_the_projects_own_split(folder):
    prepared, split = data.load(folder), Split(folder)
    assert (split.num_items, split.digest) == (prepared.num_items, prepared.digest)
    for user in range(prepared.num_users):
        history, target = prepared.test(user)
        assert split.histories(1)[user].tolist() == history.tolist()
        assert split.targets(1)[user] == target
        assert split.histories(2)[user].tolist() == prepared.train_sequence(user).tolist()
        assert split.targets(2)[user] == prepared.validation(user)[1]
    assert all(2 <= len(row) <= 201 for row in windows(split.histories(2)))


def test_the_own_contender_takes_the_same_rows_and_ranks_unseen_items(folder, tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text("student: {hidden_size: 8, max_length: 200, batch_size: 16}\n")
    own = Contender("own", "own_peer.py", str(settings))
    split = Split(folder)
    with contenders.running(own, tmp_path, folder, 0) as found:
        wanted = sum(len(row) - 1 for row in windows(split.histories(2)))
        assert found.about["targets"] == wanted
        trained = found.train(found.about["steps_per_epoch"])
        assert trained["targets"] == wanted
        _, best = found.top(1, tmp_path / "top.npy")
    assert compare.wrong_lists(best, split.histories(1), split.num_items) is None


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "variant", ["gbce", pytest.param("bce", marks=SLOW), pytest.param("softmax", marks=SLOW)]
)
def test_the_plain_schemes_learn_the_same_rows(variant, folder, tmp_path):
    split = Split(folder)
    plain = Contender("plain", "plain_peer.py", variant)
    with contenders.running(plain, tmp_path, folder, 0) as found:
        trained = found.train(1)
        wanted = sum(len(row) - 1 for row in windows(split.histories(2)))
        assert trained["targets"] == found.about["targets"] == wanted  # one batch holds them all
        _, best = found.top(2, tmp_path / "top.npy")
    assert compare.wrong_lists(best, split.histories(2), split.num_items) is None


def test_other_data_or_another_model_are_refused():
    assert compare.difference(ABOUT, ABOUT) is None
    assert compare.difference(ABOUT | {"parameters": 5050}, ABOUT) is None
    for name, value in (("digest", "e"), ("targets", 999)):
        assert f"other data: {name}" in compare.difference(ABOUT | {name: value}, ABOUT)
    assert "another model" in compare.difference(ABOUT | {"parameters": 9000}, ABOUT)


def test_lists_that_are_no_ranking_are_refused():
    histories = [np.array([1, 2]), np.array([3])]
    good = np.array([[3, 4], [1, 2]])
    assert compare.wrong_lists(good, histories, 5) is None
    for bad in ([[2, 4], [1, 2]], [[4, 4], [1, 2]]):
        assert "already seen (user 0)" in compare.wrong_lists(np.array(bad), histories, 5)
    for bad in ([[0, 4], [1, 2]], [[6, 4], [1, 2]]):
        assert "the catalogue is 1 to 5" in compare.wrong_lists(np.array(bad), histories, 5)


def test_quality_is_that_of_the_evaluator():
    best = np.arange(1, 31).reshape(3, 10)
    found = compare.quality(best, np.array([1, 13, 99]))
    assert found["recall"] == pytest.approx(2 / 3)
    assert found["ndcg"] == pytest.approx((1 + 1 / 2) / 3)


class Fake:
    """Trains at a known rate and notes the order of calls."""

    def __init__(self, name, rate, order):
        self.name, self.rate, self.order, self.calls = name, rate, order, 0
        self.about = ABOUT

    def train(self, steps):
        self.calls += 1
        self.order.append(self.name)
        slow = 100 if self.calls == 1 else 1  # a cold start must not count
        return {"targets": 10 * steps, "cpu_s": slow * 10 * steps / self.rate}

    def top(self, held_out, to):
        return {"users": 50, "cpu_s": 5 / self.rate, "peak_rss_mib": self.rate}, None


def test_blocks_alternate_and_the_first_is_not_counted(tmp_path):
    order = []
    both = {"a": Fake("a", 30.0, order), "b": Fake("b", 10.0, order)}
    found = compare.repeats(both, None, 4, 5, tmp_path)
    assert "".join(order) == "baabbaabbaab"
    assert found["a"].train == pytest.approx([30.0] * 5)
    assert compare.ratio(found["a"].train, found["b"].train) == pytest.approx((3.0, 3.0, 3.0))
    assert compare.ratio(found["a"].ranked, found["b"].ranked)[0] == pytest.approx(3.0)
    assert found["a"].peak_rss_mib == 30.0


def test_time_to_quality_is_the_first_point_that_reaches_it():
    points = [{"cpu_s": s, "test": {"ndcg": q}} for s, q in ((1, 0.1), (2, 0.18), (3, 0.17))]
    assert compare.seconds_to(points, 0.175) == 2
    assert compare.seconds_to(points, 0.19) is None


def measured(quality: float = 0.1) -> dict:
    row = {"ranked": [50.0, 60.0], "peak_rss_mib": 100.0, "loss": "full softmax", "note": "n"}
    row["precision"] = "fp32"
    row |= {"version": "1", "quality": {"recall": 0.2, "ndcg": quality}}
    points = [
        {
            "cpu_s": 10.0 * i,
            "steps": 48 * i,
            "validation": {"recall": 0.1 * i, "ndcg": 0.05 * i},
            "test": {"recall": 0.1 * i, "ndcg": 0.04 * i},
        }
        for i in (1, 2)
    ]
    rows = {"own": row | {"train": [40.0, 44.0]}, "peer": row | {"train": [10.0, 11.0]}}
    return {
        "speed": {
            "own": {"fp32": "own"},
            "contenders": rows,
            "left_out": {"gone": "does not install"},
            "steps": 3,
            "quality_steps": 5,
            "targets_per_sequence": 2.0,
            "command": "c",
            "machine": "m",
        },
        "curves": {"own": {"points": points, "note": "1", "machine": "m, x"}},
    }


def test_the_page_shows_medians_paired_ratios_left_out_and_time_to_quality(tmp_path):
    text = page.render(measured(), 0.08)
    assert "4.00× (4.00 to 4.00)" in text
    assert "21 (20 to 22)" in text
    assert "does not install" in text
    assert re.search(r"\| +20 s +\|", text)
    assert "not within 20 s" in page.render(measured(), 0.09)
    page.draw(measured()["curves"], 0.08, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text().lstrip().startswith("<?xml")


def test_the_committed_page_is_what_its_figures_give():
    store = contenders.ROOT / "reports/student_peers.json"
    if not store.is_file():
        pytest.skip("no comparison is committed")
    wanted = page.render(json.loads(store.read_text()), 0.175)
    assert store.with_suffix(".md").read_text() == wanted


def test_contenders_have_names_of_their_own_and_scripts_that_compile():
    assert len({c.name for c in CONTENDERS}) == len(CONTENDERS)
    assert OWN in CONTENDERS
    for contender in CONTENDERS:
        compile((contenders.HERE / contender.script).read_text(), contender.script, "exec")


def test_an_interpreter_is_made_once_and_a_failed_install_is_a_reason(tmp_path, monkeypatch):
    calls = []

    def run(command, **given):
        calls.append(command)
        failed = "pip" in command and "gone==1" in command
        return subprocess.CompletedProcess(command, int(failed), "", "No matching distribution")

    monkeypatch.setattr(contenders.subprocess, "run", run)
    peer = Contender("p", "x.py", "", packages=("peer==1",))
    (tmp_path / "peer==1").mkdir()
    contenders.interpreter(peer, tmp_path)
    made = len(calls)
    contenders.interpreter(peer, tmp_path)
    assert made == len(calls) == 3
    with pytest.raises(Unable, match="does not install: No matching distribution"):
        contenders.interpreter(Contender("q", "x.py", "", packages=("gone==1",)), tmp_path)
