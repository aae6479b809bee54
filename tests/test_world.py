"""The synthetic world, seen by the official devkit and by references that share no code with the generator."""
import json
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

nuscenes = pytest.importorskip("nuscenes", reason="the devkit reads the world: pip install 'cmtaqr[detector]'")

from nuscenes import NuScenes  # noqa: E402
from nuscenes.eval.common.config import config_factory  # noqa: E402
from nuscenes.eval.detection.constants import DETECTION_NAMES  # noqa: E402
from nuscenes.eval.detection.evaluate import DetectionEval  # noqa: E402
from nuscenes.utils.data_classes import LidarPointCloud  # noqa: E402
from nuscenes.utils.geometry_utils import points_in_box  # noqa: E402
from pyquaternion import Quaternion  # noqa: E402

from cmtaqr.data.camera import rasterize  # noqa: E402
from cmtaqr.data.sensors import CAMERAS, Lidar, cast_rays, cast_reference, make_rig, scan, sensor_pose  # noqa: E402
from cmtaqr.data.town import build_scene, stream  # noqa: E402
from cmtaqr.data.world import MINI_SCENES, WorldConfig, ground_truth_results, main, make_world, scene_names  # noqa: E402

OPTIONS = dict(keyframes=3, sweeps=2, camera_sweeps=1, image_size=(320, 180))
NAMES = ("scene-0061", "scene-0103", "scene-0916")
SCHEMA = {
    "attribute": "token name description", "calibrated_sensor": "token sensor_token translation rotation camera_intrinsic",
    "category": "token name description", "ego_pose": "token timestamp rotation translation",
    "instance": "token category_token nbr_annotations first_annotation_token last_annotation_token",
    "log": "token logfile vehicle date_captured location", "map": "category token filename log_tokens",
    "sample": "token timestamp prev next scene_token",
    "sample_annotation": "token sample_token instance_token visibility_token attribute_tokens translation size rotation "
                         "prev next num_lidar_pts num_radar_pts",
    "sample_data": "token sample_token ego_pose_token calibrated_sensor_token timestamp fileformat is_key_frame height width "
                   "filename prev next",
    "scene": "token log_token nbr_samples first_sample_token last_sample_token name description",
    "sensor": "token channel modality", "visibility": "token level description",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world") / "data", NAMES, workers=1, progress=False, **OPTIONS)


@pytest.fixture(scope="module")
def nusc(root):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return NuScenes("v1.0-mini", str(root), verbose=False)


def pose_matrix(record):
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = Quaternion(record["rotation"]).rotation_matrix, record["translation"]
    return matrix


def sensor_to_world(nusc, reading):
    return pose_matrix(nusc.get("ego_pose", reading["ego_pose_token"])) @ pose_matrix(
        nusc.get("calibrated_sensor", reading["calibrated_sensor_token"]))


def cloud_of(nusc, root, sample):
    reading = nusc.get("sample_data", sample["data"]["LIDAR_TOP"])
    points = np.fromfile(root / reading["filename"], np.float32).reshape(-1, 5)
    matrix = sensor_to_world(nusc, reading)
    return points, points[:, :3] @ matrix[:3, :3].T + matrix[:3, 3]


def test_tables_follow_the_schema(root):
    tables = {path.stem: json.loads(path.read_text()) for path in (root / "v1.0-mini").glob("*.json")}
    assert set(tables) == set(SCHEMA)
    for name, rows in tables.items():
        assert rows and all(set(row) == set(SCHEMA[name].split()) for row in rows), name
        assert len({row["token"] for row in rows}) == len(rows), f"{name}: tokens repeat"
    tokens = {name: {row["token"] for row in rows} for name, rows in tables.items()}
    for name, rows in tables.items():
        for row in rows:
            for key, value in row.items():
                other = key.removesuffix("_token").removeprefix("first_").removeprefix("last_")
                if key.endswith("_token") and other != "annotation":
                    assert value in tokens[other], (name, key)


def test_devkit_draws(nusc, tmp_path):
    import matplotlib
    matplotlib.use("Agg")
    sample = nusc.sample[4]
    nusc.render_sample_data(sample["data"]["LIDAR_TOP"], nsweeps=3, out_path=str(tmp_path / "bev.png"), verbose=False)
    nusc.render_pointcloud_in_image(sample["token"], out_path=str(tmp_path / "points.png"), verbose=False)
    nusc.render_annotation(sample["anns"][0], out_path=str(tmp_path / "box.png"))
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("bev.png", "points.png", "box.png"))


