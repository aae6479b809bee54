"""The database of objects against the devkit, against mmdet3d's own scripts, and against kills and broken files."""
import contextlib
import importlib.util
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("mmdet3d")
from nuscenes import NuScenes  # noqa: E402
from nuscenes.eval.detection.utils import category_to_detection_name  # noqa: E402
from nuscenes.utils.geometry_utils import view_points  # noqa: E402
from pyquaternion import Quaternion  # noqa: E402

from cmtaqr.data.database import build_database, main  # noqa: E402
from cmtaqr.data.frames import NuScenesFrames  # noqa: E402
from cmtaqr.data.nuscenes import make_infos  # noqa: E402
from cmtaqr.data.nuscenes import main as nuscenes_main  # noqa: E402
from cmtaqr.data.world import make_world  # noqa: E402

CLASSES = NuScenesFrames.METAINFO["classes"]
LIST, FOLDER = "nuscenes_dbinfos_train.pkl", "nuscenes_gt_database"
TRAIN = ("scene-0061", "scene-0553")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two training scenes and a validation scene, with info files and without a database."""
    root = tmp_path_factory.mktemp("world") / "root"
    make_world(root, [*TRAIN, "scene-0103"], keyframes=3, sweeps=2, image_size=(400, 225), workers=1, progress=False)
    make_infos(root)
    return root


@pytest.fixture(scope="module")
def built(world, tmp_path_factory):
    root = shutil.copytree(world, tmp_path_factory.mktemp("built") / "root")
    build_database(root, workers=1, progress=False)
    return root


@pytest.fixture
def root(world, tmp_path):
    return shutil.copytree(world, tmp_path / "root")


def load(path):
    return pickle.loads(path.read_bytes())


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def records(root):
    return [record for group in load(root / LIST).values() for record in group]


@pytest.fixture(scope="module")
def truth(built):
    """Per record: the devkit's sample and the token of the annotation that the record must be about."""
    nusc = NuScenes("v1.0-mini", str(built), verbose=False)
    valid = {}
    for index, info in enumerate(load(built / "nuscenes_infos_train.pkl")["data_list"]):
        rows = [nusc.get("sample_annotation", token) for token in nusc.get("sample", info["token"])["anns"]]
        valid[index] = [row for row in rows if category_to_detection_name(row["category_name"])
                        and row["num_lidar_pts"] + row["num_radar_pts"] > 0]
    return nusc, valid


def matrix(nusc, reading):
    """Sensor coordinates to those of the world, [4, 4]."""
    result = np.eye(4)
    for table, key in (("calibrated_sensor", "calibrated_sensor_token"), ("ego_pose", "ego_pose_token")):
        row, step = nusc.get(table, reading[key]), np.eye(4)
        step[:3, :3], step[:3, 3] = Quaternion(row["rotation"]).rotation_matrix, row["translation"]
        result = step @ result
    return result


def cloud(nusc, root, sample):
    """Key frame and sweeps merged through the world, by the tables alone: [N, 5] float64."""
    key = reading = nusc.get("sample_data", sample["data"]["LIDAR_TOP"])
    parts = []
    while reading is not None and len(parts) < 11:
        points = np.fromfile(root / reading["filename"], np.float32).reshape(-1, 5).astype(float)
        if parts:
            points = points[(np.abs(points[:, :2]) >= 1).any(1)]
        move = np.linalg.inv(matrix(nusc, key)) @ matrix(nusc, reading)
        points[:, :3] = points[:, :3] @ move[:3, :3].T + move[:3, 3]
        points[:, 4] = (key["timestamp"] - reading["timestamp"]) / 1e6
        parts.append(points)
        reading = nusc.get("sample_data", reading["prev"]) if reading["prev"] else None
    return np.concatenate(parts)


def margin(points, box):
    """Largest signed distance to the faces of a devkit box, negative inside."""
    local = (points[:, :3] - box.center) @ box.rotation_matrix
    return (np.abs(local) - box.wlh[[1, 0, 2]] / 2).max(1)


