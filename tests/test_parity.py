"""The parity command: on the golden folder, on files of other sizes made in float64, and on broken ones."""
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("mmdet3d", reason='needs the detector part: pip install "cmtaqr[detector]"')
import plain_cmt as plain  # noqa: E402
from cmtaqr.detector.golden import build_head  # noqa: E402
from cmtaqr.detector.image import CPFPN  # noqa: E402
from cmtaqr.detector.parity import check_file, main  # noqa: E402
from cmtaqr.detector.vovnet import OSAStage  # noqa: E402

FILES = ("assigner_cost", "augment", "coder", "dn_train", "head_eval", "head_eval_single_modality", "loss", "neck_osa",
         "normalize_bbox", "posenc", "projection", "task_head")


def verdicts(path, **options):
    """Verdict per array; what could not be computed fails the test."""
    rows, problems = check_file(path, **options)
    assert not problems
    return {row["array"]: row["verdict"] for row in rows}


def altered(source, target, change):
    """Copy of a file with its arrays changed by a function."""
    with np.load(source) as data:
        arrays = {k: data[k] for k in data.files}
    change(arrays)
    np.savez(target, **arrays)
    return target


def test_the_whole_golden_folder(shared, tmp_path):
    assert main([str(shared / "golden"), "--json", str(tmp_path / "table.json")]) == 0
    table = json.loads((tmp_path / "table.json").read_text())
    covered = {(row["file"], row["array"]) for row in table["rows"]}
    assert {f"{name}.npz" for name in FILES} <= {file for file, _ in covered}
    for path in (shared / "golden").glob("*.npz"):
        parts = {name: name.split("/") for name in np.load(path).files}
        stored = {name for name, words in parts.items() if any(word.startswith(("out", "mid", "loss")) for word in words)}
        assert stored <= {array for file, array in covered if file == path.name}
    assert {row["verdict"] for row in table["rows"]} == {"ok"} and not table["problems"]
    assert max(row["error"] for row in table["rows"] if row["tolerance"] == 1e-5) < 1e-5


def test_committed_table_is_of_the_golden_folder(shared):
    from conftest import ROOT
    table = json.loads((ROOT / "nbs/results/parity.json").read_text())
    rows = {(row["file"], row["array"]) for row in table["rows"]}
    now = {(row["file"], row["array"]) for path in sorted((shared / "golden").glob("*.npz")) for row in check_file(path)[0]}
    assert rows == now and all(row["verdict"] == "ok" for row in table["rows"])


@pytest.mark.parametrize("name, array, change", [
    ("head_eval", "state/bev_embedding.0.weight", 1e-2), ("head_eval", "out/vel", 1e-3), ("neck_osa", "osa/in", 9),
    ("task_head", "state/center.1.bias", 1e-2), ("posenc", "out/sine_128", 1e-4), ("normalize_bbox", "out/encoded8", 1e-2),
    ("projection", "out/depth_bins", 1e-2), ("coder", "out/1/labels", 1), ("assigner_cost", "out/2/assigned_gt_inds", 1),
    ("loss", "out/layer0/num_pos", 1), ("dn_train", "loss/d0.dn_loss_cls", 1e-3), ("augment", "paste/out/image1", 9),
    ("head_eval_single_modality", "state_lidar/task_heads.0.dim.3.weight", 1e-2)])