def test_truth_scores_one(nusc, tmp_path):
    for split in ("mini_val", "mini_train"):
        path = tmp_path / f"{split}.json"
        path.write_text(json.dumps(ground_truth_results(nusc, split)))
        metrics, _ = DetectionEval(nusc, config_factory("detection_cvpr_2019"), str(path), split, str(tmp_path / split),
                                   verbose=False).evaluate()
        assert np.isclose(metrics.mean_ap, 1.0) and np.isclose(metrics.nd_score, 1.0)
        assert set(metrics.mean_dist_aps) == set(DETECTION_NAMES)
        assert all(error < 1e-6 for error in metrics.tp_errors.values())


def test_point_counts_are_the_devkits(nusc, root):
    for sample in nusc.sample:
        _, world = cloud_of(nusc, root, sample)
        for key in sample["anns"]:
            row, box = nusc.get("sample_annotation", key), nusc.get_box(key)
            # A point on a face may fall on either side of it in single precision.
            assert abs(int(points_in_box(box, world.T).sum()) - row["num_lidar_pts"]) <= 1
    assert np.mean([row["num_lidar_pts"] > 0 for row in nusc.sample_annotation]) > 0.6


def test_velocity_of_the_devkit_is_that_of_the_motion(nusc):
    checked = 0
    for name in NAMES:
        scene = build_scene(name, 0, 1.5)
        record = next(s for s in nusc.scene if s["name"] == name)
        sample = nusc.get("sample", record["first_sample_token"])
        middle = nusc.get("sample", sample["next"])
        for key in middle["anns"]:
            row = nusc.get("sample_annotation", key)
            actor = min(scene.actors, key=lambda a: np.linalg.norm(a.box(1.0)[0] - row["translation"]))
            assert np.linalg.norm(actor.box(1.0)[0] - row["translation"]) < 1e-3
            if row["prev"] and row["next"]:
                derivative = (actor.box(1.001)[0] - actor.box(0.999)[0]) / 0.002
                assert np.allclose(nusc.box_velocity(key), derivative, atol=0.03)
                checked += 1
    assert checked > 50


def test_sweeps_precede_their_key_frame(nusc, root):
    for sample in nusc.sample:
        times = []
        for channel in ("LIDAR_TOP", *CAMERAS):
            reading = nusc.get("sample_data", sample["data"][channel])
            assert reading["is_key_frame"] and reading["filename"].startswith("samples/")
            assert -0.05 <= (reading["timestamp"] - sample["timestamp"]) / 1e6 <= 0
            for _ in range(OPTIONS["sweeps" if channel == "LIDAR_TOP" else "camera_sweeps"]):
                reading = nusc.get("sample_data", reading["prev"])
                assert not reading["is_key_frame"] and reading["filename"].startswith("sweeps/")
                assert reading["sample_token"] == sample["token"]
                assert nusc.get("ego_pose", reading["ego_pose_token"])["timestamp"] == reading["timestamp"]
        merged, times = LidarPointCloud.from_file_multisweep(nusc, sample, "LIDAR_TOP", "LIDAR_TOP", nsweeps=3)
        assert np.allclose(np.unique(times.round(3)), [0, 0.167, 0.333])
        assert merged.nbr_points() > 30_000


def test_ego_drives_at_its_speed_through_all_time_stamps(nusc):
    for record in nusc.scene:
        speed = build_scene(record["name"], 0, 1.5).ego.velocity[0]
        for channel in ("LIDAR_TOP", "CAM_BACK"):
            reading = nusc.get("sample_data", nusc.get("sample", record["first_sample_token"])["data"][channel])
            while reading["next"]:
                after = nusc.get("sample_data", reading["next"])
                here, there = (nusc.get("ego_pose", row["ego_pose_token"])["translation"] for row in (reading, after))
                seconds = (after["timestamp"] - reading["timestamp"]) / 1e6
                assert np.isclose(np.hypot(*np.subtract(there, here)[:2]), speed * seconds, rtol=0.03)
                reading = after


