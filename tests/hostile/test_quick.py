"""A short campaign: some of every kind of hostile input, none of which may do harm. `make fuzz` runs a long one."""

from __future__ import annotations

import sys

import pytest

from hostile import table
from hostile.campaign import Campaign
from hostile.kinds import KINDS
from hostile.trial import EQUAL, FAILURES, HANG, MEMORY, OTHER, REFUSED, TRACEBACK, WRONG, Trial, run

INPUTS = 50  # of each kind; full exports apart
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="bounds memory by Linux's own means")


@pytest.fixture(scope="module")
def results(originals_folder):
    counts = {kind: INPUTS if share > 1 else 1 for kind, (_, share) in KINDS.items()}
    return Campaign(counts, seed="quick", originals=originals_folder, workers=1).run()


def test_no_hostile_input_does_harm(results):
    failed = [
        f"{r['verdict']}: {r['kind']} #{r['index']}, {r['what']} -> {r['detail']}"
        for r in results
        if r["verdict"] in FAILURES
    ]
    assert not failed, "\n" + "\n".join(failed)


def test_every_kind_is_tried_and_half_of_it_passes_the_first_parser(results):
    rows = table.summary(results, {"seed": "quick", "commit": ""})["kinds"]
    assert rows.keys() == KINDS.keys()
    assert {kind: row["parsed"] for kind, row in rows.items() if row["parsed"] < 0.5} == {}


def test_inputs_are_refused_and_accepted(results):
    found = {(r["kind"], r["verdict"]) for r in results}
    kinds = {kind for kind, _ in found} - {"full exports", "prompt cache entries"}
    assert {kind for kind in kinds if (kind, REFUSED) in found} == kinds
    assert {verdict for _, verdict in found} >= {REFUSED, EQUAL, OTHER}


def grow() -> tuple[str, str]:
    return EQUAL, str(len(b"x" * (500 * 2**20)))


def spin() -> tuple[str, str]:
    import time

    from hostile import trial

    while time.process_time() < started + 2 * trial.SLOW_CPU_SECONDS:
        pass
    return EQUAL, ""


started = 0.0


def fail() -> tuple[str, str]:
    raise KeyError("x")


@pytest.mark.parametrize(
    ("act", "verdict"), [(grow, MEMORY), (spin, HANG), (fail, TRACEBACK), (lambda: (WRONG, ""), WRONG)]
)
def test_harm_is_noticed(act, verdict, tmp_path, monkeypatch):
    import time

    from hostile import trial

    monkeypatch.setattr(trial, "SLOW_CPU_SECONDS", 0.3)
    monkeypatch.setattr(sys.modules[__name__], "started", time.process_time())
    assert run(Trial("", True, act), tmp_path, ()).verdict == verdict


def test_a_file_that_is_left_is_noticed(tmp_path):
    def act() -> tuple[str, str]:
        (tmp_path / "half").mkdir()
        return EQUAL, ""

    assert run(Trial("", True, act), tmp_path, ()).verdict == "file left"
    (tmp_path / "half").rmdir()
    assert run(Trial("", True, act, writes=("half",)), tmp_path, ()).verdict == EQUAL


def test_a_worker_that_dies_or_hangs_is_noticed_and_replaced(originals_folder, tmp_path, monkeypatch):
    from hostile import campaign

    monkeypatch.setattr(campaign, "HANG_SECONDS", 2.0)
    results = Campaign({"self test": 4}, "1", originals_folder, tmp_path / "results", workers=1).run()
    assert [result["verdict"] for result in results] == [EQUAL, "crash", "hang", EQUAL]
    again = Campaign({"self test": 5}, "1", originals_folder, tmp_path / "results", workers=1)
    assert [result["verdict"] for result in again.run()] == [EQUAL, "crash", "hang", EQUAL, EQUAL]
    assert len((tmp_path / "results").read_text().splitlines()) == 1 + 5
