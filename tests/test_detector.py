"""The whole detector on random input: state-dict names, every degenerate batch, AQR as an addition that starts from nothing."""
import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet3d")

from mmengine.config import Config  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402
from mmengine.structures import InstanceData  # noqa: E402

import cmtaqr  # noqa: E402
import cmtaqr.detector  # noqa: E402, F401
from cmtaqr.detector.detector import grid_mask  # noqa: E402
from mmdet3d.registry import MODELS  # noqa: E402
from mmdet3d.structures import Det3DDataSample, LiDARInstance3DBoxes  # noqa: E402

CONFIGS = Path(cmtaqr.__file__).parent / "configs"
RIG = np.deg2rad([0, -55, 55, 180, -110, 110])


def model_config(name="cmt_aqr_tiny"):
    init_default_scope("mmdet3d")
    return Config.fromfile(str(CONFIGS / f"{name}.py")).model


def build(cfg, seed=0):
    torch.manual_seed(seed)
    return MODELS.build(copy.deepcopy(cfg))


def lidar2img(yaw, size, focal=250.0):
    """Matrix of a camera at the origin that looks along yaw."""
    axes = np.array([[np.sin(yaw), -np.cos(yaw), 0], [0, 0, -1], [np.cos(yaw), np.sin(yaw), 0]])
    matrix = np.eye(4)
    matrix[:3, :3] = np.array([[focal, 0, size[1] / 2], [0, focal, size[0] / 2], [0, 0, 1]]) @ axes
    return matrix


def cloud(count, seed=0):
    """Points on a disc of 38 m."""
    random = torch.Generator().manual_seed(seed)
    r, angle, z, intensity, time = torch.rand(5, count, generator=random)
    r, angle = 2 + 36 * r, 2 * np.pi * angle
    return torch.stack([r * angle.cos(), r * angle.sin(), 3 * z - 2, 255 * intensity, 0.1 * time], 1)


def sample(boxes, size=(128, 320)):
    """Data sample with `boxes` random objects."""
    span, low = torch.tensor([60, 60, 1, 4, 2, 2, 6, 2, 2]), torch.tensor([-30, -30, -2, 0.5, 0.5, 0.5, 0, 0, 0])
    tensor = torch.rand(boxes, 9) * span + low
    instances = InstanceData(bboxes_3d=LiDARInstance3DBoxes(tensor, box_dim=9), labels_3d=torch.randint(0, 10, (boxes,)))
    meta = dict(lidar2img=np.stack([lidar2img(yaw, size) for yaw in RIG]), box_type_3d=LiDARInstance3DBoxes)
    return Det3DDataSample(metainfo=meta, gt_instances_3d=instances)


def batch(points=(3000, 2000), boxes=(5, 3), size=(128, 320)):
    """Inputs as the data preprocessor hands them over, and samples."""
    torch.manual_seed(3)
    inputs = dict(points=[cloud(n, i) for i, n in enumerate(points)], imgs=torch.randn(len(points), len(RIG), 3, *size))
    return inputs, [sample(n, size) for n in boxes]


def finite_step(model, inputs, samples):
    """Losses of a training step; every loss and gradient is finite."""
    model.zero_grad()
    losses = model.loss(inputs, samples)
    sum(losses.values()).backward()
    assert all(v.isfinite() for v in losses.values()), losses
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    return losses


@pytest.fixture(scope="module")
def tiny():
    return build(model_config())


@pytest.mark.parametrize("name", ["cmt_voxel0100_r50_800x320_cbgs", "cmt_aqr_voxel0100_r50_800x320_cbgs"])
def test_state_dict_is_that_of_released_checkpoints(shared, name):
    reference = json.loads((shared / "golden" / "keys_r50.json").read_text())
    model = build(model_config(name))
    state = {k: v for k, v in model.state_dict().items() if ".aqr_" not in k}
    assert set(state) == set(reference["entries"])
    for key, (shape, dtype, kind) in reference["entries"].items():
        assert list(state[key].shape) == shape and str(state[key].dtype) == f"torch.{dtype}", key
    parameters = {k: p for k, p in model.named_parameters() if ".aqr_" not in k}
    assert {k for k, e in reference["entries"].items() if e[2] == "parameter"} == set(parameters)
    assert sum(p.numel() for p in parameters.values()) == reference["num_parameters"]
    own = {k for k in model.state_dict() if ".aqr_" in k}
    assert bool(own) == ("aqr" in name)
    assert all(k.startswith("pts_bbox_head.aqr_router.") or k == "pts_bbox_head.aqr_bias.bias_scale" for k in own)