def test_sweeps_of_static_things_lie_on_each_other(nusc):
    """The ego moves between turns; compensated by its poses the ground stays at its height and walls stay where they are."""
    from scipy.spatial import cKDTree
    sample = nusc.get("sample", next(s for s in nusc.scene if s["name"] == "scene-0916")["last_sample_token"])
    merged, times = LidarPointCloud.from_file_multisweep(nusc, sample, "LIDAR_TOP", "LIDAR_TOP", nsweeps=3)
    points, high = merged.points[:3].T, merged.points[2] > 1.5
    now, before = points[high & (times[0] == 0)], points[high & (times[0] > 0.3)]
    distance, _ = cKDTree(now).query(before)
    assert len(before) > 300 and np.median(distance) < 0.35


def test_points_lie_on_their_object(nusc):
    scene, rig = build_scene("scene-0103", 0, 5.0), make_rig(stream(0, "rig"))
    distances, inside, total = [], 0, 0
    for t in (1.0, 4.0):
        rotation, position = sensor_pose(rig["LIDAR_TOP"], *scene.ego.pose(t))
        points, owner = scan(scene, t, rotation, position, Lidar(), np.random.default_rng(0))
        world, boxes = points[:, :3] @ rotation.T + position, scene.boxes(t)
        for index, actor in enumerate(scene.actors):
            own, parts = world[owner == index], boxes.select(boxes.owner == index)
            if not len(own):
                continue
            center, yaw = actor.box(t)
            turn = np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]])
            local = np.c_[(own[:, :2] - center[:2]) @ turn, own[:, 2] - center[2]]
            inside += (np.abs(local) <= np.array(actor.size)[[1, 0, 2]] / 2).all(1).sum()
            total += len(own)
            best = np.full(len(own), np.inf)
            for k in range(len(parts)):
                turn = np.array([[np.cos(parts.yaw[k]), -np.sin(parts.yaw[k])], [np.sin(parts.yaw[k]), np.cos(parts.yaw[k])]])
                off = own - parts.center[k]
                gap = np.abs(np.c_[off[:, :2] @ turn, off[:, 2]]) - parts.half[k]
                best = np.minimum(best, np.where((gap > 0).any(1), np.linalg.norm(np.maximum(gap, 0), axis=1), -gap.max(1)))
            distances.append(best)
    distances = np.concatenate(distances)
    assert np.median(distances) < 0.02 and np.percentile(distances, 99) < 0.06, np.percentile(distances, [50, 99, 100])
    assert inside / total > 0.97, f"{inside} of {total} points lie in the annotated box"


def test_fast_rays_are_the_slow_ones():
    lidar = Lidar(beams=16, steps=361)
    scene, rig = build_scene("scene-0655"), make_rig(stream(3, "rig"))
    rotation, position = sensor_pose(rig["LIDAR_TOP"], *scene.ego.pose(1.0))
    boxes = scene.boxes(1.0)
    distance, index = cast_rays(boxes, lidar, rotation, position, chunk=5000)
    expected, which = cast_reference(boxes, lidar.directions() @ rotation.T, position)
    near = expected < lidar.far
    assert np.mean(index[near] != which[near]) < 1e-3
    same = near & (index == which)
    assert np.abs(distance[same] - expected[same]).max() < 1e-3
    assert not np.any(distance[~near] < lidar.far - 0.01)


