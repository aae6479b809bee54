"""`train.ipynb` under papermill with several processes: figures, a batch file, a crash, a sudden end."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("mmengine", reason='needs the extra: pip install "cmtaqr[detector]"')
pytest.importorskip("papermill", reason='needs the extra: pip install "cmtaqr[dev]"')

from test_launch import ROOT, toy  # noqa: E402, F401


def papermill(folder, config, *words):
    """The typed command, what it needs, and the executed notebook."""
    out = folder / config
    out.mkdir()
    path = os.pathsep.join([str(folder), str(ROOT), str(ROOT / "tests")])
    parameters = dict(config=folder / f"{config}.py", data_root=folder / "data", device="cpu", nproc=2)
    call = [sys.executable, "-m", "papermill", str(ROOT / "nbs" / "train.ipynb"), str(out / "train.ipynb"), "--no-progress-bar",
            *(str(w) for name, value in parameters.items() for w in ("-p", name, value)), *words]
    environment = os.environ | dict(PYTHONPATH=path, OMP_NUM_THREADS="1")
    return dict(args=call, cwd=folder, env=environment, text=True), out


def outputs(folder):
    return [o for cell in json.loads((folder / "train.ipynb").read_text())["cells"] for o in cell.get("outputs", [])]


def running(word):
    """Processes whose command line has a word."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [path.parent.name] if word.encode() in path.read_bytes() else []
        except OSError:
            continue
    return found


def test_two_processes_and_their_figures(toy):  # noqa: F811
    call, out = papermill(toy, "toy", "-p", "max_iters", "6")
    done = subprocess.run(**call, capture_output=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "result.json").read_text())
    assert result["training"]["processes"] == 2 and result["training"]["iterations"] == 6
    shown = outputs(out)
    assert sum("image/png" in o.get("data", {}) for o in shown) == 3, "losses, scale, learning rates"
    assert any("6/6" in "".join(o.get("data", {}).get("text/plain", "")) for o in shown), "the progress bar"


def test_slurm_writes_the_batch_file_and_starts_nothing(toy):  # noqa: F811
    call, out = papermill(toy, "toy", "-p", "max_iters", "6", "-p", "launcher", "slurm", "-p", "nodes", "2")
    done = subprocess.run(**call, capture_output=True)
    assert done.returncode == 0, done.stderr
    text = (out / "run.sbatch").read_text()
    assert "#SBATCH --nodes=2" in text and "--nproc-per-node 2" in text and str(out / "job.json") in text
    assert {p.name for p in out.iterdir()} == {"train.ipynb", "run.sbatch", "job.json"}
    printed = "".join("".join(o["text"]) for o in outputs(out) if o["output_type"] == "stream")
    assert text in printed and f"sbatch {out / 'run.sbatch'}" in printed


def test_a_crash_shows_the_traceback_of_its_rank(toy):  # noqa: F811
    call, out = papermill(toy, "crash", "-p", "max_iters", "6")
    done = subprocess.run(**call, capture_output=True)
    assert done.returncode != 0
    for text in (done.stderr, "".join("".join(o.get("traceback", "")) for o in outputs(out))):
        assert "rank 1 failed" in text and "the disk of rank 1 is gone" in text and "extra_hooks.py" in text
    assert running(str(out / "job.json")) == []


def test_nothing_is_left_when_papermill_is_ended(toy):  # noqa: F811
    """SIGTERM, as from a batch system: papermill's kernel gets no chance to end what it started."""
    call, out = papermill(toy, "slow", "-p", "max_iters", "400")
    process = subprocess.Popen(**call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    deadline = time.time() + 90
    while not (out / "status.json").is_file() and time.time() < deadline:
        time.sleep(0.2)
    assert len(running(str(out / "job.json"))) >= 2
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode != 0
    deadline = time.time() + 40
    while running(str(out / "job.json")) and time.time() < deadline:
        time.sleep(0.2)
    assert running(str(out / "job.json")) == []