def test_counts_are_those_of_the_tables(built, truth):
    _, valid = truth
    expected = Counter(category_to_detection_name(row["category_name"]) for rows in valid.values() for row in rows)
    objects = load(built / LIST)
    assert list(objects) == list(CLASSES)
    assert {name: len(group) for name, group in objects.items() if group} == dict(expected)
    assert sorted(record["group_id"] for record in records(built)) == list(range(sum(expected.values())))


def test_points_are_those_in_the_box(built, truth):
    nusc, valid = truth
    clouds, checked = {}, 0
    for record in records(built):
        row = valid[record["image_idx"]][record["gt_idx"]]
        sample = nusc.get("sample", row["sample_token"])
        if sample["token"] not in clouds:
            _, boxes, _ = nusc.get_sample_data(sample["data"]["LIDAR_TOP"])
            clouds[sample["token"]] = cloud(nusc, built, sample), {box.token: box for box in boxes}
        points, boxes = clouds[sample["token"]]
        box = boxes[row["token"]]
        assert record["name"] == category_to_detection_name(row["category_name"])
        assert np.allclose(record["box3d_lidar"][:6], [*(box.center - [0, 0, box.wlh[2] / 2]), *box.wlh[[1, 0, 2]]], atol=1e-4)
        own = np.fromfile(built / record["path"], np.float32).reshape(-1, 5).astype(float)
        assert len(own) == record["num_points_in_gt"]
        own[:, :3] += record["box3d_lidar"][:3]
        # mmdet3d's boxes stand upright in the LiDAR frame, those of the tables in the world: a mounting tilts by about a degree
        upright = box.copy()
        upright.orientation = Quaternion(axis=[0, 0, 1], angle=box.orientation.yaw_pitch_roll[0])
        expected = points[margin(points, upright) < -1e-3]
        assert (margin(own, upright) < 1e-3).all()
        own = own[margin(own, upright) < -1e-3]
        assert own.shape == expected.shape and np.allclose(own, expected, atol=1e-3)
        checked += len(own)
    assert checked > 3000


@pytest.mark.parametrize("choice", ["largest", "last"])
def test_patch_is_the_projected_rectangle_of_the_image(built, root, truth, choice):
    if choice == "last":
        build_database(root, choice, workers=1, progress=False)
    base, (nusc, valid), cameras = built if choice == "largest" else root, truth, Counter()
    infos = load(base / "nuscenes_infos_train.pkl")["data_list"]
    for record in records(base):
        row, info = valid[record["image_idx"]][record["gt_idx"]], infos[record["image_idx"]]
        sample, candidates = nusc.get("sample", row["sample_token"]), []
        x, y, z, length, width, height, yaw = record["box3d_lidar"][:7].astype(float)
        signs = np.array([[i, j, k] for i in (-1, 1) for j in (-1, 1) for k in (0, 2)]) / 2
        corners = (signs * [length, width, height]) @ Quaternion(axis=[0, 0, 1], angle=yaw).rotation_matrix.T + [x, y, z]
        for name in info["images"]:
            reading = nusc.get("sample_data", sample["data"][name])
            move = np.linalg.inv(matrix(nusc, reading)) @ matrix(nusc, nusc.get("sample_data", sample["data"]["LIDAR_TOP"]))
            seen = corners @ move[:3, :3].T + move[:3, 3]
            if (seen[:, 2] > 0).all():
                intrinsic = np.array(nusc.get("calibrated_sensor", reading["calibrated_sensor_token"])["camera_intrinsic"])
                u, v, _ = view_points(seen.T, intrinsic, normalize=True)
                rectangle = np.clip(np.array([u.min(), v.min(), u.max(), v.max()]), 0, [400, 225, 400, 225]).astype(int)
                sides = rectangle[2:] - rectangle[:2]
                if (sides > 10).all():
                    candidates.append((sides.prod(), name, tuple(rectangle.tolist())))
        if not candidates:
            assert record["patch_path"] is record["camera"] is record["patch_box"] is None
            continue
        _, name, rectangle = max(candidates, key=lambda c: c[0]) if choice == "largest" else candidates[-1]
        assert (record["camera"], record["patch_box"]) == (name, rectangle)
        cameras[len(candidates)] += 1
        x0, y0, x1, y1 = rectangle
        image = cv2.imread(str(base / "samples" / name / info["images"][name]["img_path"]))
        assert np.array_equal(cv2.imread(str(base / record["patch_path"])), image[y0:y1, x0:x1])
    assert cameras[1] > 50 and cameras[2] > 0