def test_points_fall_on_the_pixels_of_their_object(nusc, root):
    """World files and tables alone: every point of an annotated object that stands still shows up in that object's pixels."""
    sample = next(s for s in nusc.sample if nusc.get("scene", s["scene_token"])["name"] == "scene-0103" and s["prev"])
    scene, t = build_scene("scene-0103", 0, 1.5), 1.0
    still = [i for i, a in enumerate(scene.actors) if not any(a.path.velocity)]
    _, world = cloud_of(nusc, root, sample)
    owner = np.full(len(world), -1)
    for index in still:
        key = min(sample["anns"], key=lambda k: np.linalg.norm(nusc.get_box(k).center - scene.actors[index].box(t)[0]))
        box = nusc.get_box(key)
        if np.linalg.norm(box.center - scene.actors[index].box(t)[0]) < 1e-3:
            owner[points_in_box(box, world.T)] = index
    agree = total = 0
    for channel in CAMERAS:
        reading = nusc.get("sample_data", sample["data"][channel])
        matrix, size = sensor_to_world(nusc, reading), (reading["width"], reading["height"])
        intrinsic = np.array(nusc.get("calibrated_sensor", reading["calibrated_sensor_token"])["camera_intrinsic"])
        time = t + (reading["timestamp"] - sample["timestamp"]) / 1e6
        view = rasterize(scene.boxes(time), len(scene.actors), matrix[:3, :3], matrix[:3, 3], intrinsic, size)
        local = (world - matrix[:3, 3]) @ matrix[:3, :3]
        front = (local[:, 2] > 0.5) & (owner >= 0)
        pixel = local[front] @ intrinsic.T
        u, v = np.floor(pixel[:, 0] / pixel[:, 2]).astype(int), np.floor(pixel[:, 1] / pixel[:, 2]).astype(int)
        inside = (u >= 0) & (u < size[0]) & (v >= 0) & (v < size[1])
        u, v, depth, name = u[inside], v[inside], local[front, 2][inside], owner[front][inside]
        open_view = (depth - 0.15) * view.inverse_depth[v, u] < 1
        agree, total = agree + (view.owner[v, u] == name)[open_view].sum(), total + open_view.sum()
    assert total > 500 and agree / total > 0.95, f"{agree} of {total}"


def test_images_have_their_size_and_show_the_objects_color(nusc, root):
    matches, drawn = 0, 0
    for sample in nusc.sample:
        name = nusc.get("scene", sample["scene_token"])["name"]
        scene = build_scene(name, 0, 1.5)
        t = 0.5 * (1 + [s["token"] for s in nusc.sample if s["scene_token"] == sample["scene_token"]].index(sample["token"]))
        reading = nusc.get("sample_data", sample["data"]["CAM_FRONT"])
        image = cv2.imread(str(root / reading["filename"]))[..., ::-1].astype(float)
        assert image.shape == (180, 320, 3)
        matrix = sensor_to_world(nusc, reading)
        intrinsic = np.array(nusc.get("calibrated_sensor", reading["calibrated_sensor_token"])["camera_intrinsic"])
        boxes = scene.boxes(t + (reading["timestamp"] - sample["timestamp"]) / 1e6)
        view = rasterize(boxes, len(scene.actors), matrix[:3, :3], matrix[:3, 3], intrinsic, (320, 180))
        for box in np.unique(view.faces.box[view.face[view.owner >= 0]]):
            mask = (view.face >= 0) & (view.faces.box[np.maximum(view.face, 0)] == box)
            mask = cv2.erode(mask.astype(np.uint8), np.ones((3, 3))) > 0
            color = boxes.color[box]
            if mask.sum() > 60 and np.ptp(color) > 80:
                mean = image[mask].mean(0)
                matches += np.argmax(mean) == np.argmax(color)
                drawn += 1
    assert drawn > 5 and matches / drawn > 0.9, f"{matches} of {drawn}"


@pytest.mark.parametrize("name", MINI_SCENES)
def test_every_scene_has_all_classes_and_no_collision(name):
    scene = build_scene(name)
    assert set(DETECTION_NAMES) == set(Counter(actor.name for actor in scene.actors))
    for t in (0.13, 2.49, 4.87):
        rectangles = []
        for actor in scene.actors:
            center, yaw = actor.box(t)
            rectangles.append((tuple(map(float, center[:2])), (actor.size[1], actor.size[0]), float(np.degrees(yaw))))
        for i, a in enumerate(rectangles):
            for b in rectangles[:i]:
                if np.hypot(a[0][0] - b[0][0], a[0][1] - b[0][1]) < (a[1][0] + b[1][0]) / 2 + 3:
                    assert cv2.rotatedRectangleIntersection(a, b)[0] == cv2.INTERSECT_NONE
        assert all(set(actor.attribute.split(".")[:1]) <= {"vehicle", "cycle", "pedestrian", ""} for actor in scene.actors)


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


