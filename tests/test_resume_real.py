"""The tiny AQR model on a very small synthetic world: killed and resumed, and with a broken image."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet3d", reason='needs the extra: pip install "cmtaqr[detector]"')

from cmtaqr.engine.hooks import read_history  # noqa: E402
from cmtaqr.engine.safe_files import newest_checkpoint  # noqa: E402
from resume_engine import train_toy  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    """Parameters of a run of four iterations on three frames, augmented as the config says."""
    from cmtaqr.data.nuscenes import make_infos
    from cmtaqr.data.world import make_world
    folder = tmp_path_factory.mktemp("real")
    make_world(folder / "world", scenes=["scene-0061"], keyframes=3, sweeps=1, image_size=(400, 225), workers=1, progress=False)
    make_infos(folder / "world")
    return dict(config="cmt_aqr_tiny", data_root=str(folder / "world"), work_dir=str(folder / "whole"), max_iters=4, device="cpu",
                num_workers=0, batch_size=1, interval=2)


def test_killed_and_resumed(values):
    whole = train_toy(**values)
    killed = values | dict(work_dir=str(Path(values["work_dir"]).parent / "killed"))
    program = "import json, sys\nfrom mmengine.registry import HOOKS\nimport os, cmtaqr.engine.runner, resume_engine\n" \
              "from cmtaqr.engine.state import StateHook\n" \
              "StateHook.after_train_iter = lambda self, runner, *_, **__: runner.iter == 2 and os.kill(os.getpid(), 9)\n" \
              "resume_engine.train_toy(**json.loads(sys.argv[1]))"
    environment = os.environ | dict(PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]), OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-c", program, json.dumps(killed)], env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert newest_checkpoint(killed["work_dir"]).name == "iter_2.pth"
    resumed = train_toy(**killed | dict(resume=True, num_workers=1))
    losses = [[{k: v for k, v in record.items() if "loss" in k or "bias" in k or k == "grad_norm"}
               for record in read_history(folder)["records"]] for folder in (values["work_dir"], killed["work_dir"])]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert all(map(torch.equal, whole.model.state_dict().values(), resumed.model.state_dict().values()))


def test_broken_image_is_replaced_by_name(values):
    image = sorted(Path(values["data_root"]).glob("samples/CAM_FRONT/*"))[0]
    image.write_bytes(image.read_bytes()[:100])
    folder = Path(values["work_dir"]).parent / "broken"
    runner = train_toy(**values | dict(work_dir=str(folder), max_iters=3))
    assert runner.iter == 3
    event, = [json.loads(line) for line in (folder / "faults.jsonl").read_text().splitlines()]
    tokens = {entry["token"] for entry in json.loads((Path(values["data_root"]) / "v1.0-mini" / "sample.json").read_text())}
    assert event["kind"] == "sample" and event["name"] in tokens and f"{image.name} is truncated or broken" in event["reason"]
