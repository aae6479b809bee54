"""Training steps of one and of two processes, measured by one command."""
import json

import pytest

pytest.importorskip("mmengine", reason='needs the extra: pip install "cmtaqr[detector]"')

from cmtaqr.engine.scaling import main  # noqa: E402

SMALL = ["--configs", "cmt_aqr_tiny", "--modes", "frozen", "--batch", "1", "--steps", "1", "--warmup", "1", "--turns", "1",
         "--boxes", "10", "--precision", "fp32", "--device", "cpu"]


def test_two_processes_share_a_step_and_a_second_call_measures_nothing_anew(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CMTAQR_COMMIT", "one")  # a file of another commit is begun anew
    file = tmp_path / "scaling.json"
    assert main(["--json", str(file), "--nproc", "1", "2", "--pin", *SMALL]) == 0
    first, told = json.loads(file.read_text()), capsys.readouterr().out
    plain = {r["nproc"]: r for r in first["records"] if r["option"] == "plain"}
    assert [r["nproc"] for r in first["records"]] == [1, 1, 2, 2, 2] and first["left"] == 0
    assert {r["option"] for r in first["records"]} == {"plain", "wrapped", "bucket view", "static graph"}
    assert "exposed_ms" not in plain[1] and plain[2]["exchange_ms"] > 0 and plain[2]["peak_mib"] == [None, None]
    assert len(plain[2]["apart_ms"]) == 2 and min(plain[2]["apart_ms"]) > 0
    share = plain[2]["samples_per_second"] / plain[1]["samples_per_second"]
    assert first["summary"]["cmt_aqr_tiny, batch 1, frozen"]["plain"]["2"] == pytest.approx(share, abs=1e-3)
    assert "2 processes 3/3" in told
    assert main(["--json", str(file), "--nproc", "1", "2", "--pin", *SMALL]) == 0
    assert json.loads(file.read_text())["records"] == first["records"]


def test_more_processes_than_gpus_are_refused(tmp_path, capsys):
    assert main(["--json", str(tmp_path / "none.json"), "--nproc", "64", "--device", "cuda"]) == 1
    assert "nproc=64" in (error := capsys.readouterr().err) or "device='cuda'" in error


def test_an_unreadable_config_is_named(tmp_path, capsys):
    config = tmp_path / "broken.py"
    config.write_text("_base_ = ['missing.py']\n")
    assert main(["--json", str(tmp_path / "none.json"), "--nproc", "1", "--device", "cpu", "--configs", str(config)]) == 1
    assert "missing.py" in capsys.readouterr().err