def test_every_parameter_of_tiny_learns(tiny):
    tiny.train()
    torch.nn.init.normal_(tiny.pts_bbox_head.aqr_router.to_weights.weight, std=0.1)
    losses = finite_step(tiny, *batch())
    layers = len(tiny.pts_bbox_head.transformer.decoder.layers)
    assert len(losses) == 4 * layers and "d0.dn_loss_bbox" in losses
    assert not [k for k, p in tiny.named_parameters() if p.grad is None]
    assert tiny.pts_bbox_head.aqr_bias.bias_scale.grad != 0


@pytest.mark.parametrize("points, boxes", [
    pytest.param((0, 2000), (4, 2), id="one empty cloud"),
    pytest.param((0, 0), (3, 1), id="no points at all"),
    pytest.param((2000, 2000), (0, 3), id="one frame without boxes"),
    pytest.param((2000, 2000), (0, 0), id="no boxes at all"),
    pytest.param((0, 0), (0, 0), id="nothing"),
])
def test_degenerate_batches_train(tiny, points, boxes):
    losses = finite_step(tiny.train(), *batch(points, boxes))
    assert "dn_loss_cls" in losses
    if not any(boxes):
        assert losses["loss_bbox"] == 0 and losses["dn_loss_bbox"] == 0 and losses["loss_cls"] > 0


@pytest.mark.parametrize("missing", ["imgs", "points"])
@pytest.mark.parametrize("how", ["none", "absent"])
def test_a_missing_sensor_trains_and_predicts(tiny, missing, how):
    inputs, samples = batch()
    inputs = {k: v for k, v in inputs.items() if k != missing} if how == "absent" else {**inputs, missing: None}
    finite_step(tiny.train(), inputs, samples)
    with torch.no_grad():
        results = tiny.eval().predict(inputs, samples)
    assert all(len(r.pred_instances_3d) > 0 for r in results)


def test_no_sensor_is_an_error(tiny):
    with pytest.raises(ValueError, match="no sensor left"):
        tiny.loss(dict(points=None, imgs=None), [sample(1)])
    with pytest.raises(ValueError, match="imgs must be"):
        tiny.loss(dict(imgs=torch.zeros(6, 3, 128, 320)), [sample(1)])


def test_predictions(tiny):
    inputs, samples = batch()
    with torch.no_grad():
        first, second = tiny.eval().predict(inputs, samples), tiny.predict(*batch())
    for result, again in zip(first, second):
        found = result.pred_instances_3d
        assert 0 < len(found) <= tiny.pts_bbox_head.max_num and found.aqr_weights.shape == (len(found), 2)
        assert found.bboxes_3d.tensor.shape == (len(found), 9) and (found.bboxes_3d.dims > 0).all()
        assert torch.equal(found.scores_3d, again.pred_instances_3d.scores_3d)
        assert result.metainfo["batch_input_shape"] == (128, 320)


def test_samples_of_a_batch_do_not_touch_each_other(tiny):
    """In evaluation a frame's result does not depend on its neighbour, an empty cloud among them."""
    inputs, samples = batch(points=(3000, 0))
    with torch.no_grad():
        both = tiny.eval()(inputs, samples, mode="tensor")["tasks"][0]["cls_logits"]
        for b in range(2):
            alone = dict(points=inputs["points"][b : b + 1], imgs=inputs["imgs"][b : b + 1])
            single = tiny(alone, samples[b : b + 1], mode="tensor")["tasks"][0]["cls_logits"]
            torch.testing.assert_close(both[:, b], single[:, 0], atol=2e-4, rtol=1e-4)


