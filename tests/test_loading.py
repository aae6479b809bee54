"""The training pipeline, timed stage by stage by one command, and what a node needs for it."""
import json

import pytest

pytest.importorskip("mmdet3d", reason='needs the extra: pip install "cmtaqr[detector]"')

from cmtaqr.engine.configure import load_config  # noqa: E402
from cmtaqr.engine.loading import main, make_data  # noqa: E402
from cmtaqr.engine.parameters import package_root  # noqa: E402


def test_stages_workers_and_needs_of_a_small_world(tmp_path, capsys):
    make_data(tmp_path / "world", frames=1, image_size=(320, 180), sweeps=2)
    child = tmp_path / "small.py"
    child.write_text(f'_base_ = [r"{package_root() / "cmtaqr/configs/cmt_aqr_tiny.py"}"]\npaste = dict()\nsweeps_num = 2\n')
    pace = dict(config=str(child), batch=2, model="aqr", frozen=True, precision="bf16", attention="windows", checkpointing=True,
                compile=[], samples_per_second=100.0)
    (tmp_path / "training.json").write_text(json.dumps(dict(records=[pace])))
    call = ["--json", str(tmp_path / "loading.json"), "--data", str(tmp_path / "world"),
            "--training", str(tmp_path / "training.json"), "--configs", str(child), "--workers", "1", "--samples", "2"]
    assert main(call) == 0
    result = json.loads((tmp_path / "loading.json").read_text())
    found, (row,) = result["configs"][str(child)], result["needs"]
    transforms = [t["type"] for t in load_config(child).train_dataloader.dataset.pipeline]
    assert list(found["cpu_ms"]) == ["read the list", *transforms] and "PasteObjects" in transforms
    assert found["paces"][0]["samples_per_second"] > 0 and found["packed_mib"] > 0.7
    assert row["cores_per_gpu"] == pytest.approx(100 * row["ms_per_sample"] / 1e3, rel=1e-2)
    assert row["workers_per_gpu"] >= 0.95 * row["cores_per_gpu"] and row["cores_per_node"] == 8 * (row["workers_per_gpu"] + 1)
    told = capsys.readouterr().out
    assert "ms of a core per sample" in told and result["sentence"] in told and "database infos" not in told


def test_missing_data_is_named(tmp_path, capsys):
    assert main(["--json", str(tmp_path / "loading.json"), "--data", str(tmp_path / "absent")]) == 1
    assert "absent" in capsys.readouterr().err
