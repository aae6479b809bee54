"""Inspecting released, old, wrapped and foreign checkpoints, and starting AQR from them bit for bit."""
import copy
import json
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet3d", reason='needs the detector part: pip install "cmtaqr[detector]"')
import cmtaqr.configs  # noqa: E402
from cmtaqr import detector  # noqa: E402, F401
from cmtaqr.detector.checkpoint import UnknownLayout, is_aqr, load_checkpoint, main, read_checkpoint  # noqa: E402
from cmtaqr.detector.convert import build_model, convert_checkpoint, fit, inspect_checkpoint, module_table  # noqa: E402
from mmdet3d.registry import MODELS  # noqa: E402
from mmengine.config import Config  # noqa: E402

from test_detector import batch  # noqa: E402
from test_head import build_head, inputs_of, load, state_of  # noqa: E402

CONFIGS = Path(list(cmtaqr.configs.__path__)[0])
R50, R50_AQR = "cmt_voxel0100_r50_800x320_cbgs", "cmt_aqr_voxel0100_r50_800x320_cbgs"
TO_OLD = dict(spconv1=(1, 2, 3, 4, 0), native=(1, 2, 3, 0, 4))


def released_file(shared, name, folder):
    """A file with the keys and shapes of a released checkpoint (expanded scalars: small on disk)."""
    entries = json.loads((shared / "golden" / f"keys_{name}.json").read_text())["entries"]
    state = OrderedDict((key, torch.full((1,) * len(shape), index % 97, dtype=getattr(torch, dtype)).expand(shape))
                        for index, (key, (shape, dtype, _)) in enumerate(entries.items()))
    torch.save(dict(meta=dict(epoch=20), state_dict=state, optimizer={}), folder / f"{name}.pth")
    return folder / f"{name}.pth"


@pytest.mark.parametrize("name, config", [("r50", R50), ("vov", "cmt_voxel0075_vov_1600x640_cbgs"),
                                          ("lidar_only", "cmt_lidar_voxel0075_cbgs"),
                                          ("camera_only", "cmt_camera_vov_1600x640_cbgs")])
def test_released_checkpoints_are_recognised(shared, tmp_path, name, config):
    file = released_file(shared, name, tmp_path)
    report, usable = inspect_checkpoint(file)
    assert usable and f"It fits {config}." in report
    found = fit(read_checkpoint(file), config)
    assert found.share == 1 and len(found.keys) == len(read_checkpoint(file).state)
    assert found.layout == (None if name == "camera_only" else "spconv2")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folder with configs of a small CMT (`cmt.py`) and of AQR on it (`aqr.py`), and the CMT's weights (`cmt.pth`)."""
    folder = tmp_path_factory.mktemp("tiny")
    base = f"_base_ = [r'{CONFIGS / 'cmt_aqr_tiny.py'}']\n"
    (folder / "cmt.py").write_text(base + "model = dict(pts_bbox_head=dict(aqr=None))\n")
    (folder / "aqr.py").write_text(base + "model = dict(pts_bbox_head=dict(aqr=dict(initial_weight=0.0)))\n")
    torch.manual_seed(0)
    torch.save(dict(meta={}, state_dict=build_model(folder / "cmt.py").state_dict()), folder / "cmt.pth")
    return folder


def weights(folder):
    return read_checkpoint(folder / "cmt.pth").state


def save(folder, state, wrap="state_dict", metadata=None):
    state = OrderedDict(state)
    if metadata is not None:
        state._metadata = metadata
    torch.save(state if wrap is None else {wrap: state}, folder / "file.pth")
    return folder / "file.pth"


@pytest.mark.parametrize("wrap, parallel, layout", [
    (None, False, "spconv2"), ("model", True, "spconv2"), (None, True, "spconv1"), ("state_dict", False, "spconv1"),
    ("state_dict", True, "native"), ("model", False, "native")])