def test_aqr_with_cmt_weights_is_cmt():
    """Bit for bit, when both run the same attention kernel."""
    cfg = model_config()
    cfg.pts_bbox_head.transformer.decoder.layer.cross_attn = dict(backend="reference")
    cfg.pts_bbox_head.aqr.pop("initial_weight")
    plain = copy.deepcopy(cfg)
    plain.pts_bbox_head.pop("aqr")
    cmt, aqr = build(plain).eval(), build(cfg, seed=1).eval()
    left = aqr.load_state_dict(cmt.state_dict(), strict=False)
    assert not left.unexpected_keys and all(".aqr_" in k for k in left.missing_keys)
    inputs, samples = batch()
    with torch.no_grad():
        a, b = (model(inputs, samples, mode="tensor")["tasks"][0] for model in (cmt, aqr))
        assert all(torch.equal(a[k], b[k]) for k in a)
        boxes = [model.predict(inputs, samples)[0].pred_instances_3d.bboxes_3d.tensor for model in (cmt, aqr)]
    assert torch.equal(*boxes)


def test_first_weight_of_training_from_scratch():
    """A configured first weight survives mmengine's initialisation."""
    cfg = model_config()
    model = build(cfg)
    model.init_weights()
    with torch.no_grad():
        weights = model.eval()(*batch(), mode="tensor")["aqr"]["weights"]
    assert torch.allclose(weights, torch.full_like(weights, cfg.pts_bbox_head.aqr.initial_weight))


def test_single_sensor_forms():
    cfg = model_config()
    lidar, camera = copy.deepcopy(cfg), copy.deepcopy(cfg)
    for part in ("img_backbone", "img_neck"):
        lidar.pop(part)
    lidar.pts_bbox_head.update(use_camera=False, final_kernel=3)
    for part in ("pts_voxel_encoder", "pts_middle_encoder", "pts_backbone", "pts_neck"):
        camera.pop(part)
    camera.pts_bbox_head.update(in_channels=None)
    inputs, samples = batch()
    for form in (lidar, camera):
        model = build(form).train()
        finite_step(model, inputs, samples)
        with torch.no_grad():
            assert len(model.eval().predict(inputs, samples)[0].pred_instances_3d) > 0


def test_data_preprocessor_normalises_bgr(tiny):
    raw = [torch.full((2, 3, 64, 96), 128.0), torch.full((2, 3, 64, 96), 0.0)]
    samples = [Det3DDataSample(), Det3DDataSample()]
    data = tiny.data_preprocessor(dict(inputs=dict(points=[cloud(10), cloud(5)], img=raw), data_samples=samples), False)
    imgs = data["inputs"]["imgs"]
    assert imgs.shape == (2, 2, 3, 64, 96) and data["data_samples"][0].metainfo["batch_input_shape"] == (64, 96)
    expected = (128 - torch.tensor([103.530, 116.280, 123.675])) / torch.tensor([57.375, 57.120, 58.395])
    assert torch.allclose(imgs[0, 0, :, 3, 5], expected) and imgs[1].max() < 0


@pytest.mark.parametrize("case", range(3))
def test_grid_mask(shared, case):
    with np.load(shared / "golden" / "augment.npz") as golden:
        height, width, period, row, col = golden[f"gridmask/{case}/in_H_W_d_sh_sw"].tolist()
        assert (grid_mask(height, width, period, row, col).numpy() == golden[f"gridmask/{case}/out_keep"].astype(bool)).all()


def test_grid_mask_in_training_alone():
    cfg = model_config()
    cfg.grid_mask_prob = 1.0
    model, seen = build(cfg), []
    model.img_backbone.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    imgs = torch.ones(1, 6, 3, 128, 320)
    model.train().extract_img_feat(imgs)
    model.eval().extract_img_feat(imgs)
    assert set(seen[0].unique().tolist()) == {0.0, 1.0} and torch.equal(seen[0][0, 0], seen[0][5, 2])
    assert (seen[1] == 1).all()
