"""Pasted objects, sensors and modality mask: golden pixels, plain counts, and whole pipelines on a synthetic world."""
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet3d")
from cmtaqr.data import transforms  # noqa: E402
from cmtaqr.data.database import build_database  # noqa: E402
from cmtaqr.data.frames import NuScenesFrames  # noqa: E402
from cmtaqr.data.nuscenes import make_infos  # noqa: E402
from cmtaqr.data.paste import TARGETS, PasteObjects, PatchDatabaseSampler, paste_patches  # noqa: E402
from cmtaqr.data.pipelines import AUGMENTATION, data_settings  # noqa: E402
from cmtaqr.data.world import make_world  # noqa: E402
from cmtaqr.engine.configure import load_config  # noqa: E402
from cmtaqr.engine.fade import PasteFadeHook, paste_transforms  # noqa: E402

# isort: split
from mmdet3d.engine.hooks import DisableObjectSampleHook  # noqa: E402
from mmdet3d.registry import DATASETS  # noqa: E402
from mmdet3d.structures.points import LiDARPoints  # noqa: E402

CLASSES = list(NuScenesFrames.METAINFO["classes"])
RANGE = [-54.0, -54.0, -5.0, 54.0, 54.0, 3.0]
CAMERA_KEYS = {"img_path", "cameras", "ori_shape", "img_shape", "pad_shape", "img_affine", "img_flip", "cam2img", "lidar2cam",
               "lidar2img"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A world with an object database."""
    root = tmp_path_factory.mktemp("paste") / "world"
    make_world(root, scenes=["scene-0061", "scene-0553", "scene-0103"], keyframes=2, sweeps=1, image_size=(400, 225), seed=3,
               workers=1, progress=False)
    make_infos(root)
    build_database(root, sweeps=1, workers=1, progress=False)
    return root


def settings(root, **options):
    options = dict(dict(sweeps_num=1, augmentation=dict(AUGMENTATION, drop_image=0.0, drop_lidar=0.0)), **options)
    return data_settings(str(root), RANGE, CLASSES, (128, 320), **options)


def training_set(root, **options):
    return DATASETS.build(settings(root, **options)["train_dataloader"]["dataset"])


def sample(dataset, index=1, seed=0):
    np.random.seed(seed)
    torch.manual_seed(seed)
    return dataset[index]


def content(sample):
    """Every array of a packed sample, by name."""
    data = sample["data_samples"]
    arrays = {name: value.numpy() for name, value in sample["inputs"].items()}
    arrays |= {name: data.metainfo[name] for name in ("lidar2img", "lidar_aug_matrix") if name in data.metainfo}
    return arrays | dict(boxes=data.gt_instances_3d.bboxes_3d.numpy(), labels=data.gt_instances_3d.labels_3d.numpy())


def same(one, two):
    one, two = content(one), content(two)
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


def test_patches_agree_with_golden(shared):
    golden = np.load(shared / "golden/augment.npz")
    corners = golden["paste/in/corners_box0_1_are_original_2_3_4_are_pasted"]
    patches = [golden[f"paste/in/patch{i}_for_box{i + 2}"] for i in range(3)]
    images, matrices = ([golden[f"paste/in/{key}{view}"] for view in range(2)] for key in ("image", "lidar2img"))
    out = paste_patches(images, corners, np.stack(matrices), patches)
    for view in range(2):
        difference = np.abs(out[view].astype(int) - golden[f"paste/out/image{view}"])
        assert difference.max() <= 1, (view, difference.max())
        assert (out[view] != images[view]).any()


def test_fusion_frame_gains_points_boxes_and_pixels(root):
    without, pasted = (sample(training_set(root, augmentation=None, paste=paste)) for paste in (None, dict()))
    before, after = content(without), content(pasted)
    number = pasted["data_samples"].num_pasted
    assert number > 0 and len(after["points"]) > len(before["points"]) and (after["img"] != before["img"]).any()
    for name, target in TARGETS.items():
        had, has = ((frame["labels"] == CLASSES.index(name)).sum() for frame in (before, after))
        assert had <= has <= max(had, target)
    old = {tuple(box) for box in before["boxes"]}
    new = [tuple(box) for box in after["boxes"] if tuple(box) not in old]
    objects = pickle.loads((root / "nuscenes_dbinfos_train.pkl").read_bytes())
    known = {tuple(entry["box3d_lidar"]): entry for entries in objects.values() for entry in entries}
    assert len(new) == number and all(known[box]["num_points_in_gt"] >= 5 for box in new)


def test_lidar_alone_reads_no_image_and_pastes_the_same_objects(root, tmp_path):
    fusion = sample(training_set(root, augmentation=None, paste=dict()))
    copied = tmp_path / "world"
    shutil.copytree(root, copied)
    for path in copied.rglob("*.jpg"):
        path.unlink()
    shutil.rmtree(copied / "maps", ignore_errors=True)
    alone = sample(training_set(copied, augmentation=None, paste=dict(), sensors=["lidar"]))
    assert set(alone["inputs"]) == {"points"} and not CAMERA_KEYS & set(alone["data_samples"].metainfo)
    one, two = content(fusion), content(alone)
    assert np.array_equal(one["boxes"], two["boxes"]) and np.array_equal(np.sort(one["points"], 0), np.sort(two["points"], 0))
    augmented = sample(training_set(copied, paste=dict(), sensors=["lidar"]))
    assert "lidar_aug_matrix" in augmented["data_samples"].metainfo
    test = DATASETS.build(settings(copied, sensors=["lidar"])["val_dataloader"]["dataset"])[0]
    assert set(test["inputs"]) == {"points"} and "lidar_path" in test["data_samples"].metainfo


def test_cameras_alone_read_no_points_and_stay_with_their_boxes(root, tmp_path):
    copied = tmp_path / "world"
    shutil.copytree(root, copied)
    for path in copied.rglob("*.bin"):
        path.unlink()
    recipe = dict(AUGMENTATION, rotation=(-0.3925, 0.3925), scale=(0.95, 1.05), translation=0.0, flip_scene=0.0)
    plain = sample(training_set(copied, augmentation=None, sensors=["camera"]))
    turned = sample(training_set(copied, augmentation=recipe, sensors=["camera"]), seed=5)
    old, new = plain["data_samples"], turned["data_samples"]
    assert set(turned["inputs"]) == {"img"} and not {"lidar_path", "num_dropped_points", "modality"} & set(new.metainfo)
    angle = np.arctan2(new.lidar_aug_matrix[1, 0], new.lidar_aug_matrix[0, 0])
    assert 0.02 < abs(angle) < 0.3925
    # boxes turn as the matrices do: corners keep their pixels (not all boxes do, as range filters act on turned ones)
    corners, moved = (np.pad(data.gt_instances_3d.bboxes_3d.corners.numpy().reshape(-1, 3).astype(float), ((0, 0), (0, 1)),
                             constant_values=1) for data in (old, new))
    target = corners @ new.lidar_aug_matrix.T
    match = np.linalg.norm(target[:, None] - moved[None], axis=-1).argmin(1)
    near = np.linalg.norm(target - moved[match], axis=-1) < 1e-4
    assert near.mean() > 0.9
    for view in range(6):
        raw, seen_now = corners[near] @ old.lidar2img[view].T, moved[match[near]] @ new.lidar2img[view].T
        front = raw[:, 2] > 1
        affine = new.img_affine[view] @ np.linalg.inv(old.img_affine[view])
        pixel = np.c_[raw[front, :2] / raw[front, 2:3], np.ones(front.sum())] @ affine.T
        inside = (np.abs(pixel[:, :2]) < 1000).all(1)
        error = np.abs(pixel[:, :2] - seen_now[front, :2] / seen_now[front, 2:3])[inside]
        assert error.max(initial=0) < 5e-3    # the corners of turned boxes are computed in float32
    test = DATASETS.build(settings(copied, sensors=["camera"])["val_dataloader"]["dataset"])[0]
    assert set(test["inputs"]) == {"img"} and "lidar2img" in test["data_samples"].metainfo


def test_switched_off_is_as_if_absent(root):
    dataset, plain = training_set(root, paste=dict()), training_set(root)
    transform, = paste_transforms(dataset)
    transform.disabled = True
    for index in range(3):
        assert same(sample(dataset, index, seed=index), sample(plain, index, seed=index))
    transform.disabled = False
    assert not same(sample(dataset), sample(plain))


@pytest.mark.parametrize("balanced", [False, True])
def test_both_hooks_reach_the_transform_of_the_built_dataset(root, balanced):
    dataset = training_set(root, paste=dict(), cbgs=balanced)
    transform, = paste_transforms(dataset)
    log = SimpleNamespace(info=lambda text: None)
    loader = SimpleNamespace(dataset=dataset, persistent_workers=False)
    runner = SimpleNamespace(train_dataloader=loader, epoch=15, iter=1500, max_iters=2000, model=torch.nn.Linear(1, 1),
                             logger=log)
    DisableObjectSampleHook(15).before_train_epoch(runner)
    assert transform.disabled
    runner.iter = 1499
    hook = PasteFadeHook()
    hook.before_train(runner)
    assert not transform.disabled
    hook.after_train_iter(runner, 0)
    assert transform.disabled


def test_balanced_resampling_gives_each_class_its_share(root):
    """CBGS: every class contributes the same number of draws, of frames that contain it."""
    plain = training_set(root)
    frames = [plain.get_cat_ids(index) - {-1} for index in range(len(plain))]
    total = sum(len(present) for present in frames)
    np.random.seed(0)
    indices = training_set(root, cbgs=True).sample_indices
    share = total / len(CLASSES)
    assert len(CLASSES) * (int(share) - 1) <= len(indices) <= len(CLASSES) * int(share)
    each = len(indices) // len(CLASSES)
    for label in range(len(CLASSES)):
        assert all(label in frames[index] for index in indices[label * each:(label + 1) * each])


def test_missing_database_names_the_command(root, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m cmtaqr.data.database"):
        PasteObjects(str(tmp_path), CLASSES)
    with pytest.raises(ValueError, match="sensors"):
        data_settings(str(root), RANGE, CLASSES, (128, 320), sensors=["camera"], paste=dict())


@pytest.mark.parametrize("kind", ["patch_path", "path"])
def test_broken_file_of_the_database_is_named_with_the_command(root, tmp_path, kind):
    sampler = PatchDatabaseSampler(str(root), CLASSES)
    broken = dict(next(e for e in sampler.db_infos["car"] if e["patch_path"]))
    sampler.data_root, broken[kind] = str(tmp_path), "broken"
    read = sampler.patch if kind == "patch_path" else sampler.points
    with pytest.raises(FileNotFoundError, match="broken is missing.*python -m cmtaqr.data.database"):
        read(broken)
    (tmp_path / "broken").write_bytes(b"abc")
    with pytest.raises(ValueError, match="truncated.*python -m cmtaqr.data.database"):
        read(broken)


def write_database(folder, entries):
    for entry in entries:
        np.zeros((entry["num_points_in_gt"], 5), np.float32).tofile(folder / entry["path"])
    names = {entry["name"] for entry in entries}
    content = {name: [e for e in entries if e["name"] == name] for name in names}
    (folder / "nuscenes_dbinfos_train.pkl").write_bytes(pickle.dumps(content))


def entry(name, number, place, points=9, difficulty=0):
    box = np.array([*place, -1, 4, 2, 1.5, 0.3, 1, 0], np.float32)
    return dict(name=name, path=f"{number}.bin", box3d_lidar=box, num_points_in_gt=points, difficulty=difficulty, group_id=number)


def test_sparse_and_difficult_objects_are_left_out(tmp_path):
    kept, sparse, hard = entry("car", 0, (10, 0)), entry("car", 1, (0, 10), points=4), entry("car", 2, (-10, 0), difficulty=-1)
    write_database(tmp_path, [kept, sparse, hard])
    # there is no bus in the database, and zebra is no class
    sampler = PatchDatabaseSampler(str(tmp_path), CLASSES, targets=dict(car=9, bus=3, zebra=1))
    drawn = sampler.sample_all(np.zeros((0, 9), np.float32), np.zeros(0, int))
    assert [e["path"] for e in drawn] == ["0.bin"]
    own = kept["box3d_lidar"][None]
    assert sampler.sample_all(own, np.array([CLASSES.index("car")])) == []     # not over itself
    assert sampler.sample_all(own + [1, 0, 0, 0, 0, 0, 0, 0, 0], np.array([-1])) == []     # not into another
    generous = PatchDatabaseSampler(str(tmp_path), CLASSES, min_points=1)
    assert [e["path"] for e in generous.db_infos["car"]] == ["0.bin", "1.bin"]


def test_objects_in_one_place_are_not_drawn_together(tmp_path):
    """A parked sensor sees a parked car at the same place in two frames; mmdet3d's test finds no collision of the two boxes."""
    write_database(tmp_path, [entry("car", 0, (10, 0)), entry("car", 1, (10, 0)), entry("car", 2, (-10, 0))])
    sampler = PatchDatabaseSampler(str(tmp_path), CLASSES, targets=dict(car=3))
    drawn = [e["box3d_lidar"][0] for e in sampler.sample_all(np.zeros((0, 9), np.float32), np.zeros(0, int))]
    assert sorted(drawn) == [-10, 10]


def test_number_drawn_is_target_minus_present(tmp_path):
    write_database(tmp_path, [entry("car", i, (10 * (i % 7), 10 * (i // 7) - 40)) for i in range(49)])
    sampler = PatchDatabaseSampler(str(tmp_path), CLASSES, targets=dict(car=5))
    for present in range(8):
        frame = np.array([[-10.0 * i - 10, 45, 0, 4, 2, 1, 0, 0, 0] for i in range(present)], np.float32).reshape(-1, 9)
        assert len(sampler.sample_all(frame, np.full(present, CLASSES.index("car")))) == max(0, 5 - present)


def test_every_object_is_drawn_once_before_any_comes_again(tmp_path):
    write_database(tmp_path, [entry("car", i, (10 * i - 45, 0)) for i in range(9)])
    sampler = PatchDatabaseSampler(str(tmp_path), CLASSES, targets=dict(car=3))
    empty = np.zeros((0, 9), np.float32), np.zeros(0, int)
    for _ in range(4):
        assert sorted(e["path"] for _ in range(3) for e in sampler.sample_all(*empty)) == [f"{i}.bin" for i in range(9)]


@pytest.mark.parametrize("draw,modality", [(0.0, "both"), (0.5, "both"), (0.5000001, "camera"), (0.75, "camera"),
                                           (0.7500001, "lidar"), (0.999, "lidar")])
def test_thresholds_of_the_modality_mask(monkeypatch, draw, modality):
    monkeypatch.setattr(np.random, "rand", lambda: draw)
    out = transforms.ModalityMask()(dict(img=[np.ones((2, 2, 3), np.uint8)] * 2, points=LiDARPoints(torch.ones(3, 5), 5)))
    assert out["modality"] == modality
    assert all(image.any() == (modality != "lidar") for image in out["img"])
    assert bool(out["points"].tensor.any()) == (modality != "camera")


def test_shares_of_the_modality_mask():
    """Chi-square of 20,000 draws against 25/25/50: below the 0.1 % point of two degrees of freedom."""
    np.random.seed(11)
    mask, counts = transforms.ModalityMask(), dict(lidar=0, camera=0, both=0)
    for _ in range(20000):
        counts[mask(dict(img=[], points=LiDARPoints(torch.zeros(0, 3))))["modality"]] += 1
    expected = dict(lidar=5000, camera=5000, both=10000)
    assert sum((counts[name] - expected[name])**2 / expected[name] for name in expected) < 13.8, counts


@pytest.mark.parametrize("lost", ["image", "lidar"])
def test_mask_takes_pasted_pixels_and_points_but_no_label(root, lost):
    chances = (dict(drop_image=0.0, drop_lidar=0.0), {f"drop_{name}": float(name == lost) for name in ("image", "lidar")})
    whole, masked = (sample(training_set(root, augmentation=dict(AUGMENTATION, **drop), paste=dict())) for drop in chances)
    one, two = content(whole), content(masked)
    assert np.array_equal(one["labels"], two["labels"]) and np.array_equal(one["boxes"], two["boxes"])
    assert whole["data_samples"].num_pasted == masked["data_samples"].num_pasted > 0
    if lost == "image":
        assert not two["img"].any() and np.array_equal(np.sort(one["points"], 0), np.sort(two["points"], 0))
    else:
        assert len(np.unique(two["points"], axis=0)) == 1 and np.array_equal(one["img"], two["img"])


def test_tiny_config_pastes_nothing_and_loads_both_sensors():
    """The committed demo depends on its data: steps and settings are those it was trained with."""
    pipeline = load_config("cmt_aqr_tiny").train_dataloader.dataset.pipeline
    assert [step.type for step in pipeline] == [
        "LoadLidarPoints", "LoadLidarSweeps", "LoadCameraImages", "LoadAnnotations3D", "ModalityMask", "GlobalRotScaleTransImage",
        "RandomFlip3DImage", "PointsRangeFilter", "ObjectRangeFilter", "ObjectNameFilter", "PointShuffle", "ResizeCropFlipImage",
        "AssembleLidar2Img", "PackFrames"]


@pytest.mark.parametrize("lines", ["paste = dict()", "paste = dict(mixup=0.3, until=0.5)", "paste = None",
                                   "from cmtaqr.data.pipelines import PASTE as paste"])
def test_config_asks_for_pasting_in_one_line(tmp_path, lines):
    base = Path(__file__).resolve().parent.parent / "cmtaqr/configs/cmt_aqr_tiny.py"
    (tmp_path / "child.py").write_text(f'_base_ = [r"{base}"]\n{lines}\n')
    steps = [step for step in load_config(tmp_path / "child.py").train_dataloader.dataset.pipeline if step.type == "PasteObjects"]
    assert len(steps) == ("None" not in lines)
    for step in steps:
        assert step.targets == TARGETS and step.data_root == "data/demo"
        assert (step.mixup, step.until) == ((0.3, 0.5) if "0.3" in lines else (0.5, 0.75))