SMALL = dict(scenes=2, keyframes=1, sweeps=1, image_size=(96, 54), progress=False)


def test_same_seed_same_bytes_for_any_number_of_workers(tmp_path):
    one, two = (make_world(tmp_path / str(n), workers=n, **SMALL) for n in (1, 2))
    assert contents(one) == contents(two)
    other = make_world(tmp_path / "other", workers=1, seed=1, **SMALL)
    assert not set(contents(one)) & {name for name in contents(other) if name.startswith("samples")}


def test_interrupted_run_is_finished(tmp_path):
    whole = contents(make_world(tmp_path / "a", workers=1, **SMALL))
    root = tmp_path / "b"
    make_world(root, workers=1, **SMALL)
    (root / ".world" / "scene-0103.json").unlink()
    next(root.glob("samples/CAM_BACK/*scene-0103*")).write_bytes(b"half a file")
    next(root.glob("samples/LIDAR_TOP/*scene-0061*")).unlink()
    (root / "v1.0-mini" / "sample.json").unlink()
    make_world(root, workers=1, **SMALL)
    assert contents(root) == whole


def test_other_parameters_need_overwrite(tmp_path):
    root = make_world(tmp_path / "a", workers=1, **SMALL)
    (root / "nuscenes_infos_train.pkl").write_bytes(b"made from the old world")
    changed = SMALL | dict(keyframes=2)
    with pytest.raises(FileExistsError, match=r"keyframes: 1 there, 2 asked for.*--overwrite"):
        make_world(root, workers=1, **changed)
    make_world(root, workers=1, overwrite=True, **changed)
    assert contents(root) == contents(make_world(tmp_path / "b", workers=1, **changed))


def test_foreign_data_is_never_overwritten(tmp_path):
    (tmp_path / "v1.0-trainval").mkdir()
    with pytest.raises(FileExistsError, match="did not write"):
        make_world(tmp_path, 1, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["v1.0-trainval"]


@pytest.mark.parametrize("wrong, words", [
    (dict(keyframes=0), "keyframes = 0"), (dict(image_size=(8, 8)), "image_size"), (dict(seed=-1), "seed"),
    (dict(scenes=0), "scenes = 0"), (dict(scenes=["scene-9999"]), "scene-9999"), (dict(density=0.0), "density"),
    (dict(radius=1.0), "radius"), (dict(lidar_range=float("nan")), "lidar_range")])
def test_bad_parameters_are_named(tmp_path, wrong, words):
    with pytest.raises(ValueError, match=words):
        make_world(tmp_path / "new", workers=1, progress=False, **wrong)
    assert not (tmp_path / "new").exists()


def test_names_follow_the_official_splits():
    assert scene_names(3) == (("scene-0061", "scene-0103", "scene-0553"), "v1.0-mini")
    names, version = scene_names(25)
    assert version == "v1.0-trainval" and len(set(names)) == 25
    assert WorldConfig(names).scenes == names


def test_command_line(tmp_path, capsys):
    arguments = ["--scenes", "scene-0103", "--keyframes", "1", "--sweeps", "0", "--image-size", "96", "54", "--workers", "1"]
    main([str(tmp_path / "w"), *arguments])
    assert "world complete" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "w"), *arguments, "--seed", "5"])
    assert stop.value.code == 2 and "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize("root, words", [("file/w", "Not a directory"), ("broken", "world.json is broken")])
def test_a_folder_that_cannot_be_used_is_told_on_a_line(tmp_path, capsys, root, words):
    (tmp_path / "file").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "world.json").write_text("{")
    with pytest.raises(SystemExit):
        main([str(tmp_path / root), "--scenes", "1"])
    assert words in capsys.readouterr().err


def test_world_needs_no_detector():
    """NumPy and OpenCV are enough: neither torch nor the OpenMMLab packages are imported where they are absent."""
    hidden = ("mmdet3d", "mmdet", "mmcv", "mmengine", "torch", "nuscenes", "pyquaternion")
    script = f"import sys\nfor name in {hidden}: sys.modules[name] = None\nimport cmtaqr.data.world\n"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).resolve().parent.parent)
