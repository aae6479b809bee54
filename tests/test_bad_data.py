"""Broken files stop with the file's name and the remedy; empty clouds and frames without boxes train."""
import pickle
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet3d")
from cmtaqr.data import transforms  # noqa: E402, F401
from cmtaqr.data.frames import NuScenesFrames  # noqa: E402
from cmtaqr.data.nuscenes import main, make_infos  # noqa: E402
from cmtaqr.data.pipelines import nuscenes_pipeline  # noqa: E402
from cmtaqr.data.world import make_world  # noqa: E402
from cmtaqr.engine.configure import load_config  # noqa: E402

# isort: split
from mmdet3d.registry import MODELS  # noqa: E402
from mmengine.dataset import pseudo_collate  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402

CFG = load_config("cmt_aqr_tiny")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("world") / "root"
    make_world(root, scenes=["scene-0061", "scene-0103"], keyframes=1, sweeps=0, image_size=(400, 225), workers=1, progress=False)
    make_infos(root)
    return root


@pytest.fixture
def root(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "root")


def frame(root, **settings):
    init_default_scope("mmdet3d")
    pipeline = nuscenes_pipeline(True, CFG.point_cloud_range, CFG.class_names, CFG.input_size, sweeps_num=0, **settings)
    return NuScenesFrames(root, "nuscenes_infos_train.pkl", pipeline=pipeline, metainfo=dict(classes=CFG.class_names))


def only(root, folder):
    """The one training file of a folder."""
    return next((root / "samples" / folder).glob("*scene-0061*"))


def test_missing_root_names_the_commands(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        frame(tmp_path / "nowhere")
    assert main([str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="python -m cmtaqr.data.nuscenes"):
        frame(tmp_path / "empty")


def test_truncated_lidar_file(root, capsys):
    path = only(root, "LIDAR_TOP")
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=f"{path.name} is truncated.*restore it"):
        frame(root)[0]
    assert main([str(root), "--force"]) == 1
    assert path.name in capsys.readouterr().err


def test_missing_lidar_file(root):
    path = only(root, "LIDAR_TOP")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=path.name):
        frame(root)[0]


@pytest.mark.parametrize("content", [None, b"", b"not a picture", "half"])
def test_missing_or_broken_image(root, capsys, content):
    path = only(root, "CAM_BACK")
    if content is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:2000] if content == "half" else content)
    with pytest.raises((FileNotFoundError, ValueError), match=path.name):
        frame(root)[0]
    assert main([str(root), "--force"]) == 1
    assert path.name in capsys.readouterr().err


def test_nan_in_points(root):
    path = only(root, "LIDAR_TOP")
    points = np.fromfile(path, np.float32).reshape(-1, 5)
    points[3, 1] = np.nan
    points.tofile(path)
    with pytest.raises(ValueError, match=f"{path.name} has NaN or infinity in 1 of {len(points)} points"):
        frame(root)[0]


def losses(sample):
    torch.manual_seed(0)
    model = MODELS.build(CFG.model).train()
    batch = model.data_preprocessor(pseudo_collate([sample]), True)
    terms = model(**batch, mode="loss")
    sum(value for name, value in terms.items() if "loss" in name).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return {name: value.item() for name, value in terms.items()}, sum(g.square().sum().item() for g in gradients) ** 0.5


def test_empty_cloud_trains(root):
    only(root, "LIDAR_TOP").write_bytes(b"")
    sample = frame(root)[0]
    assert sample["inputs"]["points"].shape == (0, 5) and len(sample["data_samples"].gt_instances_3d.labels_3d) > 0
    terms, norm = losses(sample)
    assert all(np.isfinite(value) for value in terms.values()) and 0 < norm < float("inf")


def test_frame_without_boxes_trains(root):
    path = root / "nuscenes_infos_train.pkl"
    infos = pickle.loads(path.read_bytes())
    for info in infos["data_list"]:
        info["instances"] = []
    path.write_bytes(pickle.dumps(infos))
    sample = frame(root)[0]
    assert len(sample["data_samples"].gt_instances_3d.labels_3d) == 0
    terms, norm = losses(sample)
    assert terms["loss_bbox"] == 0 and terms["loss_cls"] > 0 and np.isfinite(norm)
