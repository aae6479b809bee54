"""One property of all data transforms, alone and in any order: points, pixels, boxes and velocities stay together.

Random search with recorded seeds over compositions of rotation, scale, translation, flips of the scene, resize, crop (also wider
than the image, also beyond its top), mirror, pasted objects, modality mask, filters and the test form, for six cameras.
"""
import copy
import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet3d")
from cmtaqr.data import transforms as t  # noqa: E402
from cmtaqr.data.paste import PasteObjects  # noqa: E402

# isort: split
import cv2  # noqa: E402
from mmdet3d.datasets.transforms import PointShuffle, PointsRangeFilter  # noqa: E402
from mmdet3d.structures import LiDARInstance3DBoxes  # noqa: E402
from mmdet3d.structures.points import LiDARPoints  # noqa: E402

CLASSES = ["car", "truck", "bus", "bicycle", "pedestrian"]
PASTED = 10000  # the column of intensities carries a number for each point; those of pasted points begin here


def random_boxes(rng, count):
    place, size = np.c_[rng.uniform(-45, 45, (count, 2)), rng.uniform(-2, 0, count)], rng.uniform(0.5, 6, (count, 3))
    return np.c_[place, size, rng.uniform(-4, 4, count), rng.normal(0, 4, (count, 2))].astype(np.float32)


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """Objects in the layout of `cmtaqr.data.database`, and their points [N, 3] in LiDAR coordinates by number."""
    root, rng, stored = tmp_path_factory.mktemp("database"), np.random.default_rng(7), []
    entries = {name: [] for name in CLASSES}
    for index, box in enumerate(random_boxes(rng, 40)):
        name, count = CLASSES[index % len(CLASSES)], 12
        offset = (rng.uniform(-0.5, 0.5, (count, 3)) + [0, 0, 0.5]) * box[3:6]
        cos, sin = np.cos(box[6]), np.sin(box[6])
        offset[:, :2] = offset[:, :2] @ np.array([[cos, sin], [-sin, cos]])
        number = PASTED + len(stored) * count + np.arange(count)
        np.c_[offset, number, np.zeros(count)].astype(np.float32).tofile(root / f"{index}.bin")
        cv2.imwrite(str(root / f"{index}.png"), rng.integers(0, 255, (24, 32, 3), dtype=np.uint8))
        stored.append(np.float32(offset) + box[:3])
        patch = f"{index}.png" if index % 4 else None
        entries[name].append(dict(name=name, path=f"{index}.bin", box3d_lidar=box, num_points_in_gt=count, difficulty=0,
                                  group_id=index, image_idx=0, gt_idx=index, patch_path=patch, camera="CAM_0",
                                  patch_box=(0, 0, 32, 24)))
    (root / "nuscenes_dbinfos_train.pkl").write_bytes(pickle.dumps(entries))
    return root, np.concatenate(stored)


def random_frame(rng, image_size):
    """Frame of six cameras around the sensor, 500 numbered points and up to 20 boxes."""
    height, width = image_size
    lidar2cam, cam2img = np.tile(np.eye(4), (6, 1, 1)), np.tile(np.eye(4), (6, 1, 1))
    for view in range(6):
        angle = view * np.pi / 3 + rng.normal(0, 0.1)
        right, forward = np.array([np.sin(angle), -np.cos(angle), 0]), np.array([np.cos(angle), np.sin(angle), 0])
        tilt, _ = np.linalg.qr(np.eye(3) + rng.normal(0, 0.02, (3, 3)))
        lidar2cam[view, :3, :3] = tilt * np.sign(np.diag(tilt)) @ np.stack([right, [0, 0, -1], forward])
        lidar2cam[view, :3, 3] = rng.normal(0, 0.4, 3)
        noise = rng.normal(0, 0.01 * width, (2, 3)) * [[1, 0, 1], [0, 1, 1]]
        cam2img[view, :2, :3] = np.array([[0.8 * width, 0, width / 2], [0, 0.8 * width, height / 2]]) + noise
    count = int(rng.integers(0, 21))
    xyz = rng.uniform([-50, -50, -4], [50, 50, 2], (500, 3))
    boxes = LiDARInstance3DBoxes(torch.tensor(random_boxes(rng, count)), box_dim=9)
    images = [np.full((height, width, 3), 100 + view, np.uint8) for view in range(6)]
    return dict(img=images, lidar2cam=lidar2cam, cam2img=cam2img,
                points=LiDARPoints(torch.tensor(np.c_[xyz, np.arange(500), np.zeros(500)], dtype=torch.float32), 5),
                gt_bboxes_3d=boxes, gt_labels_3d=rng.integers(0, len(CLASSES), count))