def test_every_form_of_a_file_starts_the_same_model(tiny, tmp_path, wrap, parallel, layout):
    whole = weights(tiny)
    state = {k: v.permute(TO_OLD[layout]) if v.ndim == 5 and layout in TO_OLD else v for k, v in whole.items()}
    file = save(tmp_path, {f"module.{k}" if parallel else k: v for k, v in state.items()}, wrap)
    found = fit(read_checkpoint(file), tiny / "aqr.py")
    assert found.usable and found.layout == layout and len(found.keys) == len(whole)
    convert_checkpoint(file, tmp_path / "start.pth", tiny / "aqr.py")
    started = read_checkpoint(tmp_path / "start.pth")
    assert all(torch.equal(started.state[k], v) for k, v in whole.items())
    assert set(started.versions.values()) >= {2} and started.meta["cmtaqr"]["layout"] == layout
    assert load_checkpoint(build_model(tiny / "aqr.py"), tmp_path / "start.pth") == []


@pytest.mark.parametrize("layout", ["spconv1", "native"])
def test_square_weights_follow_the_others_or_the_caller(tiny, tmp_path, layout):
    """A square weight is transposed only as the whole file is; without a weight that decides, nothing is assumed."""
    block = "pts_middle_encoder.encoder_layers.encoder_layer2.0.conv1.weight"
    model = build_model(R50)
    own = model.state_dict()
    assert own[block].shape[0] == own[block].shape[4] and own[block].std() > 0
    old = {k: v.permute(TO_OLD[layout]).clone() if v.ndim == 5 else v for k, v in own.items()}
    twin = build_model(R50)
    load_checkpoint(twin, save(tmp_path, old))
    assert torch.equal(twin.state_dict()[block], own[block])
    square = {k for k, v in own.items() if v.ndim == 5 and v.shape[0] == v.shape[4]}
    undecided = {k: v for k, v in old.items() if v.ndim != 5 or k in square}
    file = save(tmp_path, undecided)
    for action in (lambda: load_checkpoint(twin, file), lambda: convert_checkpoint(file, tmp_path / "out.pth", R50_AQR)):
        with pytest.raises(UnknownLayout, match=r"--layout spconv1\|native"):
            action()
    assert not (tmp_path / "out.pth").exists()
    report, usable = inspect_checkpoint(file, R50)
    assert not usable and "not known" in report and "--layout spconv1|native" in report
    assert fit(read_checkpoint(file), R50, layout=layout).layout == layout


def test_contradicting_layouts_are_refused(tiny, tmp_path):
    mixed = {k: v.permute(TO_OLD["spconv1"]) if v.ndim == 5 and "layer1" in k else v for k, v in weights(tiny).items()}
    with pytest.raises(UnknownLayout, match="several layouts.*spconv1.*"):
        convert_checkpoint(save(tmp_path, mixed), tmp_path / "out.pth", tiny / "aqr.py")
    old = {k: v.permute(TO_OLD["spconv1"]) if v.ndim == 5 else v for k, v in weights(tiny).items()}
    with pytest.raises(UnknownLayout, match="cannot be spconv2"):
        load_checkpoint(build_model(tiny / "cmt.py"), save(tmp_path, old), layout="spconv2")


def mome_keys(size=256, hidden=1024):
    """The weights that MoME has beyond CMT, random."""
    shapes = {"attentions.0.attn.in_proj_weight": (3 * size, size), "attentions.0.attn.in_proj_bias": (3 * size,),
              "attentions.0.attn.out_proj.weight": (size, size), "attentions.0.attn.out_proj.bias": (size,),
              "ffns.0.layers.0.0.weight": (hidden, size), "ffns.0.layers.0.0.bias": (hidden,),
              "ffns.0.layers.1.weight": (size, hidden), "ffns.0.layers.1.bias": (size,)}
    shapes |= {f"norms.{i}.{kind}": (size,) for i in (0, 1) for kind in ("weight", "bias")}
    shapes = {f"encoder.layers.0.{k}": v for k, v in shapes.items()}
    shapes |= {"selected_cls.weight": (3, size), "selected_cls.bias": (3,), "bev_type_embed": (size,), "rv_type_embed": (size,)}
    shapes |= {f"cam_embed.{i}.weight": (size, 16, 1) for i in (0, 3)}
    torch.manual_seed(1)
    return {f"pts_bbox_head.transformer.{k}": torch.randn(v) for k, v in shapes.items()}


