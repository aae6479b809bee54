"""The commit that a run records is one of this project, not of whatever repository the run is started in."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmengine", reason='needs the extra: pip install "cmtaqr[detector]"')

import cmtaqr  # noqa: E402
from cmtaqr.engine.record import versions  # noqa: E402

PACKAGE = Path(cmtaqr.__file__).resolve().parent


def git(folder, *words):
    identity = "-c", "user.name=a", "-c", "user.email=a@example.org"
    return subprocess.run(["git", *identity, "-C", str(folder), *words], capture_output=True, text=True, check=True).stdout.strip()


def asked(place, here):
    """What a process in `here` says about the package in `place`: its commit, the folder that it records, its root."""
    code = "from cmtaqr.engine import record; print(record.git_commit(), record._folder(), record.package_root(), sep='\\n')"
    environment = {name: value for name, value in os.environ.items() if name != "CMTAQR_COMMIT"} | dict(PYTHONPATH=str(place))
    done = subprocess.run([sys.executable, "-c", code], cwd=here, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_commit_is_this_project_s(tmp_path):
    other, inside = tmp_path / "other", tmp_path / "other" / "deep"
    inside.mkdir(parents=True)
    (other / "settings.ini").touch()
    git(other, "init", "-q")
    git(other, "add", "-A")
    git(other, "commit", "-qm", "something else")
    installed = tmp_path / "site"
    shutil.copytree(PACKAGE, installed / "cmtaqr", ignore=shutil.ignore_patterns("__pycache__"))
    assert asked(installed, other) == ["None", str(other), str(other)], "installed, and started in another project"
    vendored = other / "vendored"
    shutil.copytree(installed, vendored)
    (vendored / "settings.ini").touch()
    assert asked(vendored, inside) == ["None", str(inside), str(vendored)], "its sources, copied into another project"
    git(vendored, "init", "-q")
    git(vendored, "add", "-A")
    git(vendored, "commit", "-qm", "this project")
    assert asked(vendored, inside)[0] == git(vendored, "rev-parse", "HEAD")
    (vendored / "nbs").mkdir()
    assert asked(vendored, vendored / "nbs")[1:] == ["nbs", str(vendored)]


def test_a_version_is_recorded_of_any_build_of_the_sparse_library(tmp_path, monkeypatch):
    """Its GPU builds are packages of other names; resuming compares what is recorded."""
    (tmp_path / "spconv_cu999-9.8.7.dist-info").mkdir()
    (tmp_path / "spconv_cu999-9.8.7.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: spconv-cu999\nVersion: 9.8.7\n")
    before = versions()
    monkeypatch.syspath_prepend(tmp_path)
    assert versions() == before | {"spconv-cu999": "9.8.7"}