def random_composition(rng, root):
    """Names and transforms. Pasting precedes the mask, as pasted objects have points; the rest goes in any order and number."""
    def crop():
        size = [(320, 800), (128, 320), (90, 500), (300, 200)][rng.integers(4)]
        return t.ResizeCropFlipImage(size, (0.6, 1.5), 0.5, bool(rng.integers(2)))

    makers = dict(
        rotate=lambda: t.GlobalRotScaleTransImage([-3.1, 3.1], [1, 1], 0, rotate_empty=bool(rng.integers(2))),
        scale=lambda: t.GlobalRotScaleTransImage([0, 0], [0.8, 1.25], 0),
        translate=lambda: t.GlobalRotScaleTransImage([0, 0], [1, 1], [0.5, 0.5, 0.5]),
        all_three=lambda: t.GlobalRotScaleTransImage([-0.785, 0.785], [0.9, 1.1], 0.5),
        flip_y=lambda: t.RandomFlip3DImage(1, 0),
        flip_x=lambda: t.RandomFlip3DImage(0, 1),
        flips=t.RandomFlip3DImage,
        crop=crop,
        mirror=lambda: t.ResizeCropFlipImage((320, 800), flip=1),
        test_form=lambda: t.ResizeCropFlipImage((320, 800)),
        shuffle=PointShuffle,
        filter=lambda: PointsRangeFilter([-54, -54, -5, 54, 54, 3]),
        mask=lambda: t.ModalityMask(0.4, 0.4),
        paste=lambda: PasteObjects(str(root), CLASSES, restore_originals=bool(rng.integers(2))))
    names = list(rng.choice([name for name in makers if name not in ("mask", "paste")], rng.integers(1, 8)))
    for name, share in (("mask", 0.5), ("paste", 0.5)):
        if rng.random() < share:
            last = names.index("mask") if "mask" in names else len(names)
            names.insert(int(rng.integers(0, last + 1)), name)
    return names, [makers[name]() for name in names]


def project(matrix, xyz):
    p = np.c_[xyz, np.ones(len(xyz))] @ matrix.T
    with np.errstate(divide="ignore", invalid="ignore"):
        return p[:, :2] / p[:, 2:3], p[:, 2]


def moved(matrix, xyz):
    return xyz.astype(float) @ matrix[:3, :3].T + matrix[:3, 3]


def apply(steps, results):
    """Result, and for boxes and points by number where they began: their coordinates and the motion from there to the end."""
    born = dict(boxes=[(results["gt_bboxes_3d"], np.eye(4))], paste=np.eye(4), mask=None)
    for step in steps:
        here, count = results.get("lidar_aug_matrix", np.eye(4)), len(results["gt_bboxes_3d"])
        results = step(results)
        if isinstance(step, PasteObjects):
            born["boxes"].append((results["gt_bboxes_3d"][count:].clone(), here))
            born["paste"] = here
        if isinstance(step, t.ModalityMask) and results["modality"] == "camera":
            born["mask"] = here
    return t.AssembleLidar2Img()(results), born