def test_mome_checkpoint(shared, tmp_path):
    state = read_checkpoint(released_file(shared, "r50", tmp_path)).state
    extra = mome_keys()
    file = save(tmp_path, state | extra)
    report, usable = inspect_checkpoint(file, every_key=True)
    assert usable and all(key in report for key in extra) and report.count("left over: MoME's") == 5
    assert f"convert {file} --config {R50_AQR}" in report
    table = module_table(fit(read_checkpoint(file), R50_AQR))
    assert table["pts_bbox_head.transformer.encoder"] == [0, 0, 12, 0]
    assert table["pts_bbox_head.transformer.decoder"] == [110, 0, 0, 0]
    convert_checkpoint(file, tmp_path / "fresh.pth", R50_AQR)
    convert_checkpoint(file, tmp_path / "mome.pth", R50_AQR, router_from_mome=True)
    fresh, taken = (read_checkpoint(tmp_path / f"{name}.pth").state for name in ("fresh", "mome"))
    assert not set(fresh) & set(extra)
    router = {k.partition("aqr_router.")[2]: v for k, v in taken.items() if ".aqr_router." in k}
    packed = extra["pts_bbox_head.transformer.encoder.layers.0.attentions.0.attn.in_proj_weight"]
    assert torch.equal(torch.cat([router[f"{name}_proj.weight"] for name in "qkv"]), packed)
    assert torch.equal(router["ffn.3.weight"], extra["pts_bbox_head.transformer.encoder.layers.0.ffns.0.layers.1.weight"])
    assert torch.equal(router["type_embedding"][1], extra["pts_bbox_head.transformer.rv_type_embed"])
    assert not router["to_weights.weight"].any() and not router["to_weights.bias"].any()
    assert {k for k in taken if not torch.equal(taken[k], fresh[k])} == {
        k for k in taken if ".aqr_router." in k and ".to_weights." not in k}


