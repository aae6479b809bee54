"""The tiny AQR model on a very small synthetic world: killed and resumed, and with a broken image."""
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet3d", reason='needs the extra: pip install "cmtaqr[detector]"')

from cmtaqr.detector.sparse import sparse_backend  # noqa: E402
from cmtaqr.engine.hooks import read_history  # noqa: E402
from cmtaqr.engine.rerun import compare_losses  # noqa: E402
from cmtaqr.engine.safe_files import newest_checkpoint  # noqa: E402
from resume_engine import train_toy  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    """Parameters of a run of four iterations on three frames, augmented as the config says."""
    from cmtaqr.data.nuscenes import make_infos
    from cmtaqr.data.world import make_world
    folder = tmp_path_factory.mktemp("real")
    make_world(folder / "world", scenes=["scene-0061"], keyframes=3, sweeps=1, image_size=(400, 225), workers=1, progress=False)
    make_infos(folder / "world")
    return dict(config="cmt_aqr_tiny", data_root=str(folder / "world"), work_dir=str(folder / "whole"), max_iters=4, device="cpu",
                num_workers=0, batch_size=1)


PROGRAM = """
import json, os, sys
import resume_engine
values, kill = json.loads(sys.argv[1])
if kill:
    from cmtaqr.engine.state import StateHook
    StateHook.after_train_iter = lambda self, runner, *_, **__: runner.iter == kill and os.kill(os.getpid(), 9)
resume_engine.train_toy(**values)
"""


def train_apart(*runs):
    """Train side by side in processes of their own, from (values, iterations after which it dies; 0 for never)."""
    options = dict(text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | dict(OMP_NUM_THREADS="1"))
    started = [subprocess.Popen([sys.executable, "-c", PROGRAM, json.dumps(run)], **options) for run in runs]
    for process, (_, kill) in zip(started, runs):
        _, said = process.communicate()
        assert process.returncode == (-signal.SIGKILL if kill else 0), said


def whole_and_resumed(values, folder):
    """Train once without and once with being killed in the middle and resumed; the work folders."""
    folders, middle = [folder / "whole", folder / "resumed"], values["max_iters"] // 2
    whole, killed = (values | dict(work_dir=str(place), interval=middle) for place in folders)
    train_apart((whole, 0), (killed, middle))
    assert newest_checkpoint(folders[1]).name == f"iter_{middle}.pth"
    train_apart((killed | dict(resume=True, num_workers=1), 0))
    return folders


def largest_difference(one, other):
    """Largest relative difference of a loss in any iteration of two runs of the same length."""
    first, second = (read_history(folder)["records"] for folder in (one, other))
    assert len(first) == len(second) > 0
    return compare_losses(first, second)["largest"]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_killed_and_resumed(values, device, tmp_path, request):
    """The same bits: on a CPU always, on a GPU with deterministic kernels."""
    if device == "cuda":
        request.getfixturevalue("cuda")
        if sparse_backend() != "spconv":
            pytest.skip("needs spconv for this GPU (pip install spconv-cu126): the sums of other sparse convolutions cannot be ordered")
    values = values | dict(device=device, deterministic=device == "cuda")
    whole, resumed = folders = whole_and_resumed(values, tmp_path)
    assert largest_difference(whole, resumed) == 0.0
    recorded = [[(r["grad_norm"], r["bias_scale"]) for r in read_history(folder)["records"]] for folder in folders]
    assert recorded[0] == recorded[1] and len(recorded[0]) == 4
    one, other = (torch.load(newest_checkpoint(folder), map_location="cpu", weights_only=False)["state_dict"] for folder in folders)
    assert one.keys() == other.keys() and all(map(torch.equal, one.values(), other.values()))


def drift(pairs, first, last):
    """Largest relative difference of the total loss between runs, iteration by iteration."""
    losses = [[[r["loss"] for r in read_history(folder)["records"]][first:last] for folder in pair] for pair in pairs]
    assert all(len(run) == last - first for pair in losses for run in pair)
    return [max(abs(pair[0][i] / pair[1][i] - 1) for pair in losses) for i in range(last - first)]


@pytest.mark.gpu
def test_gpu_resumed_run_drifts_no_faster_than_repetitions(values, cuda, tmp_path, capsys):
    """Without deterministic kernels sums are added up in another order each time, and runs from the same weights drift apart."""
    half, folders = 6, [tmp_path / str(number) for number in range(3)]
    values = values | dict(device="cuda", max_iters=2 * half, interval=half)
    train_apart(*((values | dict(work_dir=str(folder)), 0) for folder in folders))
    resumed = [shutil.copytree(folder, folder.with_name(f"{folder.name} resumed")) for folder in folders]
    train_apart(*((values | dict(work_dir=str(folder), resume=True, checkpoint=str(folder / f"iter_{half}.pth")), 0)
                  for folder in resumed))
    noise = drift(list(itertools.combinations(folders, 2)), 0, half)
    difference = drift(list(zip(folders, resumed)), half, 2 * half)
    with capsys.disabled():
        print("\nlargest relative difference of the loss, iteration by iteration: three runs from the same weights",
              *(f"{share:.1e}" for share in noise), "- the same runs and their continuations from a checkpoint",
              *(f"{share:.1e}" for share in difference))
    assert max(difference) <= 10 * max(noise)


def test_broken_image_is_replaced_by_name(values):
    image = sorted(Path(values["data_root"]).glob("samples/CAM_FRONT/*"))[0]
    image.write_bytes(image.read_bytes()[:100])
    folder = Path(values["work_dir"]).parent / "broken"
    runner = train_toy(**values | dict(work_dir=str(folder), max_iters=3))
    assert runner.iter == 3
    event, = [json.loads(line) for line in (folder / "faults.jsonl").read_text().splitlines()]
    tokens = {entry["token"] for entry in json.loads((Path(values["data_root"]) / "v1.0-mini" / "sample.json").read_text())}
    assert event["kind"] == "sample" and event["name"] in tokens and f"{image.name} is truncated or broken" in event["reason"]
