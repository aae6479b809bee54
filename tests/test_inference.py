"""`cmtaqr.detect` and the evaluation on every kind of nuScenes root: versions, splits, with and without info files."""
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet3d", reason='needs the detector part: pip install "cmtaqr[detector]"')

import cmtaqr  # noqa: E402
from cmtaqr.data.nuscenes import make_infos  # noqa: E402
from cmtaqr.data.world import make_world  # noqa: E402
from cmtaqr.detector.convert import build_model, convert_checkpoint  # noqa: E402
from cmtaqr.engine.configure import run_config  # noqa: E402
from cmtaqr.engine.inference import Detector, detect_all, main  # noqa: E402
from cmtaqr.engine.lookup import config_of, find_info, sample_tokens  # noqa: E402
from cmtaqr.engine.metrics import evaluate  # noqa: E402
from cmtaqr.engine.parameters import EvalParameters, ParameterError  # noqa: E402
from cmtaqr.engine.runner import build_runner  # noqa: E402

from conftest import ROOT  # noqa: E402
from test_engine import call_papermill  # noqa: E402

SCENES = {"v1.0-mini": ["scene-0061", "scene-0103"], "v1.0-trainval": ["scene-0001", "scene-0003"]}


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """A world in either version, one training and one validation scene each, with info files."""
    folder = tmp_path_factory.mktemp("roots")
    for version, scenes in SCENES.items():
        make_world(folder / version, scenes=scenes, keyframes=2, sweeps=1, image_size=(400, 225), workers=1, progress=False)
        make_infos(folder / version)
        assert (folder / version / version).is_dir()
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """An untrained tiny model that answers with class scores of about one half, so that boxes enter the metric."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.save(dict(state_dict=build_model("cmt_aqr_tiny").state_dict()), file)
    return file


@pytest.fixture(scope="module")
def detector(roots, weights):
    return Detector(weights, data_root=roots / "v1.0-mini", device="cpu")


def runner_of(root, weights, work_dir, **more):
    given = dict(data_root=str(root), checkpoint=str(weights), work_dir=str(work_dir), device="cpu", num_workers=0, batch_size=1)
    params = EvalParameters.check(given | more)
    return build_runner(params, run_config(params))


@pytest.mark.parametrize("version, split", [("v1.0-mini", "train"), ("v1.0-trainval", "val")])
def test_either_split_of_either_version(roots, weights, tmp_path, version, split):
    """The devkit scores exactly the split's frames, and `detect_all` writes the evaluation's submission.

    The other two pairs are evaluated by notebook, below and in test_notebooks.py.
    """
    evaluation, speed = evaluate(runner_of(roots / version, weights, tmp_path, split=split))
    assert speed["frames"] == 2 and 0 <= evaluation.metrics["NDS"] <= 1 and len(evaluation.classes) == 10
    submitted = json.loads((tmp_path / "nuscenes" / "pred_instances_3d" / "results_nusc.json").read_text())["results"]
    tokens = sample_tokens(roots / version, split)
    assert set(submitted) == set(tokens) and all(submitted.values())
    mine = detect_all(Detector(weights, data_root=roots / version, device="cpu"), tokens, tmp_path / "mine")
    mine = json.loads(mine.read_text())["results"]
    for token in tokens:
        assert len(mine[token]) == len(submitted[token])
        for a, b in zip(mine[token], submitted[token]):
            assert all(a[key] == b[key] for key in ("detection_name", "attribute_name"))
            for key in ("translation", "size", "rotation", "velocity", "detection_score"):
                np.testing.assert_allclose(a[key], b[key], atol=1e-4)


def test_evaluation_refuses_what_it_cannot_finish_before_it_starts(roots, weights, tmp_path):
    root = shutil.copytree(roots / "v1.0-mini", tmp_path / "root")
    content = pickle.loads((root / "nuscenes_infos_val.pkl").read_bytes())

    def evaluated(change):
        changed = change(pickle.loads(pickle.dumps(content)))
        (root / "nuscenes_infos_val.pkl").write_bytes(pickle.dumps(changed))
        return evaluate(runner_of(root, weights, tmp_path / "work"))

    with pytest.raises(ValueError, match="lists no frame.*choose the other one"):
        evaluated(lambda c: dict(c, data_list=[]))
    with pytest.raises(ValueError, match="'v1.0-test', which has no boxes"):
        evaluated(lambda c: dict(c, metainfo=dict(c["metainfo"], version="v1.0-test")))
    with pytest.raises(FileNotFoundError, match="v1.0-trainval, whose tables are not in"):
        evaluated(lambda c: dict(c, metainfo=dict(c["metainfo"], version="v1.0-trainval")))
    (root / "nuscenes_infos_val.pkl").unlink()
    with pytest.raises(FileNotFoundError, match="python -m cmtaqr.data.nuscenes"):
        runner_of(root, weights, tmp_path / "work")
    with pytest.raises(ParameterError, match="split='test' is unknown"):
        EvalParameters.check(dict(untrained=True, split="test"))


def test_notebook_on_the_training_split_of_trainval(roots, weights, tmp_path):
    given = dict(data_root=roots / "v1.0-trainval", checkpoint=weights, device="cpu", num_workers=0, split="train")
    (tmp_path / "eval").mkdir()
    done = call_papermill("eval", "eval/eval.ipynb", *(x for k, v in given.items() for x in ("-p", k, str(v))), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "eval" / "result.json").read_text())
    assert result["speed"]["frames"] == 2 and result["parameters"]["split"] == "train"


def test_tables_alone_are_enough(roots, weights, tmp_path):
    root = shutil.copytree(roots / "v1.0-trainval", tmp_path / "root")
    tokens = {split: sample_tokens(root, split) for split in ("train", "val", "all")}
    with_files = cmtaqr.detect(tokens["val"][1], weights, data_root=root, device="cpu")
    for file in root.glob("*.pkl"):
        file.unlink()
    assert {split: sample_tokens(root, split) for split in tokens} == tokens and len(tokens["all"]) == 4
    without = cmtaqr.detect(tokens["val"][1], weights, data_root=root, device="cpu")
    assert len(without.boxes) > 0 and (with_files.boxes == without.boxes).all() and without.token == tokens["val"][1]


def test_the_model_is_loaded_once(roots, weights, monkeypatch):
    import cmtaqr.engine.inference as inference
    inference._kept.cache_clear()
    loads = []
    monkeypatch.setattr(inference, "load_checkpoint", lambda *args: loads.append(args) or [])
    tokens = sample_tokens(roots / "v1.0-mini", "all")
    for token in tokens[:3]:
        cmtaqr.detect(token, weights, data_root=roots / "v1.0-mini", device="cpu")
    assert len(loads) == 1
    weights.touch()
    cmtaqr.detect(tokens[0], weights, data_root=roots / "v1.0-mini", device="cpu")
    assert len(loads) == 2, "a file that has changed is loaded anew"
    inference._kept.cache_clear()


def test_result(detector, roots):
    token = sample_tokens(roots / "v1.0-mini")[0]
    found = detector(token)
    assert found.boxes.shape[1] == 9 and found.names[0] == found.classes[found.labels[0]] and (np.diff(found.scores) <= 0).all()
    some = detector(token, score_threshold=float(found.scores[20]))
    assert len(some.boxes) == 21 == len(some.frame.boxes) == len(some.aqr_weights) and (some.boxes == found.boxes[:21]).all()
    assert len(detector(token, score_threshold=1.1).boxes) == 0
    plain = Detector(detector.checkpoint, data_root=roots / "v1.0-mini", device="cpu")
    plain.model.pts_bbox_head.with_aqr = False
    assert plain(token).aqr_weights is None


def test_config_is_found(weights, tmp_path):
    assert config_of(weights)[1] == "cmt_aqr_tiny, which its weights fit"
    base = Path(cmtaqr.__file__).parent / "configs" / "cmt_aqr_tiny.py"
    (tmp_path / "cmt.py").write_text(f"_base_ = [r'{base}']\nmodel = dict(pts_bbox_head=dict(aqr=None))\n")
    torch.save(dict(state_dict=build_model(tmp_path / "cmt.py").state_dict()), tmp_path / "cmt.pth")
    with pytest.raises(ValueError, match="fits no packaged config: give config="):
        config_of(tmp_path / "cmt.pth")
    convert_checkpoint(tmp_path / "cmt.pth", tmp_path / "start.pth", "cmt_aqr_tiny")
    assert config_of(tmp_path / "start.pth")[1] == "cmt_aqr_tiny of the conversion"
    cfg, source = config_of(tmp_path / "cmt.pth", tmp_path / "cmt.py")
    assert source == "the caller" and not cfg.model.pts_bbox_head.aqr
    params = EvalParameters.check(dict(untrained=True, window_size=5, preset="conservative", bias_scale=1.25)).asdict()
    (tmp_path / "run.json").write_text(json.dumps(dict(parameters=params)))
    cfg, source = config_of(tmp_path / "start.pth")
    assert source == "cmt_aqr_tiny of run.json" and cfg.model.pts_bbox_head.aqr.bias.bias_scale == 1.25
    assert cfg.model.pts_bbox_head.aqr.bias.window_size == 5
    (tmp_path / "run.json").write_text('{"parameters": ')
    with pytest.raises(ValueError, match="run.json is broken"):
        config_of(tmp_path / "start.pth")


def test_text_in_a_checkpoint_is_not_run(weights, tmp_path):
    """mmengine stores the config's source in its files; a config is a program."""
    content = torch.load(weights, weights_only=True)
    text = f"from pathlib import Path\nPath(r'{tmp_path / 'ran'}').touch()\nmodel = dict(type='CmtDetector')\n"
    torch.save(dict(content, meta=dict(cfg=text)), tmp_path / "hostile.pth")
    Detector(tmp_path / "hostile.pth", device="cpu")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["missing.pth", "folder"])
