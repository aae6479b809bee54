"""`train.ipynb` and `eval.ipynb` under papermill with several processes: figures, metrics, a batch file, a crash, a sudden end."""
import json
import os
import subprocess
import sys
import time

import pytest

pytest.importorskip("mmengine", reason='needs the extra: pip install "cmtaqr[detector]"')
pytest.importorskip("papermill", reason='needs the extra: pip install "cmtaqr[dev]"')

import torch  # noqa: E402
from test_launch import ROOT, running, submission, toy, world  # noqa: E402, F401


def papermill(notebook, out, *words, **parameters):
    """The typed command, what it needs, and the folder of the executed notebook."""
    out.mkdir()
    path = os.pathsep.join([str(out.parent), os.environ["PYTHONPATH"]])
    parameters = dict(device="cpu", nproc=2) | parameters
    call = [sys.executable, "-m", "papermill", str(ROOT / "nbs" / f"{notebook}.ipynb"), str(out / f"{notebook}.ipynb"),
            "--no-progress-bar", *(str(w) for name, value in parameters.items() for w in ("-p", name, value)), *words]
    environment = os.environ | dict(PYTHONPATH=path, OMP_NUM_THREADS="1")
    return dict(args=call, cwd=out.parent, env=environment, text=True), out


def training(folder, config, *words):
    """`papermill` of a training with a toy config."""
    return papermill("train", folder / config, *words, config=folder / f"{config}.py", data_root=folder / "data")


def outputs(folder):
    file, = folder.glob("*.ipynb")
    return [o for cell in json.loads(file.read_text())["cells"] for o in cell.get("outputs", [])]


def printed(folder):
    return "".join("".join(o["text"]) for o in outputs(folder) if o["output_type"] == "stream")


def test_two_processes_and_their_figures(toy):  # noqa: F811
    call, out = training(toy, "toy", "-p", "max_iters", "6")
    done = subprocess.run(**call, capture_output=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "result.json").read_text())
    assert result["training"]["processes"] == 2 and result["training"]["iterations"] == 6
    shown = outputs(out)
    assert sum("image/png" in o.get("data", {}) for o in shown) == 3, "losses, scale, learning rates"
    assert any("6/6" in "".join(o.get("data", {}).get("text/plain", "")) for o in shown), "the progress bar"


def test_evaluation_in_two_processes_is_that_of_one(world, tmp_path):  # noqa: F811
    """The same detections and metrics, and a drawn frame that has the weights of the checkpoint."""
    import pandas as pd
    from cmtaqr.detector.convert import build_model
    from cmtaqr.engine.configure import run_config
    from cmtaqr.engine.metrics import predict_frame
    from cmtaqr.engine.parameters import EvalParameters
    from cmtaqr.engine.runner import build_runner
    from cmtaqr.engine.worker import carry_out

    torch.manual_seed(0)
    model = build_model("cmt_aqr_tiny")
    torch.nn.init.normal_(model.pts_bbox_head.aqr_router.to_weights.weight, std=0.3)  # it would start at zero
    torch.save(dict(state_dict=model.state_dict()), tmp_path / "tiny.pth")
    given = dict(data_root=str(world), checkpoint=str(tmp_path / "tiny.pth"), num_workers=0, batch_size=1)
    call, out = papermill("eval", tmp_path / "two", **given)
    done = subprocess.run(**call, capture_output=True)
    assert done.returncode == 0, done.stderr

    params = EvalParameters.check(given | dict(work_dir=str(tmp_path / "one"), device="cpu"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runner = build_runner(params, run_config(params))
        one, two = carry_out("eval", runner), json.loads((out / "result.json").read_text())
        weights = pd.DataFrame(predict_frame(runner, 0).query_weights, columns=["LiDAR", "camera"]).describe()
    finally:
        torch.set_num_threads(threads)
    assert one["metrics"] == two["metrics"] and one["speed"]["frames"] == two["speed"]["frames"] == 3
    found = submission(tmp_path / "one")
    assert submission(out) == found and len(found) == 3 and all(found.values())
    assert weights.loc["std"].min() > 0.01
    for row in ("mean", "std", "min", "max"):
        assert "".join(f"{v:.4f}" for v in weights.loc[row]) in printed(out).replace(" ", "").replace(row, ""), row


def test_slurm_writes_the_batch_file_and_starts_nothing(toy):  # noqa: F811
    call, out = training(toy, "toy", "-p", "max_iters", "6", "-p", "launcher", "slurm", "-p", "nodes", "2")
    done = subprocess.run(**call, capture_output=True)
    assert done.returncode == 0, done.stderr
    text = (out / "run.sbatch").read_text()
    assert "#SBATCH --nodes=2" in text and "--nproc-per-node 2" in text and str(out / "job.json") in text
    assert {p.name for p in out.iterdir()} == {"train.ipynb", "run.sbatch", "job.json"}
    assert text in printed(out) and f"sbatch {out / 'run.sbatch'}" in printed(out)


def test_a_crash_shows_the_traceback_of_its_rank(toy):  # noqa: F811
    call, out = training(toy, "crash", "-p", "max_iters", "6")
    done = subprocess.run(**call, capture_output=True)
    assert done.returncode != 0
    for text in (done.stderr, "".join("".join(o.get("traceback", "")) for o in outputs(out))):
        assert "rank 1 failed" in text and "the disk of rank 1 is gone" in text and "extra_hooks.py" in text
    assert running(str(out / "ranks")) == []


def test_nothing_is_left_when_papermill_is_ended(toy):  # noqa: F811
    """SIGTERM, as from a batch system: papermill's kernel gets no chance to end what it started."""
    call, out = training(toy, "slow", "-p", "max_iters", "400")
    process = subprocess.Popen(**call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    deadline = time.time() + 600
    while not (out / "status.json").is_file() and time.time() < deadline:
        time.sleep(0.2)
    assert len(running(str(out / "ranks"))) >= 2
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode != 0
    deadline = time.time() + 40
    while running(str(out / "ranks")) and time.time() < deadline:
        time.sleep(0.2)
    assert running(str(out / "ranks")) == []
