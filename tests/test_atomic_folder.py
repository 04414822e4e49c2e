"""Folders that are whole or absent: replaced in one step, and what killed processes left is told from what is live."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from lrt_deploy.errors import ExportError
from lrt_deploy.exporters import atomic_folder as module
from lrt_deploy.exporters.atomic_folder import atomic_folder, recover

PARTIAL, OTHER_PARTIAL = ".made.partial-0123456789abcdef", ".made.partial-fedcba9876543210"


@pytest.fixture(params=["exchange", "two renames"])
def either_way(request, monkeypatch):
    """On a system that can exchange two folders, and as on one that cannot."""
    if request.param == "two renames":
        monkeypatch.setattr(module, "_renameat2_function", lambda: None)


def allowed(path):
    """A check that allows everything."""


def make(target, text, check=allowed):
    with atomic_folder(target, check, ExportError) as folder:
        (folder / "file").write_text(text)


def make_at_once(target, check):
    """Three threads make the same folder; their errors."""
    meeting, errors = threading.Barrier(3, timeout=60), []

    def run(number):
        try:
            with atomic_folder(target, check, ExportError) as folder:
                (folder / "file").write_text(str(number))
                meeting.wait()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.mark.parametrize("replace", [True, False])
def test_folders_made_at_once_for_one_target_leave_one_of_them(tmp_path, either_way, replace):
    """Often enough that their renames fall between each other's."""
    for attempt in range(50):
        target = tmp_path / str(attempt) / "made"
        if replace:
            target.mkdir(parents=True)
            (target / "file").write_text("old")
        errors = make_at_once(target, allowed if replace else None)
        assert [type(error) for error in errors] == ([] if replace else [ExportError] * 2), errors
        assert (target / "file").read_text() in ("0", "1", "2")
        assert [path.name for path in target.parent.iterdir()] == ["made"]


REPLACE_FOREVER = """
import sys
from pathlib import Path
from lrt_deploy.errors import ExportError
from lrt_deploy.exporters.atomic_folder import atomic_folder
print("begins", flush=True)
while True:
    with atomic_folder(Path(sys.argv[1]), lambda path: None, ExportError) as folder:
        (folder / "file").write_text("whole")
"""


def test_a_folder_that_is_replaced_all_the_time_is_whole_at_every_moment_and_after_a_kill(tmp_path):
    target = tmp_path / "made"
    make(target, "whole")
    for _ in range(3):
        command = [sys.executable, "-c", REPLACE_FOREVER, target]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout.readline() == "begins\n"
                inodes = set()
                ends = time.monotonic() + 0.5
                while time.monotonic() < ends or len(inodes) < 3:
                    number = os.open(target, os.O_RDONLY)  # fails where the name is missing for a moment
                    inodes.add(os.fstat(number).st_ino)
                    os.close(number)
            finally:
                process.send_signal(signal.SIGKILL)
        assert (target / "file").read_text() == "whole"
    make(target, "next")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_after_a_kill_between_two_renames_the_old_folder_comes_back(tmp_path):
    retired = tmp_path / ".made.retired-0123456789abcdef"
    make(retired, "old")
    recover(tmp_path / "made")
    assert (tmp_path / "made" / "file").read_text() == "old"
    make(retired, "older")
    make(tmp_path / "made", "new")
    assert (tmp_path / "made" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_an_error_in_the_block_leaves_the_old_folder(tmp_path, either_way):
    make(tmp_path / "made", "old")
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "made", allowed, ExportError) as folder:
        (folder / "file").write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "made" / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_what_may_not_be_replaced_stays_also_if_it_comes_late(tmp_path, either_way):
    def refuse(path):
        raise ExportError(f"{path} is precious")

    with (
        pytest.raises(ExportError, match="is precious"),
        atomic_folder(tmp_path / "made", refuse, ExportError) as folder,
    ):
        (folder / "file").write_text("new")
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / "thesis.tex").write_text("years of work")
    assert [path.name for path in tmp_path.rglob("*")] == ["made", "thesis.tex"]


def test_what_is_put_there_after_the_check_is_not_removed(tmp_path):
    make(tmp_path / "made", "old")
    precious, checks = tmp_path / "precious", []
    precious.mkdir()

    def check(path):
        checks.append(path)
        if len(checks) == 1:  # a stranger is as quick as can be
            path.rename(tmp_path / "away")
            precious.rename(path)
        else:
            raise ExportError("is precious")

    with pytest.raises(ExportError, match="is precious"):
        make(tmp_path / "made", "new", check)
    assert len(checks) == 2 and not list((tmp_path / "made").iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["away", "made"]


def test_an_existing_folder_of_that_moment_is_refused_without_a_check(tmp_path, either_way):
    with pytest.raises(ExportError, match="meanwhile"), atomic_folder(tmp_path / "made", None, ExportError) as folder:
        (folder / "file").write_text("new")
        (tmp_path / "made").write_text("a file of that name")
    assert (tmp_path / "made").read_text() == "a file of that name"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path, either_way):
    make(tmp_path / "real", "old")
    (tmp_path / "made").symlink_to("real")
    make(tmp_path / "made", "new")
    assert not (tmp_path / "made").is_symlink() and (tmp_path / "made" / "file").read_text() == "new"
    assert (tmp_path / "real" / "file").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "real"]


HOLD = """
import sys
from pathlib import Path
from lrt_deploy.errors import ExportError
from lrt_deploy.exporters.atomic_folder import atomic_folder
with atomic_folder(Path(sys.argv[1]), None, ExportError) as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_the_folder_of_a_live_process_stays_and_that_of_a_killed_one_goes(tmp_path):
    """By a lock: its process number says nothing, because the process may live in another container."""
    command = [sys.executable, "-c", HOLD, tmp_path / "made"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        live = process.stdout.readline().strip()
        make(tmp_path / "made", "first")
        assert sorted(str(path) for path in tmp_path.iterdir()) == sorted([live, str(tmp_path / "made")])
        process.send_signal(signal.SIGKILL)
    make(tmp_path / "made", "second")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_only_names_of_our_form_are_removed_and_links_are_not_followed(tmp_path):
    strangers = [".made.partial-notes", f"{PARTIAL}.old", ".made.retired-notes", ".other.partial-0123456789abcdef"]
    for name in strangers:
        (tmp_path / name).mkdir()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("years of work")
    (tmp_path / OTHER_PARTIAL).symlink_to("precious")
    (tmp_path / PARTIAL).mkdir()
    (tmp_path / PARTIAL / "inside").symlink_to("../precious")
    make(tmp_path / "made", "new")
    assert (tmp_path / "precious" / "thesis.tex").read_text() == "years of work"
    assert sorted(os.listdir(tmp_path)) == sorted([*strangers, OTHER_PARTIAL, "precious", "made"])  # noqa: PTH208


def test_the_mode_of_the_folder_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        make(tmp_path / "made", "new")
    finally:
        os.umask(before)
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o750
