"""Data transforms against golden values, against each other, and through dataset and metric on a small synthetic world."""
import copy

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet3d")
from cmtaqr.data import transforms  # noqa: E402
from cmtaqr.data.frames import NuScenesFrames  # noqa: E402
from cmtaqr.data.nuscenes import make_infos  # noqa: E402
from cmtaqr.data.pipelines import AUGMENTATION, nuscenes_pipeline  # noqa: E402
from cmtaqr.data.world import make_world  # noqa: E402

# isort: split
from mmdet3d.registry import METRICS  # noqa: E402
from mmdet3d.structures import LiDARInstance3DBoxes  # noqa: E402
from mmdet3d.structures.points import LiDARPoints  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402

CLASSES = ["car", "truck", "construction_vehicle", "bus", "trailer", "barrier", "motorcycle", "bicycle", "pedestrian",
           "traffic_cone"]
RANGE = [-54.0, -54.0, -5.0, 54.0, 54.0, 3.0]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    init_default_scope("mmdet3d")
    root = make_world(tmp_path_factory.mktemp("world") / "root", scenes=2, keyframes=3, image_size=(400, 225), seed=5,
                      progress=False)
    make_infos(root)
    return root


def frames(root, training, split="train", **settings):
    pipeline = nuscenes_pipeline(training, RANGE, CLASSES, (128, 320), **settings)
    return NuScenesFrames(root, f"nuscenes_infos_{split}.pkl", pipeline=pipeline, test_mode=not training,
                          metainfo=dict(classes=CLASSES))


@pytest.mark.parametrize("case", ["test", "a", "b", "c"])
def test_resize_crop_flip_agrees_with_golden(shared, case):
    golden = np.load(shared / "golden/augment.npz")
    resize, width, height, x0, y0, x1, y1, flip = golden[f"imgaug/{case}/params_resize_newWH_cropx0y0x1y1_flip"]
    image, size = golden["imgaug/in/image_bgr"], (int(y1 - y0), int(x1 - x0))
    assert (int(image.shape[1] * resize), int(image.shape[0] * resize)) == (width, height)
    out = transforms.resize_crop_flip(image, resize, (int(x0), int(y0)), size, bool(flip))
    difference = np.abs(out.astype(float) - golden[f"imgaug/{case}/out_image"])
    assert difference.max() <= 1
    matrix = np.eye(4)
    matrix[:3, :3] = transforms.image_matrix(resize, (x0, y0), size[1], bool(flip))
    cam2img = matrix @ golden["imgaug/in/intrinsic"]
    # the golden factor passed through float32
    np.testing.assert_allclose(cam2img, golden[f"imgaug/{case}/out_intrinsic"], rtol=1e-6)
    np.testing.assert_allclose(cam2img @ golden["imgaug/in/lidar2cam"], golden[f"imgaug/{case}/out_lidar2img"], rtol=1e-6)


@pytest.mark.parametrize("name,size", [("r50", (320, 800)), ("vov", (640, 1600))])
def test_test_form_has_the_published_parameters(shared, name, size):
    resize, _, _, x0, y0, _, _ = np.load(shared / "golden/augment.npz")[f"imgaug/real_test_params_{name}"]
    results = dict(img=[np.zeros((900, 1600, 3), np.uint8)], cam2img=np.eye(4)[None].copy())
    affine = transforms.ResizeCropFlipImage(size)(results)["img_affine"][0]
    np.testing.assert_array_equal(affine, [[resize, 0, -x0], [0, resize, -y0], [0, 0, 1]])


