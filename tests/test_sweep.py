"""Sweeps as a caller sees them: papermill over papermill, a failure, a kill, and one real run."""
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("mmengine", reason='needs the extra: pip install "cmtaqr[detector]"')
pytest.importorskip("papermill", reason='needs the extra: pip install "cmtaqr[dev]"')

import nbformat  # noqa: E402
from nbformat.v4 import new_code_cell, new_notebook  # noqa: E402

from cmtaqr.engine import runs  # noqa: E402
from cmtaqr.engine.grid import SweepParameters  # noqa: E402
from cmtaqr.engine.options import check_run_notebook, declaration  # noqa: E402
from cmtaqr.engine.parameters import TrainParameters  # noqa: E402
from cmtaqr.engine.sweep import check_finished, sweep, unfinished  # noqa: E402
from conftest import ROOT  # noqa: E402
from test_engine import call_papermill  # noqa: E402

TOY = """
train_cfg = dict(max_epochs=1)
train_dataloader = dict(num_workers=0)
test_dataloader = None
model = dict(aqr=dict(router=dict(), bias=dict(type="AttentionBiasGenerator")))
default_hooks = dict(checkpoint=dict())
"""
# In the place of papermill: `base` sleeps as long as the file `wait` is there.
STAND_IN = """
import json, pathlib, sys, time
values = json.loads(pathlib.Path(sys.argv[1]).read_text())
out = pathlib.Path(values["work_dir"])
(out / "began").touch()
while pathlib.Path(__file__).with_name("wait").exists() and "base" in out.parts:
    time.sleep(0.05)
(out / "result.json").write_text(json.dumps(dict(training={}, metrics=dict(mAP=0.5, NDS=values["seed"]))))
"""
SWEEP = """
import sys
from cmtaqr.engine import runs, sweep
runs._command = lambda stage, notebooks, out: [sys.executable, "stand_in.py", str(out / "parameters.json")]
sys.exit(sweep.main(sys.argv[1:]))
"""


@pytest.fixture
def toy(tmp_path):
    """Parameters of a sweep over a toy config, whose train notebook fails."""
    (tmp_path / "toy.py").write_text(TOY)
    for stage in runs.Run.STAGES:
        cells = [new_code_cell(declaration(TrainParameters), metadata=dict(tags=["parameters"])),
                 new_code_cell("raise FloatingPointError(f'seed {seed}, window {window_size}: no number')")]
        kernel = dict(name="python3", language="python", display_name="python3")
        nbformat.write(new_notebook(cells=cells, metadata=dict(kernelspec=kernel)), tmp_path / f"{stage}.ipynb")
    return dict(config=str(tmp_path / "toy.py"), notebooks=str(tmp_path), device="cpu", workers=1, seeds=[4])


def test_sweep_notebook_declares_its_parameters():
    check_run_notebook(ROOT / "nbs" / "sweep.ipynb", SweepParameters)


def test_notebook_marks_a_failed_run_and_ends_with_its_last_lines(toy, tmp_path):
    (tmp_path / "out").mkdir()
    lists = ["-y", "axes: {window_size: [8]}", "-y", "seeds: [4]"]
    arguments = [a for name in ("config", "notebooks", "device", "workers") for a in ("-p", name, str(toy[name]))]
    done = call_papermill("sweep", "out/sweep.ipynb", *arguments, *lists, cwd=tmp_path)
    assert done.returncode != 0
    assert "SweepError: 1 of 1 runs are not finished" in done.stderr and "base/seed=4: failed" in done.stderr
    assert "FloatingPointError: seed 4, window 8: no number" in done.stderr
    outputs = [o for cell in json.loads((tmp_path / "out" / "sweep.ipynb").read_text())["cells"] for o in cell.get("outputs", [])]
    assert any("0 of 1 (1 FAILED)" in "".join(o["data"].get("text/plain", "")) for o in outputs if "data" in o)
    assert any("image/png" in o.get("data", {}) for o in outputs), "the figure is there too"
    result = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert result["points"][0]["runs"] == dict(failed=1) and result["points"][0]["mAP"] is None
    assert (tmp_path / "out" / "sweep.csv").read_text().splitlines()[1].startswith("base,8,0,1,0,")


def test_killed_sweep_ends_its_runs_and_the_next_call_goes_on(toy, tmp_path, monkeypatch):
    for name, text in (("stand_in.py", STAND_IN), ("wait", "")):
        (tmp_path / name).write_text(text)
    call = [sys.executable, "-c", SWEEP, "w", "--config", "toy.py", "--notebooks", ".", "--device", "cpu", "--workers", "1",
            "--seeds", "4", "--axis", "version=0"]
    process = subprocess.Popen(call, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    train = tmp_path / "w" / "base" / "seed=4" / "train"
    while not (train / "began").exists():
        assert process.poll() is None
        time.sleep(0.1)
    monkeypatch.chdir(tmp_path)
    params = SweepParameters.check(dict(toy, config="toy.py", notebooks=".", axes=dict(version=[0])))
    with pytest.raises(ValueError, match=f"w is in use by process {process.pid} or a run that it started"):
        sweep(params, "w")
    process.send_signal(signal.SIGKILL)
    process.wait()
    while True:  # until the run has ended too, and with it the lock
        try:
            with runs.folder_lock(tmp_path / "w"):
                break
        except ValueError:
            time.sleep(0.1)
    assert not (train / "result.json").exists()
    assert json.loads((train.parent / "status.json").read_text())["state"] == "running"
    (tmp_path / "wait").unlink()
    call = [sys.executable, "stand_in.py"]
    monkeypatch.setattr(runs, "_command", lambda stage, notebooks, out: [*call, str(out / "parameters.json")])
    result = sweep(params, "w")
    check_finished(result)
    assert [row["mAP"] for row in result["points"]] == [dict(mean=0.5, std=None, n=1)] * 2
    status = [json.loads(Path("w", run["folder"], "status.json").read_text()) for run in result["runs"]]
    assert [s["attempts"] for s in status] == [2, 1] and [s["done"] for s in status] == [["train", "eval"]] * 2


def test_one_real_run_on_a_world_made_once(tmp_path):
    pytest.importorskip("mmdet3d", reason='needs the extra: pip install "cmtaqr[detector]"')
    world = dict(scenes=["scene-0061", "scene-0103"], keyframes=2, image_size=[400, 225], seed=3)
    params = SweepParameters.check(dict(
        axes=dict(scale_mode=["smooth"]), base=dict(scale_mode="smooth", batch_size=1, num_workers=0), seeds=[1], max_iters=2,
        data_root="synthetic", world=world, device="cpu", workers=1))
    result = sweep(params, tmp_path)
    assert unfinished(result) == ""
    run, = result["runs"]
    assert run["folder"] == "base/seed=1" and 0 <= run["NDS"] <= 1 and run["loss"] > 0 and run["memory"] > 100
    assert run["bias_scale"] == pytest.approx(2.5, abs=0.05) and run["bias_scale"] != 2.5
    trained = json.loads((tmp_path / run["folder"] / "train" / "result.json").read_text())["parameters"]
    assert (trained["version"], trained["window_size"], trained["scale_mode"], trained["seed"]) == (3, 8, "smooth", 1)
    assert json.loads((tmp_path / "world" / "world.json").read_text())["world"]["seed"] == 3
    assert (tmp_path / "figures" / "sweep.png").stat().st_size > 5000