def test_sampler_of_mmdet3d_loads_it(built):
    from mmdet3d.datasets.transforms.dbsampler import DataBaseSampler
    prepare = dict(filter_by_difficulty=[-1], filter_by_min_points=dict.fromkeys(CLASSES, 5))
    loader = dict(type="LoadPointsFromFile", coord_type="LIDAR", load_dim=5, use_dim=5)
    sampler = DataBaseSampler(str(built / LIST), str(built), 1.0, prepare, dict(car=3), CLASSES, loader)
    enough = sum(record["num_points_in_gt"] >= 5 for record in records(built))
    assert sum(map(len, sampler.db_infos.values())) == enough
    for record in sampler.sample_class_v2("car", 3, np.zeros((0, 9), np.float32)):
        points = sampler.points_loader(dict(lidar_points=dict(lidar_path=str(built / record["path"]))))["points"]
        assert len(points) == record["num_points_in_gt"]


def wait_for(condition):
    end = time.time() + 600
    while not condition():
        assert time.time() < end, "gave up waiting"
        time.sleep(0.02)


def children(pid):
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found += [int(path.parent.name)] if path.read_text().rsplit(")", 1)[1].split()[1] == str(pid) else []
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the worker processes through /proc")
def test_killed_run_is_finished_to_the_same_bytes(built, root):
    script = "import sys; from cmtaqr.data.nuscenes import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-c", script, str(root), "--workers", "2"], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    frames = root / f".{FOLDER}" / "frames"
    wait_for(lambda: list(frames.glob("*.pkl")))
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    assert 1 <= len(list(frames.glob("*.pkl"))) < 6 and not (root / LIST).exists() and not (root / FOLDER).exists()
    assert nuscenes_main([str(root), "--workers", "1"]) == 0
    assert contents(root) == contents(built)


@pytest.mark.parametrize("moment", ["objects moved", "stamp written"])
def test_killed_at_the_end(built, root, monkeypatch, moment):
    from cmtaqr.data import database

    class Killed(BaseException):
        pass

    def write(path, data, original=database.write_whole):
        if path.name == ("nuscenes_dbinfos_train.json" if moment == "objects moved" else LIST):
            raise Killed
        original(path, data)

    with monkeypatch.context() as patched:
        patched.setattr(database, "write_whole", write)
        with pytest.raises(Killed):
            build_database(root, workers=1, progress=False)
    assert not (root / LIST).exists()
    monkeypatch.setattr(database, "_build_frame", None)    # nothing is built twice
    build_database(root, workers=1, progress=False)
    assert contents(root) == contents(built)


def test_killed_worker_is_told_with_the_remedy(built, root, monkeypatch, capsys):
    from cmtaqr.data import database

    def kill(futures, original=database.as_completed):
        for process in multiprocessing.active_children():
            process.kill()
        return original(futures)

    with monkeypatch.context() as patched:
        patched.setattr(database, "as_completed", kill)
        assert main([str(root), "--workers", "2"]) == 1 and "fewer --workers than 2" in capsys.readouterr().err
    assert main([str(root), "--workers", "1"]) == 0
    assert contents(root) == contents(built)