@pytest.mark.parametrize("seed", range(6))
def test_points_and_pixels_stay_together(world, seed):
    """Points of the packed sample fall on the pixels of the raw image that the raw matrices give, in every augmented form."""
    plain = frames(world, False, sweeps_num=2)[1]["data_samples"].metainfo
    np.random.seed(seed)
    torch.manual_seed(seed)
    sample = frames(world, True, sweeps_num=2, augmentation=dict(AUGMENTATION, drop_image=0.0, drop_lidar=0.0))[1]
    meta, points = sample["data_samples"].metainfo, sample["inputs"]["points"][:, :3].double().numpy()
    assert meta["lidar2img"].dtype == np.float64 and meta["img_shape"] == (128, 320)
    original = np.c_[points, np.ones(len(points))] @ np.linalg.inv(meta["lidar_aug_matrix"]).T
    moved = np.c_[points, np.ones(len(points))]
    seen_somewhere = 0
    for view in range(6):
        to_raw = np.linalg.inv(plain["img_affine"][view])
        raw = original @ plain["lidar2img"][view].T
        raw_pixel = np.c_[raw[:, :2] / raw[:, 2:3], np.ones(len(raw))] @ to_raw.T
        expected = raw_pixel @ meta["img_affine"][view].T
        new = moved @ meta["lidar2img"][view].T
        seen = (new[:, 2] > 2) & (expected[:, :2] >= 0).all(1) & (expected[:, :2] < [320, 128]).all(1)
        seen_somewhere += seen.sum()
        if seen.any():
            assert np.abs(new[:, :2] / new[:, 2:3] - expected[:, :2])[seen].max() < 1e-3
    assert seen_somewhere > 1000


def test_packed_sample_is_what_the_detector_expects(world):
    sample = frames(world, True, sweeps_num=2, augmentation=AUGMENTATION)[0]
    data, inputs = sample["data_samples"], sample["inputs"]
    assert inputs["points"].shape[1] == 5 and inputs["points"].dtype == torch.float32
    assert inputs["img"].shape == (6, 3, 128, 320) and inputs["img"].dtype == torch.uint8
    boxes = data.gt_instances_3d.bboxes_3d
    assert isinstance(boxes, LiDARInstance3DBoxes) and boxes.tensor.shape[1] == 9 and torch.isfinite(boxes.tensor).all()
    assert len(boxes) == len(data.gt_instances_3d.labels_3d) > 0
    meta = data.metainfo
    assert meta["lidar2img"].shape == (6, 4, 4) and meta["sample_idx"] == 0 and len(meta["token"]) == 32
    assert meta["box_type_3d"] is LiDARInstance3DBoxes
    assert meta["cameras"][0] == "CAM_FRONT" and meta["lidar_path"].endswith(".bin")


def test_ages_of_the_sweeps(world):
    points = frames(world, False, sweeps_num=2)[1]["inputs"]["points"]
    ages = np.unique(points[:, 4].numpy().round(3))
    assert ages[0] == 0 and len(ages) == 3 and 0.02 < ages[1] < 0.2
    alone = frames(world, False, sweeps_num=0)[1]["inputs"]["points"]
    assert (alone[:, 4] == 0).all() and len(alone) < len(points) / 2


def test_seed_decides_the_sample(world):
    dataset = frames(world, True, sweeps_num=0, augmentation=AUGMENTATION)
    samples = []
    for seed in (1, 1, 2):
        np.random.seed(seed)
        torch.manual_seed(seed)
        samples.append(dataset[0])
    first, second, third = (sample["data_samples"].lidar2img for sample in samples)
    same, other = np.array_equal(first, second), np.array_equal(first, third)
    assert same and not other and torch.equal(samples[0]["inputs"]["points"], samples[1]["inputs"]["points"])


def test_flip_twice_is_nothing():
    rng = np.random.default_rng(0)
    results = dict(points=LiDARPoints(torch.tensor(rng.normal(size=(9, 5)), dtype=torch.float32), 5),
                   lidar2cam=rng.normal(size=(2, 4, 4)),
                   gt_bboxes_3d=LiDARInstance3DBoxes(torch.tensor(rng.normal(size=(4, 9)), dtype=torch.float32), box_dim=9))
    out = copy.deepcopy(results)
    for _ in range(2):
        out = transforms.RandomFlip3DImage(1, 1)(out)
    assert np.allclose(out["lidar2cam"], results["lidar2cam"]) and torch.equal(out["points"].tensor, results["points"].tensor)
    difference = (out["gt_bboxes_3d"].tensor - results["gt_bboxes_3d"].tensor).double()
    difference[:, 6] = torch.sin(difference[:, 6])
    assert difference.abs().max() < 1e-5