def test_conversion_is_whole_seeded_and_says_where_it_comes_from(tiny, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.manual_seed(hash(name) % 1000)
        before = torch.random.get_rng_state()
        convert_checkpoint(tiny / "cmt.pth", tmp_path / f"{name}.pth", tiny / "aqr.py", seed=seed)
        assert torch.equal(before, torch.random.get_rng_state()), "the caller's random numbers changed"
    a, b, c = (read_checkpoint(tmp_path / f"{name}.pth") for name in "abc")
    assert all(torch.equal(v, b.state[k]) for k, v in a.state.items())
    assert {k for k, v in a.state.items() if not torch.equal(v, c.state[k])} <= {k for k in a.state if is_aqr(k)}
    assert not torch.equal(*(x.state["pts_bbox_head.aqr_router.q_proj.weight"] for x in (a, c)))
    origin = a.meta["cmtaqr"]
    assert origin["seed"] == 3 and origin["source"] == "cmt.pth" and origin["router"] == "fresh" and len(origin["sha256"]) == 64
    assert {"torch", "mmdet3d", "mmengine", "cmtaqr"} == set(origin["versions"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "b.pth", "c.pth"]


class Touch:
    """Creates a file when unpickled without restrictions."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def bad_files(folder, tiny):
    """Name of a bad input, its content, and what the message says."""
    yield "absent", None, "does not exist"
    yield "cut", (tiny / "cmt.pth").read_bytes()[:10000], "damaged"
    yield "text", b"<html>404</html>", "damaged"
    yield "pickle", dict(state_dict=Touch(folder / "ran")), "was not opened"
    yield "logs", dict(meta=dict(epoch=2)), "no weights"
    yield "foreign", torch.nn.Linear(3, 2).state_dict(), "does not fit"
    yield "partial", {k: v for k, v in weights(tiny).items() if "img_neck" not in k}, "missing from the file: img_neck"


def test_bad_files_end_with_status_1_and_a_message(tiny, tmp_path, capsys):
    for name, content, message in bad_files(tmp_path, tiny):
        file = tmp_path / f"{name}.pth"
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif content is not None:
            torch.save(content, file)
        assert main(["convert", str(file), "--config", str(tiny / "aqr.py"), "--out", str(tmp_path / "out.pth")]) == 1, name
        error = capsys.readouterr().err
        assert message in error and file.name in error, name
        assert main(["inspect", str(file), "--config", str(tiny / "aqr.py")]) == 1, name
    assert not (tmp_path / "ran").exists() and not list(tmp_path.glob("*out*"))


def test_an_output_is_replaced_only_by_force(tiny, tmp_path, capsys):
    out = tmp_path / "out.pth"
    out.write_text("mine")
    arguments = ["convert", str(tiny / "cmt.pth"), "--config", str(tiny / "aqr.py"), "--out", str(out)]
    assert main(arguments) == 1 and out.read_text() == "mine" and "--force" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0 and len(read_checkpoint(out).state) > len(weights(tiny))
    assert main(["convert", str(out), "--config", str(tiny / "aqr.py"), "--out", str(tmp_path / "again.pth")]) == 1
    assert "has AQR weights already" in capsys.readouterr().err
    assert main([*arguments[:4], "--out", str(tiny / "cmt.pth"), "--force"]) == 1 and "is the input" in capsys.readouterr().err
    assert main(["convert", str(tiny / "cmt.pth"), "--config", str(tiny / "cmt.py"), "--out", str(tmp_path / "x.pth")]) == 1
    assert "has no AQR" in capsys.readouterr().err


def test_command_line(tiny, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert {"inspect", "convert"} <= set(capsys.readouterr().out.split())
    call = [sys.executable, "-m", "cmtaqr.detector.checkpoint"]
    call += ["inspect", str(tiny / "cmt.pth"), "--config", str(tiny / "cmt.py")]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0 and "pts_middle_encoder" in done.stdout and "It fits" in done.stdout, done.stderr


def identical(cmt, aqr):
    """Both results, bit for bit, with every AQR weight zero."""
    for a, b in zip(cmt, aqr):
        assert len(a.scores_3d) > 0 and not b.aqr_weights.any()
        assert torch.equal(a.bboxes_3d.tensor, b.bboxes_3d.tensor)
        assert torch.equal(a.scores_3d, b.scores_3d) and torch.equal(a.labels_3d, b.labels_3d)


def test_golden_head_with_aqr_gives_the_same_bits(shared):
    golden = load(shared, "head_eval.npz")
    aqr = dict(router=dict(type="AQRWeightGenerator"), bias=dict(type="AttentionBiasGenerator", window_size=8))
    heads = [build_head(golden["config_json"]).eval(), build_head(golden["config_json"], aqr=aqr).eval()]
    results = []
    for head in heads:
        missing = head.load_state_dict(state_of(golden), strict=False).missing_keys
        assert all(map(is_aqr, missing))
        pts, img, metas = inputs_of(golden)
        with torch.no_grad():
            out = head(pts, img, metas)
        results.append(out["tasks"][0])
        results.append(head.predict_by_feat(out, metas))
    assert all(torch.equal(results[0][k], results[2][k]) for k in results[0])
    identical(results[1], results[3])


def test_reduced_r50_with_aqr_gives_the_same_bits(tmp_path):
    """The r50 config on a ninth of the area and small images: CMT saved, converted, loaded; detections compared."""
    change = """
_base_ = [r'{base}']
point_cloud_range, grid, shape = [-19.2, -19.2, -5.0, 19.2, 19.2, 3.0], [384, 384, 40], [41, 384, 384]
model = dict(
    img_backbone=dict(init_cfg=None),
    pts_voxel_encoder=dict(point_cloud_range=point_cloud_range, sparse_shape=shape), pts_middle_encoder=dict(sparse_shape=shape),
    pts_bbox_head=dict(point_cloud_range=point_cloud_range, grid_size=grid, num_query=200))
"""
    for name, base in (("cmt", R50), ("aqr", R50_AQR)):
        (tmp_path / f"{name}.py").write_text(change.format(base=CONFIGS / f"{base}.py"))
    torch.manual_seed(0)
    cmt = build_model(tmp_path / "cmt.py").eval()
    for norm in (m for m in cmt.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)):
        torch.nn.init.uniform_(norm.running_var, 0.5, 1.5)
    torch.save(dict(state_dict=cmt.state_dict()), tmp_path / "cmt.pth")
    convert_checkpoint(tmp_path / "cmt.pth", tmp_path / "start.pth", tmp_path / "aqr.py")
    aqr = MODELS.build(copy.deepcopy(Config.fromfile(tmp_path / "aqr.py").model)).eval()
    assert load_checkpoint(aqr, tmp_path / "start.pth") == []
    with torch.no_grad():
        results = [[s.pred_instances_3d for s in model.predict(*batch(size=(96, 256)))] for model in (cmt, aqr)]
    identical(*results)
