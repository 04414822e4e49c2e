"""The wheel that packages carry: the files of this installation, and the same bytes each time."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import zipfile
from pathlib import Path

import pytest

import lrt_deploy
from lrt_deploy.errors import ExportError
from lrt_deploy.exporters.packages import wheel

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def opened():
    _, data = wheel.build_wheel()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        yield archive


def test_the_wheel_holds_the_files_of_the_package_with_their_content(opened):
    folder = Path(lrt_deploy.__file__).parent
    found = {name for name in opened.namelist() if ".dist-info/" not in name}
    expected = {f"lrt_deploy/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*.py")}
    for name in ("exporters", "runtime"):  # links, which rglob does not follow
        expected |= {
            f"lrt_deploy/{name}/{path.relative_to(ROOT / name).as_posix()}" for path in (ROOT / name).rglob("*.py")
        }
    assert {name for name in found if name.endswith(".py")} == expected and len(expected) > 100
    assert {"lrt_deploy/py.typed", "lrt_deploy/exporters/packages/docker/Dockerfile"} <= found
    assert not [name for name in found if "__pycache__" in name or "/." in name]
    for name in found:
        assert opened.read(name) == (folder.parent / name).read_bytes()


def test_every_file_is_in_the_record_with_its_hash(opened):
    names = opened.namelist()
    (record,) = [name for name in names if name.endswith(".dist-info/RECORD")]
    listed = {name: (digest, size) for name, digest, size in csv.reader(opened.read(record).decode().splitlines())}
    assert set(listed) == set(names) and listed[record] == ("", "")
    for name in set(names) - {record}:
        data = opened.read(name)
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        assert listed[name] == (f"sha256={digest}", str(len(data)))


def test_the_metadata_say_nothing_of_this_installation(opened):
    metadata = {name.partition("/")[2] for name in opened.namelist() if ".dist-info/" in name}
    assert {"METADATA", "WHEEL", "entry_points.txt", "licenses/LICENSE"} <= metadata
    assert not metadata & {"INSTALLER", "REQUESTED", "direct_url.json"}
    assert not [name for name in opened.namelist() if str(ROOT).encode() in opened.read(name)]


def test_the_same_installation_gives_the_same_bytes(opened):
    assert wheel.build_wheel() == wheel.build_wheel()
    assert len({entry.date_time for entry in opened.infolist()}) == 1


def test_an_installation_without_metadata_is_named(monkeypatch):
    monkeypatch.setattr(wheel, "_PROJECT", "lrt-deploy-that-is-not-installed")
    with pytest.raises(ExportError, match="cannot be made: it has no metadata, so it was not installed by pip"):
        wheel.build_wheel()


def test_a_copy_that_runs_from_elsewhere_than_where_it_was_installed_is_named(tmp_path, monkeypatch):
    """As with PYTHONPATH in front of an installation."""
    place = tmp_path / "lrt_deploy-0.1.0.dist-info"
    place.mkdir()
    (place / "METADATA").write_text("Metadata-Version: 2.1\nName: lrt-deploy\nVersion: 0.1.0\n")
    (place / "RECORD").write_text("lrt_deploy/__init__.py,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ExportError, match=r"cannot be made: it runs from .*, and is installed in "):
        wheel.build_wheel()