def test_metric_scores_the_ground_truth_with_one(world, tmp_path):
    """The boxes that the dataset delivers, given back as predictions, reach AP 1 for every class of the split."""
    from mmdet3d.structures import Det3DDataSample
    from mmengine.structures import InstanceData

    dataset = frames(world, False, "val", sweeps_num=0)
    metric = METRICS.build(dict(type="NuScenesMetric", data_root=str(world), ann_file=str(world / "nuscenes_infos_val.pkl"),
                                jsonfile_prefix=str(tmp_path)))
    metric.dataset_meta = dataset.metainfo
    present = set()
    for sample in (dataset[i] for i in range(len(dataset))):
        data = sample["data_samples"]
        known = data.eval_ann_info["gt_labels_3d"] >= 0
        boxes = data.eval_ann_info["gt_bboxes_3d"][torch.from_numpy(known)]
        labels = torch.from_numpy(data.eval_ann_info["gt_labels_3d"][known])
        near = boxes.gravity_center[:, :2].norm(dim=1) < 25
        present |= {CLASSES[label] for label in labels[near]}
        prediction = Det3DDataSample(metainfo=data.metainfo)
        confidence = torch.linspace(1, 0.5, len(labels))
        prediction.pred_instances_3d = InstanceData(bboxes_3d=boxes, labels_3d=labels, scores_3d=confidence)
        prediction.pred_instances = InstanceData()
        metric.process({}, [prediction.to_dict()])
    scores = metric.evaluate(len(dataset))
    found = {name: scores[f"NuScenes metric/pred_instances_3d_NuScenes/{name}_AP_dist_0.5"] for name in present}
    assert found and all(value > 0.999 for value in found.values()), found
    assert scores["NuScenes metric/pred_instances_3d_NuScenes/car_trans_err"] < 1e-3
    assert scores["NuScenes metric/pred_instances_3d_NuScenes/car_orient_err"] < 0.02
    assert scores["NuScenes metric/pred_instances_3d_NuScenes/car_vel_err"] < 0.05


def test_views_of_unequal_size_become_one(world, tmp_path):
    """A camera of another size is resized and cropped with a matrix of its own; its pixels keep their place in the scene."""
    import cv2

    dataset = frames(world, False, sweeps_num=0)
    whole, info = dataset[0]["data_samples"].metainfo, dataset.get_data_info(0)
    info.update(box_type_3d=dataset.box_type_3d, box_mode_3d=dataset.box_mode_3d)
    view = info["images"]["CAM_BACK"]
    image = cv2.imread(view["img_path"])
    view["img_path"] = str(tmp_path / "large.jpg")
    cv2.imwrite(view["img_path"], cv2.resize(image, (800, 450)))
    view["cam2img"] = (np.diag([2, 2, 1.0]) @ np.array(view["cam2img"])).tolist()
    sample = dataset.pipeline(info)
    assert sample["inputs"]["img"].shape == (6, 3, 128, 320)
    assert sample["data_samples"].ori_shape[3] == (450, 800) and sample["data_samples"].ori_shape[0] == (225, 400)
    np.testing.assert_allclose(sample["data_samples"].lidar2img, whole["lidar2img"], atol=1e-6)


def test_points_with_nan_can_be_dropped(world, tmp_path):
    path = tmp_path / "nan.bin"
    points = np.ones((10, 5), np.float32)
    points[[2, 7], [0, 4]] = np.nan, np.inf
    points.tofile(path)
    results = transforms.LoadLidarPoints(nan="drop")(dict(lidar_points=dict(lidar_path=str(path))))
    assert len(results["points"]) == 8 and results["num_dropped_points"] == 2