def test_broken_files_are_listed_at_once_and_nothing_is_written(built, root, capsys):
    """Damage that no marker shows: only reading the whole file finds it."""
    infos = load(root / "nuscenes_infos_train.pkl")["data_list"]
    sweep = root / infos[1]["lidar_sweeps"][0]["lidar_points"]["lidar_path"]
    key = root / "samples/LIDAR_TOP" / infos[4]["lidar_points"]["lidar_path"]
    front, back = (root / "samples" / name / infos[index]["images"][name]["img_path"]
                   for index, name in ((0, "CAM_FRONT"), (5, "CAM_BACK")))
    good = {path: path.read_bytes() for path in (sweep, key, front, back)}
    points = np.fromfile(key, np.float32)
    points[7] = np.nan
    points.tofile(key)
    sweep.unlink()
    front.write_bytes(b"\xff\xd8" + bytes(500) + b"\xff\xd9")
    cv2.imwrite(str(back), np.zeros((90, 160, 3), np.uint8))
    assert main([str(root), "--workers", "1"]) == 1
    error = capsys.readouterr().err
    assert "broken files of" in error and ": 4;" in error and "restore" in error
    assert all(path.name in error for path in good) and "90 rows and 160 columns" in error
    assert not (root / LIST).exists() and not (root / FOLDER).exists() and not (root / "nuscenes_dbinfos_train.json").exists()
    for path, data in good.items():
        path.write_bytes(data)
    assert main([str(root), "--workers", "1"]) == 0
    assert contents(root) == contents(built)