def test_missing_checkpoint(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        cmtaqr.detect("token", tmp_path / name)


def test_broken_file_of_a_frame_is_named(roots, weights, tmp_path):
    root = shutil.copytree(roots / "v1.0-mini", tmp_path / "root")
    token = sample_tokens(root)[0]
    image = root / "samples" / "CAM_BACK" / find_info(token, root)[0]["images"]["CAM_BACK"]["img_path"]
    image.write_bytes(image.read_bytes()[:1000])
    with pytest.raises(ValueError, match=image.name):
        cmtaqr.detect(token, weights, data_root=root, device="cpu")


def test_images_of_unequal_size(detector, roots):
    """Each view is brought to the network's size with its own matrix, also one that is stored at twice the size."""
    import cv2
    info, _ = find_info(sample_tokens(roots / "v1.0-mini")[0], roots / "v1.0-mini")
    loaded = detector.load(info)
    frame = dict(points=loaded["inputs"]["points"].numpy(), images=[], lidar2img=[])
    for i, (name, view) in enumerate(info["images"].items()):
        image = cv2.imread(str(roots / "v1.0-mini" / "samples" / name / view["img_path"]))
        scale = 2 if i == 2 else 1
        intrinsic = np.eye(4)
        intrinsic[:3, :3] = np.diag([scale, scale, 1]) @ np.array(view["cam2img"])
        frame["images"].append(cv2.resize(image, None, fx=scale, fy=scale))
        frame["lidar2img"].append(intrinsic @ np.array(view["lidar2cam"]))
    data = detector.load(frame)
    np.testing.assert_allclose(data["data_samples"].lidar2img, loaded["data_samples"].lidar2img, atol=1e-6)
    assert data["inputs"]["img"].shape == loaded["inputs"]["img"].shape
    assert len(detector(frame).boxes) > 0


def test_command_line(roots, weights, tmp_path, capsys):
    root = roots / "v1.0-mini"
    command = [str(weights), "--data-root", str(root), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*command, "--list", "--split", "all"]) == 0
    assert capsys.readouterr().out.split() == sample_tokens(root, "all")
    assert main([*command, "--split", "all", "--figures", "1"]) == 0
    submission = json.loads((tmp_path / "out" / "results_nusc.json").read_text())
    assert list(submission["results"]) == sample_tokens(root, "all")
    assert submission["meta"]["use_lidar"] and not submission["meta"]["use_map"]
    assert len(list((tmp_path / "out" / "figures").glob("*.png"))) == 3
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "frames").iterdir()}
    last = max(parts)
    last.unlink()
    assert main([*command, "--split", "all"]) == 0
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "frames").iterdir()}
    changed = [path for path in parts if after[path] != parts[path]]
    assert changed == [last], "a resumed run makes what is missing and nothing else"
    capsys.readouterr()
    assert main([*command, "--score-threshold", "0.2"]) == 1 and "--force" in capsys.readouterr().err
    assert main([*command, "--score-threshold", "0.2", "--force"]) == 0
    assert main([str(tmp_path / "none.pth"), *command[1:]]) == 1 and "none.pth" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "resumed" in capsys.readouterr().out


def test_the_single_real_frame(shared, weights):
    """mmdet3d's exported frame: info file, points and images in one folder."""
    files = sorted((shared / "data/nuscenes_demo").glob("*.pkl"))
    if not files:
        pytest.skip("the real frame is not there")
    found = cmtaqr.detect(files[0], weights, device="cpu")
    assert len(found.boxes) > 0 and np.isfinite(found.boxes).all()
    assert len(found.frame.images) == 6 and len(found.frame.points) > 10000


def test_importing_the_package_loads_torch_at_most():
    heavy = ("mmengine", "mmdet3d", "matplotlib", "nuscenes")
    code = f"import sys, cmtaqr; print([m for m in {heavy} if m in sys.modules], cmtaqr.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == f"[] {cmtaqr.__version__}", done.stderr
    with pytest.raises(AttributeError, match="no attribute 'dettect'"):
        cmtaqr.dettect