@pytest.mark.parametrize("seed", range(24))
def test_points_pixels_boxes_and_velocities_stay_together(database, seed):
    root, stored = database
    compared = 0
    for trial in range(10):
        rng = np.random.default_rng([seed, trial])
        np.random.seed(1000 * seed + trial)
        torch.manual_seed(trial)
        frame = random_frame(rng, (900, 1600) if trial == 0 else (225, 400))
        names, steps = random_composition(rng, root)
        where = f"seed {seed}, trial {trial}: {', '.join(names)}"
        raw, labels = frame["cam2img"] @ frame["lidar2cam"], frame["gt_labels_3d"].copy()
        start = frame["points"].tensor[:, :3].double().numpy()
        frame["gt_bboxes_3d"], originals = frame["gt_bboxes_3d"].clone(), frame["gt_bboxes_3d"]
        out, born = apply(steps, frame)
        born["boxes"][0] = (originals, np.eye(4))
        motion, affine = out.get("lidar_aug_matrix", np.eye(4)), out.get("img_affine", np.tile(np.eye(3), (6, 1, 1)))
        since = lambda then: motion @ np.linalg.inv(then)  # noqa: E731

        # points are where the motion puts them
        points = out["points"].tensor.double().numpy()
        if born["mask"] is not None:
            assert np.abs(points[:, :3] - since(born["mask"])[:3, 3]).max(initial=0) < 1e-4, where
            assert not points[:, 3:].any(), where
        else:
            number = points[:, 3].astype(int)
            own, pasted = number < PASTED, number >= PASTED
            assert np.abs(moved(motion, start[number[own]]) - points[own, :3]).max(initial=0) < 1e-4, where
            expected = moved(since(born["paste"]), stored[number[pasted] - PASTED])
            assert np.abs(expected - points[pasted, :3]).max(initial=0) < 1e-4, where
            assert pasted.any() or not out.get("num_pasted") or "filter" in names, where

        # matrices: exact in float64; pixels of single points: to 1e-3 px
        height, width = out["img"][0].shape[:2]
        for view in range(6):
            exact = affine[view] @ raw[view][:3]
            assert np.abs((out["lidar2img"][view] @ motion)[:3] - exact).max() < 1e-9 * np.abs(exact).max(), where
            if born["mask"] is None:
                pixel, depth = project(raw[view], start[number[own]])
                target = pixel @ affine[view, :2, :2].T + affine[view, :2, 2]
                seen = (depth > 1) & (target >= 0).all(1) & (target < [width, height]).all(1)
                got, _ = project(out["lidar2img"][view], points[own, :3])
                assert np.abs(got - target)[seen].max(initial=0) < 1e-3, where
                compared += seen.sum()

        # boxes stay with their points, velocities turn and scale with them
        boxes, count = out["gt_bboxes_3d"], 0
        for before, then in born["boxes"]:
            after = boxes[count:count + len(before)]
            count += len(before)
            corners = moved(since(then), before.corners.numpy().reshape(-1, 3)).reshape(-1, 8, 1, 3)
            distance = np.linalg.norm(corners - after.corners.numpy()[:, None].astype(float), axis=-1)
            assert distance.min(2).max(initial=0) < 1e-4 and distance.min(1).max(initial=0) < 1e-4, where
            velocity = before.tensor[:, 7:].double().numpy() @ since(then)[:2, :2].T
            assert np.abs(velocity - after.tensor[:, 7:].double().numpy()).max(initial=0) < 1e-4, where
        assert count == len(boxes) == len(out["gt_labels_3d"]), where
        assert (out["gt_labels_3d"][:len(labels)] == labels).all(), where

        # a masked sensor is gone, the other untouched by the mask
        modality = out.get("modality", "both")
        assert all(image.any() == (modality != "lidar") for image in out["img"]), where
    assert compared > 500