def test_missing_infos_name_the_command(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 1 and "nowhere" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 1 and "python -m cmtaqr.data.nuscenes" in capsys.readouterr().err


def test_another_choice_makes_another_database_and_foreign_ones_stay(root, capsys):
    (root / FOLDER).mkdir()
    (root / FOLDER / "0_car_0.bin").write_bytes(b"somebody's")
    assert main([str(root), "--workers", "1"]) == 1 and "--force" in capsys.readouterr().err
    assert (root / FOLDER / "0_car_0.bin").read_bytes() == b"somebody's"
    shutil.rmtree(root / FOLDER)
    first = build_database(root, workers=1, progress=False).read_bytes()
    assert build_database(root, "last", workers=1, progress=False).read_bytes() != first
    assert build_database(root, workers=1, progress=False).read_bytes() == first


def test_infos_go_on_where_they_stopped(world, tmp_path, monkeypatch):
    from cmtaqr.data import nuscenes
    root, calls = shutil.copytree(world, tmp_path / "root"), []
    whole = contents(root)
    for path in root.glob("nuscenes*"):
        path.unlink()

    def check(*arguments, original=nuscenes.check_files):
        calls.append(arguments[1][0]["token"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(nuscenes, "check_files", check)
    with pytest.raises(KeyboardInterrupt):
        make_infos(root)
    assert not list(root.glob("nuscenes*"))
    make_infos(root)
    assert len(calls) == 4 and calls[2] == calls[3] and len(set(calls)) == 3    # two scenes were not looked at again
    assert {name: data for name, data in contents(root).items() if name != "nuscenes_infos.json"} == {
        name: data for name, data in whole.items() if name != "nuscenes_infos.json"}


@pytest.mark.parametrize("name,content,message", [
    ("v1.0-mini/category.json", None, "category.json.*restore"),
    ("v1.0-mini/sample_data.json", b"[{", "sample_data.json is broken.*restore"),
    ("v1.0-mini/calibrated_sensor.json", b"[]", "v1.0-mini do not fit together.*restore"),
    ("maps", None, "map mask.*restore"),
])
def test_broken_tables_are_named(root, capsys, name, content, message):
    path = root / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert nuscenes_main([str(root), "--no-database", "--force"]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_forced_run_that_failed_leaves_nothing_to_a_later_one(root, capsys):
    """A forced run looks at every file, also at those that passed in an earlier forced run which found others broken."""
    infos = load(root / "nuscenes_infos_train.pkl")["data_list"]
    early, late = (root / "samples/LIDAR_TOP" / infos[index]["lidar_points"]["lidar_path"] for index in (0, -1))
    good = {path: path.read_bytes() for path in (early, late)}
    for broken in (late, early):
        broken.write_bytes(b"cut")
        assert nuscenes_main([str(root), "--no-database", "--force"]) == 1 and broken.name in capsys.readouterr().err
        broken.write_bytes(good[broken])
        assert nuscenes_main([str(root), "--no-database"]) == 0 and "up to date" in capsys.readouterr().out
    assert not list(root.glob(".nuscenes*"))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A world without sweeps, prepared by this package and by the scripts of mmdet3d's wheel as they are."""
    tools = Path(importlib.util.find_spec("mmdet3d").origin).parent / ".mim"
    if not (tools / "tools" / "create_data.py").is_file():
        pytest.skip(f"this mmdet3d has no converter scripts in {tools}: install its wheel from PyPI")
    folder = tmp_path_factory.mktemp("converted")
    root = make_world(folder / "root", [*TRAIN, "scene-0103"], keyframes=1, sweeps=0, image_size=(400, 225), workers=1,
                      progress=False)
    assert nuscenes_main([str(root), "--workers", "1"]) == 0
    (folder / "there" / "data").mkdir(parents=True)
    os.symlink(root, folder / "there" / "data" / "nuscenes")
    command = [sys.executable, "-m", "tools.create_data", "nuscenes", "--root-path", "./data/nuscenes",
               "--out-dir", "./data/nuscenes", "--extra-tag", "theirs", "--version", "v1.0-mini"]
    subprocess.run(command, cwd=folder / "there", env=dict(os.environ, PYTHONPATH=str(tools)), check=True, capture_output=True)
    return root


def test_infos_are_those_of_mmdet3ds_converter(converted):
    """Field by field; the notebook of `cmtaqr.data.nuscenes` does the same with sweeps."""
    def same(ours, theirs, field):
        if isinstance(theirs, dict):
            assert ours.keys() - theirs.keys() <= {"height", "width", "lidar_sweeps"}, field
            assert theirs.keys() - ours.keys() <= {"cam_instances"}, field
            for key in ours.keys() & theirs.keys():
                same(ours[key], theirs[key], f"{field}.{key}")
        elif isinstance(theirs, list) and theirs and isinstance(theirs[0], dict):
            assert len(ours) == len(theirs), field
            for one, other in zip(ours, theirs):
                same(one, other, field)
        elif isinstance(theirs, str):
            assert ours == theirs, field
        elif np.ndim(theirs) == 2:    # matrices: theirs are rounded to single precision
            assert np.allclose(ours, theirs, rtol=1e-6, atol=1e-7), field
        else:
            assert np.allclose(ours, theirs, rtol=0, atol=1e-12, equal_nan=True), field

    for split, frames in (("train", 2), ("val", 1)):
        ours, theirs = (load(converted / f"{name}_infos_{split}.pkl") for name in ("nuscenes", "theirs"))
        order = {info["token"]: info for info in theirs["data_list"]}
        assert ours["metainfo"] == theirs["metainfo"] and len(ours["data_list"]) == len(order) == frames
        for info in ours["data_list"]:
            assert not info["lidar_sweeps"]
            same(info, dict(order[info["token"]], sample_idx=info["sample_idx"]), split)


def test_objects_are_those_of_mmdet3ds_converter(converted):
    """Same boxes and the same bytes of points, padding included (with sweeps mmdet3d's loader mistakes their translation)."""
    tokens = [[info["token"] for info in load(converted / f"{name}_infos_train.pkl")["data_list"]]
              for name in ("nuscenes", "theirs")]
    ours, theirs = (load(converted / f"{name}_dbinfos_train.pkl") for name in ("nuscenes", "theirs"))
    theirs = {(tokens[1][r["image_idx"]], r["gt_idx"]): r for group in theirs.values() for r in group}
    ours = {(tokens[0][r["image_idx"]], r["gt_idx"]): r for group in ours.values() for r in group}
    assert ours.keys() == theirs.keys() and len(ours) > 40
    for key, record in ours.items():
        other = theirs[key]
        assert all(record[field] == other[field] for field in ("name", "num_points_in_gt", "difficulty"))
        assert record["box3d_lidar"].dtype == other["box3d_lidar"].dtype
        assert np.array_equal(record["box3d_lidar"], other["box3d_lidar"])
        assert (converted / record["path"]).read_bytes() == (converted / other["path"]).read_bytes()