def test_a_change_fails(shared, tmp_path, name, array, change):
    def add(arrays):
        flat = arrays[array].reshape(-1)
        flat[len(flat) // 2] += np.asarray(change).astype(flat.dtype)
    source = shared / "golden" / f"{name}.npz"
    changed = altered(source, tmp_path / source.name, add)
    assert main([str(changed), "--weights", str(shared / "golden/head_eval.npz")]) == 1
    rows, problems = check_file(changed, shared / "golden/head_eval.npz")
    failed = {row["array"] for row in rows if row["verdict"] == "FAIL"}
    assert failed and not problems and (failed == {array} or not array.split("/")[-2].startswith(("out", "loss")))


def test_exit_status_and_output_of_the_command(shared, tmp_path):
    unknown = altered(shared / "golden/coder.npz", tmp_path / "coder.npz",
                      lambda a: a.update({"out/0/nonsense": np.ones(3), "in/extra": np.ones(2)}))
    command = [sys.executable, "-m", "cmtaqr.detector.parity", str(unknown), str(tmp_path / "absent.npz")]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = {line.split()[1]: line for line in done.stdout.splitlines() if line.startswith("coder.npz")}
    assert done.returncode == 1 and "not checked" in lines["out/0/nonsense"] and "unused input" in lines["in/extra"]
    assert "ok" in lines["out/0/scores"] and len(lines) == 10 and "1 not checked" in done.stdout
    assert "absent.npz does not exist" in done.stderr


def test_bad_files_are_named(shared, tmp_path, capsys):
    golden = shared / "golden"
    (tmp_path / "cut.npz").write_bytes((golden / "coder.npz").read_bytes()[:20000])
    (tmp_path / "text.npz").write_text("not a zip")
    altered(golden / "coder.npz", tmp_path / "bare.npz", lambda a: a.pop("config_json"))
    altered(golden / "posenc.npz", tmp_path / "posenc.npz", lambda a: None)
    altered(golden / "assigner_cost.npz", tmp_path / "lost.npz", lambda a: a.pop("in/1/gt_labels"))
    altered(golden / "coder.npz", tmp_path / "poor.npz", lambda a: a.update(config_json=np.array('{"num_classes": 10}')))
    altered(golden / "loss.npz", tmp_path / "single.npz", lambda a: a.pop("in/1/gt_labels"))
    altered(golden / "loss.npz", tmp_path / "nobody.npz", lambda a: [a.pop(f"in/{i}/gt_labels") for i in (0, 1)])
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()  # a folder of its own: the files above look for weights beside them
    altered(golden / "head_eval.npz", tmp_path / "other" / "head_eval.npz",
            lambda a: a.update(config_json=np.array(str(a["config_json"]).replace('"hidden_dim": 256', '"hidden_dim": 128'))))
    for name, message in (
            ("cut.npz", "damaged or no npz file"), ("text.npz", "damaged or no npz file"), ("bare.npz", "has no config_json"),
            ("posenc.npz", "choose with --weights FILE"), ("lost.npz", "has no array 'in/1/gt_labels'"),
            ("poor.npz", "its settings lack 'max_num'"), ("empty", "holds no .npz file"),
            ("single.npz", "has objects of 1 samples and predictions of 2"), ("nobody.npz", "has no objects in/0/gt_labels"),
            ("other", "55 of another shape (shared_conv.conv.weight (256, 64, 3, 3) instead of (128, 64, 3, 3), ")):
        assert main([str(tmp_path / name)]) == 1
        assert message in capsys.readouterr().err, name
    rows, problems = check_file(tmp_path / "posenc.npz")
    checked = {row["array"]: row["verdict"] for row in rows}
    assert checked["out/sine_256"] == "ok" and checked["out/rv_pos_embed"] == "not checked" and len(problems) == 1
    assert set(verdicts(tmp_path / "posenc.npz", weights=golden / "head_eval.npz").values()) == {"ok"}


def test_tolerance_is_an_option(shared):
    assert main([str(shared / "golden/head_eval.npz"), "--tolerance", "1e-8"]) == 1


@pytest.mark.parametrize("name", FILES)
def test_other_types_of_the_same_numbers(shared, tmp_path, name):
    """Doubles, short integers, the other byte order and settings as bytes: the models compute in float32 all the same."""
    def retyped(arrays):
        for key, value in arrays.items():
            if value.dtype.kind == "f":
                arrays[key] = value.astype(">f8")
            elif value.dtype.kind in "iu" and value.dtype != np.uint8:
                arrays[key] = value.astype(np.uint8 if "labels" in key and value.size and value.min() >= 0 else np.int16)
            elif key == "config_json":
                arrays[key] = np.array([str(value).encode()])

    head = altered(shared / "golden/head_eval.npz", tmp_path / "head_eval.npz", retyped)
    path = altered(shared / "golden" / f"{name}.npz", tmp_path / f"{name}.npz", retyped)
    assert set(verdicts(path, weights=head).values()) == {"ok"}


def test_settings_of_the_costs_may_be_dictionaries(shared, tmp_path):
    def weighted(weight):
        settings = dict(cls_cost=dict(type="FocalLossCost", weight=weight), reg_cost=dict(type="BBox3DL1Cost", weight=0.25))
        return lambda arrays: arrays.update(config_json=np.array(json.dumps(settings)))

    source = shared / "golden/assigner_cost.npz"
    assert set(verdicts(altered(source, tmp_path / "a.npz", weighted(2.0))).values()) == {"ok"}
    assert verdicts(altered(source, tmp_path / "b.npz", weighted(1.0)))["out/0/cls_cost"] == "FAIL"
    assert set(verdicts(altered(source, tmp_path / "c.npz", lambda arrays: arrays.pop("config_json"))).values()) == {"ok"}


def test_optional_arrays_may_be_missing(shared, tmp_path):
    def lean(arrays):
        for name in [n for n in arrays if n.startswith("mid/") or n in ("out/center", "out/vel")]:
            arrays.pop(name)

    path = altered(shared / "golden/head_eval.npz", tmp_path / "head_eval.npz", lean)
    assert verdicts(path) == dict.fromkeys([f"out/{n}" for n in ("height", "dim", "rot", "cls_logits")], "ok")


# Files of other sizes, their outputs computed in float64 by formulas that share nothing with the package.

CONFIGS = dict(
    oblong=dict(hidden_dim=32, num_heads=4, num_decoder_layers=3, ffn_channels=24, num_query=11, in_channels=5, depth_num=7,
                bev_hw=[10, 6], grid_size=[24, 40, 10], downsample_scale=4, pc_range=[-12.0, -20.0, -3.0, 12.0, 20.0, 2.0],
                post_center_range=[-13.0, -21.0, -5.0, 13.0, 21.0, 5.0], max_num=30, num_cams=3, img_feat_hw=[3, 5],
                pad_shape=[48, 80, 3], batch=1, final_kernel=1, head_conv=8, classes=list("abcd")),
    two_tasks=dict(hidden_dim=24, num_heads=6, num_decoder_layers=1, ffn_channels=40, num_query=20, in_channels=3, depth_num=4,
                   grid_size=[16, 16, 8], downsample_scale=2, pc_range=[-30.0, -30.0, -4.0, 30.0, 30.0, 4.0], num_cams=5,
                   img_feat_hw=[2, 7], pad_shape=[32, 112, 3], batch=3, final_kernel=3, head_conv=12,
                   classes=[list("ab"), list("cde")]))


@pytest.fixture(scope="module", params=list(CONFIGS))
def made(request, tmp_path_factory):
    """Folder with head_eval.npz of another size, its config, weights and inputs."""
    config, folder = CONFIGS[request.param], tmp_path_factory.mktemp(request.param)
    rng, generator = np.random.default_rng(1), torch.Generator().manual_seed(1)
    state = plain.random_state(build_head(config), generator)
    state["reference_points.weight"][0] = torch.tensor([-0.1, 1.2, 0.5])
    grid, stride, pad = config["grid_size"], config["downsample_scale"], config["pad_shape"]
    inputs = dict(
        pts_feat=torch.randn(config["batch"], config["in_channels"], grid[1] // stride, grid[0] // stride, generator=generator),
        img_feat=torch.randn(config["batch"] * config["num_cams"], config["hidden_dim"], *config["img_feat_hw"],
                             generator=generator),
        lidar2img=torch.from_numpy(plain.cameras(config["batch"], config["num_cams"], pad, rng)), pad_shape=np.array(pad))
    tasks, mid = plain.head(state, config, inputs["pts_feat"], inputs["img_feat"], inputs["lidar2img"], pad)
    out = tasks[0] if len(tasks) == 1 else {f"{t}/{k}": v for t, task in enumerate(tasks) for k, v in task.items()}
    plain.save(folder / "head_eval.npz", config, state=state, out=out, mid=mid, **{"in": inputs})
    return dict(folder=folder, config=config, state=state, inputs=inputs, tasks=tasks, rng=rng)


def test_head_of_another_size(made):
    found = verdicts(made["folder"] / "head_eval.npz")
    assert set(found.values()) == {"ok"} and len(found) == 3 + 6 * len(made["tasks"])


def test_forms_of_another_size(made):
    config, state, i, pad = made["config"], made["state"], made["inputs"], made["config"]["pad_shape"]
    own = {
        k: torch.randn(*v.shape[:2], 3, generator=torch.Generator().manual_seed(2)) * 0.1
        for k, v in state.items() if "task_heads" in k and v.dim() == 3
    }
    camera, _ = plain.head(state, config, None, i["img_feat"], i["lidar2img"], pad)
    lidar, _ = plain.head({**state, **own}, config, i["pts_feat"], None, None, pad)
    groups = {f"out_{name}/{t}": task for name, tasks in (("camera", camera), ("lidar", lidar)) for t, task in enumerate(tasks)}
    path = made["folder"] / "head_eval_single_modality.npz"
    plain.save(path, dict(note="weights of head_eval"), state_lidar=own, **groups)
    found = verdicts(path)
    assert set(found.values()) == {"ok"} and len(found) == 12 * len(made["tasks"])


def test_positions_of_another_size(made):
    config, i, pad = made["config"], made["inputs"], made["config"]["pad_shape"]
    state = {k: v.double() for k, v in made["state"].items()}
    anchors, shape = torch.rand(config["batch"], 9, 3, generator=torch.Generator().manual_seed(3)), [4, 3]
    coords = plain.bev_coords(config["grid_size"], config["downsample_scale"])
    rays = torch.stack([plain.cell_rays(m, shape, pad, config) for m in i["lidar2img"].flatten(0, 1)]).unflatten(1, shape)
    bev, camera = plain.query_parts(state, config, anchors.double(), i["lidar2img"], pad)
    values = torch.tensor([-0.5, 0.0, 3e-6, 0.3, 1.0, 2.0])
    path = made["folder"] / "posenc_odd.npz"
    plain.save(
        path, **{
            "in": dict(lidar2img=i["lidar2img"], pad_shape=np.array(pad), img_feat_hw=np.array(shape), reference_points=anchors,
                       sine_pos=anchors[0, :, :2], sine_pos3=anchors[0], inverse_sigmoid=values)
        }, out=dict(sine_18=plain.sine(anchors[0].double(), 18), sine_pos3_6=plain.sine(anchors[0].double(), 6),
                    bev_coords=coords, bev_pos_embed=plain.mlp(state, "bev_embedding", plain.sine(coords, config["hidden_dim"])),
                    rv_pos_embed=plain.mlp(state, "rv_embedding", rays), bev_query_embed=bev, rv_query_embed=camera,
                    inverse_sigmoid=plain.logit(values.double())), mid=dict(rv_ray_coords_first_3_views=rays[:3]))
    found = verdicts(path)
    assert set(found.values()) == {"ok"} and len(found) == 9


def test_projection_of_another_size(made):
    config, matrices, pad = dict(made["config"], depth_num=10), made["inputs"]["lidar2img"], made["config"]["pad_shape"]
    low, size = plain.bounds(config)
    points = torch.rand(40, 3, generator=torch.Generator().manual_seed(4))
    metric = points.double() * size + low
    images = [[plain.project(m, metric) for m in ms] for ms in matrices]
    stack = lambda f: torch.stack([torch.stack([f(*pair, m) for pair, m in zip(row, ms)]) for row, ms in zip(images, matrices)])
    grid = np.array([84, 60, 5])
    path = made["folder"] / "projection.npz"
    plain.save(
        path, **{
            "in": dict(grid_size=grid, depth_num=np.array(10), pc_range=np.array(config["pc_range"]), points_normalised=points,
                       points_metric=metric, lidar2img=matrices, pad_shape=np.array(pad))
        }, out=dict(coords_for_downsample12=plain.bev_coords(grid.tolist(), 12), depth_bins=plain.depths(config),
                    homogeneous_uvz1=stack(lambda image, _, m: F.pad(image, (0, 1), value=1.0)),
                    uv_pixels=stack(lambda _, pixels, m: pixels[:, :2]),
                    visible_mask=stack(lambda image, pixels, m: plain.in_view(image, pixels, pad)),
                    backprojected_normalised_every_3rd_depth=stack(lambda _, pixels, m: plain.lift(m, pixels, config)[:, ::3])))
    found = verdicts(path)
    assert set(found.values()) == {"ok"} and len(found) == 7


def test_training_step_of_another_size(made):
    config, state, i, pad = made["config"], made["state"], made["inputs"], made["config"]["pad_shape"]
    single_task = len(made["tasks"]) == 1
    classes, counts = sum(build_head(config).tasks), [3] if config["batch"] == 1 else [2, 0, 4]
    pairs = [plain.objects(n, classes, config, made["rng"]) for n in counts]
    boxes, labels = [plain.gravity(b) for b, _ in pairs], [torch.from_numpy(x) for _, x in pairs]
    groups = min(10, config["num_query"] // max(counts))
    uniform = torch.rand(groups * sum(counts), 3, generator=torch.Generator().manual_seed(5))
    groups, slots, mask, slot, sample, noised, raw, known = plain.denoising(boxes, labels, config["num_query"], classes, config,
                                                                            uniform)
    anchors = torch.cat([slots, state["reference_points.weight"].double().expand(len(counts), -1, -1)], 1)
    tasks, _ = plain.head(state, config, i["pts_feat"], i["img_feat"], i["lidar2img"], pad, anchors, mask)
    pad_size = slots.shape[1]
    out = {}
    for t, task in enumerate(tasks):
        for name, value in task.items():
            place = "" if single_task else f"{t}/"
            out |= {f"{place}dn_{name}": value[:, :, :pad_size], f"{place}{name}": value[:, :, pad_size:]}
    loss, layers = {}, config["num_decoder_layers"]
    for layer in range(layers if single_task else 0):
        codes = torch.cat([tasks[0][k][layer] for k in plain.SIZES], -1)
        logits, prefix = tasks[0]["cls_logits"][layer], "" if layer == layers - 1 else f"d{layer}."
        cls, box, _ = plain.layer_losses(logits[:, pad_size:], codes[:, pad_size:], labels, [plain.encode(b) for b in boxes])
        difference = (codes[sample, slot] - plain.encode(known)).abs() * plain.WEIGHTS
        dn_cls = 2 * plain.focal(logits[sample, slot], noised) / max(1, len(slot) * 3.14159 / 6 * 0.75**3)
        loss |= {f"{prefix}loss_cls": cls, f"{prefix}loss_bbox": box, f"{prefix}dn_loss_cls": dn_cls,
                 f"{prefix}dn_loss_bbox": 0.25 * difference.sum() / len(slot)}
    objects = {
        f"{b}/{name}": value
        for b, pair in enumerate(pairs)
        for name, value in zip(("gt_boxes9_bottom_center", "gt_labels"), pair)
    }
    path = made["folder"] / "dn_train.npz"
    plain.save(
        path, **{"in": dict(objects, uniform_noise_0_1=uniform)}, out=out, loss=loss,
        mid=dict(groups=np.array(groups), pad_size=np.array(pad_size), padded_reference_points=anchors,
                 self_attn_mask_true_is_blocked=mask, known_labels_noised=noised, known_labels_raw=raw,
                 known_boxes9_gravity_center=known, map_known_indice=slot, batch_of_known=sample))
    found = verdicts(path)
    assert set(found.values()) == {"ok"} and len(found) == 9 + len(out) + len(loss)


def test_training_step_without_objects(made):
    """No denoising queries then: the predictions are those of the evaluation."""
    config, batch = made["config"], made["config"]["batch"]
    empty = dict(gt_boxes9_bottom_center=np.zeros((0, 9)), gt_labels=np.zeros(0, int))
    none = {f"{b}/{name}": value for b in range(batch) for name, value in empty.items()}
    path, single = made["folder"] / "dn_none.npz", len(made["tasks"]) == 1
    out = made["tasks"][0] if single else {f"{t}/{k}": v for t, task in enumerate(made["tasks"]) for k, v in task.items()}
    loss = {}
    for layer in range(config["num_decoder_layers"] if single else 0):
        cls = 2 * plain.focal(out["cls_logits"][layer].flatten(0, 1), torch.full((batch * config["num_query"],), 4))
        prefix = "" if layer == config["num_decoder_layers"] - 1 else f"d{layer}."
        loss[f"{prefix}loss_cls"] = cls / max(1, 0.1 * batch * config["num_query"])
        loss[f"{prefix}loss_bbox"] = torch.tensor(0.0)
    plain.save(path, **{"in": dict(none, uniform_noise_0_1=np.zeros((0, 3)))}, out=out, loss=loss)
    found = verdicts(path)
    assert set(found.values()) == {"ok"} and len(found) == len(out) + len(loss)


@pytest.mark.parametrize("counts", [(4, 0), (1, 6, 30)])
def test_losses_and_costs_of_another_size(tmp_path, counts):
    """More objects than queries and a sample without any, 7 classes, 3 layers; predictions in float32, results in float64."""
    rng, classes, queries = np.random.default_rng(6), 7, 24
    config = dict(pc_range=[-20.0, -10.0, -3.0, 20.0, 10.0, 2.0])
    pairs = [plain.objects(n, classes, config, rng) for n in counts]
    labels, gt = [torch.from_numpy(x) for _, x in pairs], [plain.encode(plain.gravity(b)) for b, _ in pairs]
    predictions = {
        k: torch.from_numpy(rng.normal(size=(3, len(counts), queries, n)).astype(np.float32))
        for k, n in {**plain.SIZES, "cls_logits": classes}.items()
    }
    codes, logits = torch.cat([predictions[k] for k in plain.SIZES], -1), predictions["cls_logits"]
    out = {}
    for layer in range(3):
        cls, box, target = plain.layer_losses(logits[layer], codes[layer], labels, gt)
        positives = (target < classes).sum()
        row = dict(loss_cls=cls, loss_bbox=box, target_labels=target, num_pos=positives, num_neg=target.numel() - positives)
        out |= {f"layer{layer}/{k}": v for k, v in row.items()}
    cls, box, _ = plain.layer_losses(logits[0], codes[0], [x[:0] for x in labels], [x[:0] for x in gt])
    out |= {"no_gt/loss_cls": cls, "no_gt/loss_bbox": box}
    objects = {
        f"{b}/{name}": value
        for b, pair in enumerate(pairs)
        for name, value in zip(("gt_boxes9_bottom_center", "gt_labels"), pair)
    }
    plain.save(tmp_path / "loss.npz", **{"in": dict(objects, **{f"pred/{k}": v for k, v in predictions.items()})}, out=out)
    found = verdicts(tmp_path / "loss.npz")
    assert set(found.values()) == {"ok"} and len(found) == 17

    inputs, out = {}, {}
    for b, (boxes, _) in enumerate(pairs):
        cls, reg = plain.costs(logits[0, b], codes[0, b], labels[b], gt[b])
        assigned = plain.assign(cls + reg)
        inputs |= {
            f"{b}/pred10": codes[0, b], f"{b}/logits": logits[0, b], f"{b}/gt_boxes9_gravity_center": plain.gravity(boxes),
            f"{b}/gt_labels": labels[b]
        }
        out |= {f"{b}/cls_cost": cls, f"{b}/reg_cost": reg, f"{b}/cost": cls + reg, f"{b}/assigned_gt_inds": assigned,
                f"{b}/assigned_labels": torch.cat([torch.tensor([-1]), labels[b]])[assigned]}
    plain.save(tmp_path / "assigner_cost.npz", dict(code_weights=plain.WEIGHTS.tolist()), **{"in": inputs}, out=out)
    found = verdicts(tmp_path / "assigner_cost.npz")
    assert set(found.values()) == {"ok"} and len(found) == 5 * len(counts)


@pytest.mark.parametrize("velocity", [True, False])
def test_boxes_of_another_size(tmp_path, velocity):
    rng, layers, classes, queries = np.random.default_rng(7), 4, 3, 17
    sizes = {k: n for k, n in plain.SIZES.items() if velocity or k != "vel"}
    predictions = {
        k: torch.from_numpy(rng.normal(size=(layers, 3, queries, n)).astype(np.float32))
        for k, n in {**sizes, "cls_logits": classes}.items()
    }
    config, out = dict(max_num=25, post_center_range=[-1.0, -2.0, -1.5, 1.0, 2.0, 1.5], score_threshold=0.3, layer_used=1), {}
    for b in range(3):
        codes = torch.cat([predictions[k][1, b] for k in sizes], -1).double()
        ranked = sorted(((predictions["cls_logits"][1, b, q, c].double().sigmoid().item(), q, c) for q in range(queries)
                         for c in range(classes)), reverse=True)
        rows = []
        for score, q, c in ranked[:25]:
            x, y, dx, dy, z, dz, sin, cos, *vel = codes[q].tolist()
            if score >= 0.3 and abs(x) <= 1 and abs(y) <= 2 and abs(z) <= 1.5:
                rows.append(([x, y, z, math.exp(dx), math.exp(dy), math.exp(dz), math.atan2(sin, cos), *vel], score, c))
        boxes, scores, labels = zip(*rows)
        bottom = np.array(boxes)
        bottom[:, 2] -= bottom[:, 5] / 2
        out |= {
            f"{b}/boxes_gravity_center": boxes, f"{b}/boxes_bottom_center": bottom, f"{b}/scores": scores, f"{b}/labels": labels
        }
    plain.save(tmp_path / "coder.npz", config, **{"in": predictions}, out=out)
    found = verdicts(tmp_path / "coder.npz")
    assert set(found.values()) == {"ok"} and len(found) == 12

    boxes = torch.from_numpy(rng.uniform(0.1, 2, (13, 9 if velocity else 7)))
    n = boxes.shape[1]
    plain.save(tmp_path / "normalize_bbox.npz", **{"in": {f"boxes{n}": boxes}},
               out={f"encoded{n + 1}": plain.encode(boxes), f"decoded{n}": boxes})
    assert list(verdicts(tmp_path / "normalize_bbox.npz").values()) == ["ok", "ok"]


@pytest.mark.parametrize("layers, kernel, branches", [
    (2, 1, dict(center=2, height=1, cls_logits=7)), (5, 3, dict(rot=2, heatmap=3)), (1, 1, dict(cls_logits=1))])
def test_task_head_of_another_size(tmp_path, layers, kernel, branches):
    g, channels, hidden, state = torch.Generator().manual_seed(8), 6, 10, {}
    for name, n in branches.items():
        shapes = {"0.weight": (layers * hidden, channels, kernel), "1.weight": (layers * hidden,), "1.bias": (layers * hidden,),
                  "3.weight": (layers * n, hidden, kernel), "3.bias": (layers * n,)}
        state |= {f"{name}.{k}": torch.randn(shape, generator=g) for k, shape in shapes.items()}
    x = torch.randn(layers, 3, 9, channels, generator=g)
    double = {k: v.double() for k, v in state.items()}
    y = torch.randn(2, 20, 3, generator=g)
    norm = torch.cat([plain.layer_norm(part.double().transpose(1, 2), 1, 0, 1e-6).transpose(1, 2) for part in y.chunk(4, 1)], 1)
    plain.save(tmp_path / "t.npz", state=state, out={name: plain.branch(double, name, x.double(), layers) for name in branches},
               gln=dict(in_batch_channel_query=y, out_groups4_unit_affine=norm), **{"in": dict(x_layers_batch_query_channel=x)})
    found = verdicts(tmp_path / "t.npz")
    assert set(found.values()) == {"ok"} and len(found) == len(branches) + 1


@pytest.mark.parametrize("stage, blocks, convs", [(2, 1, 2), (4, 3, 4)])
def test_neck_and_osa_of_another_size(tmp_path, stage, blocks, convs):
    """The same modules in float64: their own tests hold them against loops."""
    g, channels = torch.Generator().manual_seed(9), (5, 7, 3)
    neck, osa = CPFPN(channels, 6), OSAStage(stage, 4, 5, 9, blocks, convs, dict(type="BN"))
    states = [plain.random_state(m, g) for m in (neck, osa)]
    inputs = [torch.randn(2, c, 13 >> i, 9 >> i, generator=g) for i, c in enumerate(channels)]
    x = torch.randn(1, 4, 11, 8, generator=g)
    for module, state in zip((neck, osa), states):
        module.load_state_dict(state)
        module.double().eval()
    maps = {f"in{i}": y for i, y in enumerate(inputs)} | {f"out{i}": y for i, y in enumerate(neck([y.double() for y in inputs]))}
    states[1] = {k: v for k, v in states[1].items() if "tracked" not in k}
    plain.save(tmp_path / "n.npz", neck=maps, osa={"in": x, "out": osa(x.double())},
               **{"neck/state": states[0], "osa/state": states[1]})
    found = verdicts(tmp_path / "n.npz")
    assert set(found.values()) == {"ok"} and len(found) == 4


def test_augmentation_of_another_size(tmp_path):
    """A crop without resizing has exact pixels; the mask is drawn stripe by stripe."""
    rng = np.random.default_rng(10)
    image = rng.integers(0, 256, (30, 50, 3), dtype=np.uint8)
    intrinsic, extrinsic = np.eye(4), np.linalg.qr(rng.normal(size=(4, 4)))[0]
    intrinsic[:2, :3] = [[40, 0, 25], [0, 41, 15]]
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, :50] = image[10:30]
    moved = intrinsic.copy()
    moved[0], moved[1, 2] = -intrinsic[0] + [0, 0, 60, 0], 5
    rows, columns = (
        np.array([any(k * 9 + s <= p + margin < k * 9 + s + 5 for k in range(int(1.5 * n) // 9)) for p in range(n)], np.uint8)
        for n, margin, s in ((17, 4, 8), (23, 5, 1)))
    groups = {
        "imgaug/in": dict(image_bgr=image, intrinsic=intrinsic, lidar2cam=extrinsic),
        "imgaug/z": dict(params_resize_newWH_cropx0y0x1y1_flip=np.array([1.0, 50, 30, 0, 10, 60, 30, 1]),
                         out_image=wide[:, ::-1].astype(np.float32), out_intrinsic=moved, out_lidar2img=moved @ extrinsic),
        "imgaug": dict(real_test_params_small=np.array([0.44, 704, 396, 0, 140, 704, 396])),
        "gridmask/7": dict(in_H_W_d_sh_sw=np.array([17, 23, 9, 8, 1]), out_keep=rows[:, None] | columns),
    }
    plain.save(tmp_path / "augment.npz", **groups)
    found = verdicts(tmp_path / "augment.npz")
    assert set(found.values()) == {"ok"} and len(found) == 5


def test_which_weights(made, tmp_path):
    """Several heads in one folder: a name's ending decides, else --weights."""
    source = made["folder"] / "head_eval.npz"
    plain.save(tmp_path / "posenc_b.npz",
               out=dict(bev_coords=plain.bev_coords(made["config"]["grid_size"], made["config"]["downsample_scale"])))
    for name in ("head_eval_b.npz", "head_eval_c.npz"):
        altered(source, tmp_path / name, lambda arrays: None)
    assert verdicts(tmp_path / "posenc_b.npz") == {"out/bev_coords": "ok"}
    (tmp_path / "posenc_b.npz").rename(tmp_path / "posenc_d.npz")
    rows, problems = check_file(tmp_path / "posenc_d.npz")
    assert rows[0]["verdict"] == "not checked" and "several: head_eval_b.npz, head_eval_c.npz" in problems[0]
    assert verdicts(tmp_path / "posenc_d.npz", weights=source) == {"out/bev_coords": "ok"}