@pytest.mark.parametrize("case", ["test", "a", "b", "c"])
def test_recorded_matrices_move_points_to_recorded_pixels(shared, case):
    """Recorded resize, crop and mirror: a point's pixel by the recorded matrix is its raw pixel moved by `image_matrix`."""
    golden = np.load(shared / "golden/augment.npz")
    resize, _, _, x0, y0, x1, _, flip = golden[f"imgaug/{case}/params_resize_newWH_cropx0y0x1y1_flip"]
    affine = t.image_matrix(resize, (x0, y0), x1 - x0, bool(flip))
    rng = np.random.default_rng(0)
    pixel = np.c_[rng.uniform([0, 0], [80, 45], (300, 2)), np.ones(300)] * rng.uniform(1, 50, (300, 1))
    camera = np.c_[np.linalg.solve(golden["imgaug/in/intrinsic"][:3, :3], pixel.T).T, np.ones(300)]
    xyz = (camera @ np.linalg.inv(golden["imgaug/in/lidar2cam"]).T)[:, :3]
    raw, _ = project(golden["imgaug/in/intrinsic"] @ golden["imgaug/in/lidar2cam"], xyz)
    got, _ = project(golden[f"imgaug/{case}/out_lidar2img"], xyz)
    assert np.abs(got - (raw @ affine[:2, :2].T + affine[:2, 2])).max() < 1e-3


@pytest.mark.parametrize("size,factor", [((128, 320), (0.94, 1.25)), ((200, 300), (0.6, 1.2)), ((90, 500), (0.6, 1.0))])
def test_what_is_painted_at_a_point_is_seen_there(size, factor):
    """A disc painted at a point's raw pixel is found in the augmented image where the augmented matrices put the augmented point.

    The second size reaches above the resized image (negative first row), the third beyond its side.
    """
    found, rng = [], np.random.default_rng(3)
    height, width = size
    for trial in range(30):
        frame = random_frame(rng, (225, 400))
        np.random.seed(trial)
        xyz, raw = frame["points"].tensor[:, :3].double().numpy(), frame["cam2img"] @ frame["lidar2cam"]
        chosen = []
        for view, image in enumerate(frame["img"]):
            pixel, depth = project(raw[view], xyz)
            inside = np.flatnonzero((depth > 3) & (pixel > [60, 100]).all(1) & (pixel < [340, 200]).all(1))
            chosen.append(inside[0] if len(inside) else None)
            image[:] = 0
            if len(inside):
                rows, columns = np.mgrid[:225, :400] + 0.5
                image[np.hypot(columns - pixel[inside[0], 0], rows - pixel[inside[0], 1]) < 5] = 255
        space = [t.GlobalRotScaleTransImage([-0.785, 0.785], [0.9, 1.1], 0.5), t.RandomFlip3DImage()]
        out, _ = apply([*space, t.ResizeCropFlipImage(size, factor, 0.5, True)], frame)
        points = out["points"].tensor[:, :3].double().numpy()
        for view, index in enumerate(chosen):
            if index is not None:
                (target,), _ = project(out["lidar2img"][view], points[index:index + 1])
                if (target > 8).all() and (target < [width - 8, height - 8]).all():
                    rows, columns = np.mgrid[:height, :width] + 0.5
                    weight = out["img"][view][..., 0].astype(float)
                    centre = np.array([(weight * columns).sum(), (weight * rows).sum()]) / weight.sum()
                    found.append(np.abs(centre - target).max())
    assert len(found) > 50
    assert max(found) < 1.0, max(found)  # the resized image has whole pixels, the matrix does not round


def test_test_form_is_the_identity_in_space():
    rng = np.random.default_rng(0)
    frame = random_frame(rng, (900, 1600))
    before = copy.deepcopy(frame)
    out, _ = apply([t.ResizeCropFlipImage((640, 1600))], frame)
    for name in ("points", "gt_bboxes_3d"):
        assert np.array_equal(out[name].tensor, before[name].tensor)
    assert np.array_equal(out["lidar2cam"], before["lidar2cam"]) and "lidar_aug_matrix" not in out
    np.testing.assert_array_equal(out["img_affine"], np.tile([[1, 0, 0], [0, 1, -260], [0, 0, 1]], (6, 1, 1)))
    assert all(np.array_equal(image, raw[260:]) for image, raw in zip(out["img"], before["img"]))
