"""The two run notebooks, one after the other, under papermill on a very small synthetic world."""
import json

import pytest
import torch

pytest.importorskip("mmdet3d", reason='needs the extra: pip install "cmtaqr[detector]"')
pytest.importorskip("papermill", reason='needs the extra: pip install "cmtaqr[dev]"')

from cmtaqr.engine.configure import load_config, run_config  # noqa: E402
from cmtaqr.engine.eval import main as eval_main  # noqa: E402
from cmtaqr.engine.parameters import EvalParameters  # noqa: E402
from cmtaqr.engine.runner import build_runner  # noqa: E402
from test_engine import call_papermill  # noqa: E402

QUICK = ["-p", "data_root", "world", "-p", "device", "cpu", "-p", "num_workers", "0", "-p", "batch_size", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A world of one training and one validation scene of two frames, and a model trained on it for two iterations."""
    from cmtaqr.data.nuscenes import make_infos
    from cmtaqr.data.world import make_world

    folder = tmp_path_factory.mktemp("run")
    make_world(folder / "world", scenes=["scene-0061", "scene-0103"], keyframes=2, sweeps=1, image_size=(400, 225), workers=1,
               progress=False)
    make_infos(folder / "world")
    for name in ("train", "eval"):
        (folder / name).mkdir()
    done = call_papermill("train", "train/train.ipynb", *QUICK, "-p", "max_iters", "2", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def outputs(path):
    return [o for cell in json.loads(path.read_text())["cells"] for o in cell.get("outputs", [])]


def test_training_writes_result_and_figures(folder):
    result = json.loads((folder / "train" / "result.json").read_text())
    assert result["training"]["iterations"] == 2 and result["training"]["samples"] == 2
    assert result["training"]["loss_last"]["loss"] > 0 and {"loss_cls", "loss_bbox"} <= result["training"]["loss_last"].keys()
    start = load_config("cmt_aqr_tiny").model.pts_bbox_head.aqr.bias.bias_scale
    assert result["training"]["bias_scale"] == pytest.approx(start, abs=0.1) and result["training"]["bias_scale"] != start
    assert sum("image/png" in o.get("data", {}) for o in outputs(folder / "train" / "train.ipynb")) == 3


def test_evaluation_writes_metrics_and_figures(folder):
    """Written beside the notebook of the training, into a folder of its own."""
    trained = {name: (folder / "train" / name).read_bytes() for name in ("run.json", "result.json")}
    words = "-p", "checkpoint", "train", "-p", "frame", "1", "-p", "work_dir", "eval"
    done = call_papermill("eval", "train/eval.ipynb", *QUICK, *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert trained == {name: (folder / "train" / name).read_bytes() for name in trained}
    result = json.loads((folder / "eval" / "result.json").read_text())
    assert result["metrics"].keys() == {"mAP", "NDS", "mATE", "mASE", "mAOE", "mAVE", "mAAE"}
    assert all(0 <= result["metrics"][name] <= 1 for name in ("mAP", "NDS")) and len(result["classes"]) == 10
    assert result["checkpoint"].endswith("iter_2.pth") and result["speed"]["frames"] == 2
    shown = outputs(folder / "train" / "eval.ipynb")
    assert sum("image/png" in o.get("data", {}) for o in shown) == 5, "AP, curves, BEV, cameras, query weights"
    printed = "".join(t for o in shown if o["output_type"] == "stream" for t in o["text"])
    assert len(printed.splitlines()) < 40 and "CAUTION" not in printed, printed


def test_a_frame_that_is_not_there_is_refused_before_the_evaluation(folder):
    words = "-p", "checkpoint", "train", "-p", "frame", "2", "-p", "work_dir", "none"
    done = call_papermill("eval", "train/none.ipynb", *QUICK, *words, cwd=folder)
    assert done.returncode and "frame=2, but the evaluated set has 2 frames: choose 0 to 1" in done.stderr
    assert not (folder / "none" / "result.json").exists()


def test_a_shell_cautions_as_the_notebook_does(folder, capsys):
    words = [f"{name}={folder / path}" for name, path in dict(data_root="world", checkpoint="train", work_dir="shell").items()]
    assert eval_main(["cmt_aqr_tiny", *words, "device=cpu", "num_workers=0", "window_size=3"]) == 0
    said = capsys.readouterr().err
    assert "CAUTION: the checkpoint was trained with window_size=None, it is evaluated with window_size=3" in said


def test_a_model_that_detects_nothing_is_told_apart(folder, capsys):
    content = torch.load(folder / "train" / "iter_2.pth", weights_only=False)
    for value in content["state_dict"].values():
        if value.is_floating_point():
            value.fill_(torch.nan)
    torch.save(dict(state_dict=content["state_dict"]), folder / "lost.pth")
    words = [f"{name}={folder / path}" for name, path in dict(data_root="world", checkpoint="lost.pth", work_dir="lost").items()]
    assert eval_main(["cmt_aqr_tiny", *words, "device=cpu", "num_workers=0"]) == 1
    assert "no frame has a detection" in capsys.readouterr().err


def test_checkpoint_of_another_model_is_refused(folder):
    values = dict(data_root=str(folder / "world"), work_dir=str(folder / "other"), checkpoint=str(folder / "train"), device="cpu",
                  num_workers=0)
    params = EvalParameters.check(values | dict(enable_aqr=False))
    with pytest.raises(ValueError, match="aqr"):
        build_runner(params, run_config(params)).test()
