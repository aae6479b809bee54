"""Every config: names, shapes and counts of the released models, the recipe, and a step that reaches every parameter."""
import copy
import json
import math
import re

import pytest
import torch

pytest.importorskip("mmdet3d")

import cmtaqr.detector  # noqa: E402, F401
from cmtaqr.engine.configure import load_config, stretched  # noqa: E402
from cmtaqr.engine.parameters import config_names  # noqa: E402
from cmtaqr.engine.runner import model_size  # noqa: E402
from mmdet3d.registry import MODELS  # noqa: E402
from mmengine.optim import build_optim_wrapper  # noqa: E402
from mmengine.registry import PARAM_SCHEDULERS  # noqa: E402
from test_detector import batch, finite_step  # noqa: E402

R50, VOV = "cmt_voxel0100_r50_800x320_cbgs", "cmt_voxel0075_vov_1600x640_cbgs"
LIDAR, CAMERA = "cmt_lidar_voxel0075_cbgs", "cmt_camera_vov_1600x640_cbgs"
AQR_R50, AQR_VOV = "cmt_aqr_voxel0100_r50_800x320_cbgs", "cmt_aqr_voxel0075_vov_1600x640_cbgs"
RELEASED = {R50: ("r50", 40.92), VOV: ("vov", 86.61), LIDAR: ("lidar_only", 16.77), CAMERA: ("camera_only", 78.16)}
ALL = [*RELEASED, AQR_R50, AQR_VOV]
POINT_PARTS = {"pts_voxel_encoder", "pts_middle_encoder", "pts_backbone", "pts_neck"}
IMAGE_PARTS = {"img_backbone", "img_neck"}


def build(cfg):
    torch.manual_seed(0)
    return MODELS.build(copy.deepcopy(cfg))


@pytest.fixture(scope="module")
def models():
    """Configs and their models without memory for their weights, each built once."""
    built = {}

    def get(name):
        if name not in built:
            cfg = load_config(name)
            with torch.device("meta"):
                built[name] = cfg, build(cfg.model)
        return built[name]
    return get


def test_the_configs_are_all_there():
    assert set(config_names()) == {*ALL, "cmt_aqr_tiny"}


# Models


@pytest.mark.parametrize("name", RELEASED)
def test_state_dict_is_that_of_the_release(shared, models, name):
    reference = json.loads((shared / "golden" / f"keys_{RELEASED[name][0]}.json").read_text())
    assert reference["config"] == name
    model = models(name)[1]
    kinds = {k: "parameter" for k, _ in model.named_parameters()} | {k: "buffer" for k, _ in model.named_buffers()}
    found = {key: [list(t.shape), str(t.dtype).removeprefix("torch."), kinds[key]] for key, t in model.state_dict().items()}
    assert found == reference["entries"]
    assert sum(p.numel() for p in model.parameters()) == reference["num_parameters"]


@pytest.mark.parametrize("name", RELEASED)
def test_parameter_counts(models, name):
    rows = {row["part"]: row for row in model_size(models(name)[1])}
    total = rows.pop("total")
    assert round(total["parameters"] / 1e6, 2) == RELEASED[name][1] and total["trainable"] == total["parameters"]
    assert sum(row["parameters"] for row in rows.values()) == total["parameters"]


@pytest.mark.parametrize("name, plain", [(AQR_R50, R50), (AQR_VOV, VOV)])
def test_aqr_adds_its_own_parameters_alone(models, name, plain):
    ours, theirs = ({k: v.shape for k, v in models(n)[1].state_dict().items()} for n in (name, plain))
    added = {k: ours.pop(k) for k in ours.keys() - theirs.keys()}
    assert ours == theirs
    assert added and all(re.match(r"pts_bbox_head\.aqr_(router\.|bias\.bias_scale$)", k) for k in added)
    projections, ffn, norms, types, last = 4 * (256**2 + 256), 2 * 256 * 1024 + 1024 + 256, 4 * 256, 2 * 256, 2 * 256 + 2
    assert sum(s.numel() for s in added.values()) == projections + ffn + norms + types + last + 1  # the scale


@pytest.mark.parametrize("name", ALL)
def test_form(models, name):
    cfg, model = models(name)
    head = model.pts_bbox_head
    parts = {n for n, _ in model.named_children()} - {"data_preprocessor", "pts_bbox_head"}
    assert parts == (IMAGE_PARTS if name == CAMERA else POINT_PARTS if name == LIDAR else IMAGE_PARTS | POINT_PARTS)
    assert model.grid_mask_prob == (0.0 if name in (CAMERA, LIDAR) else 0.7)
    assert (hasattr(head, "shared_conv"), hasattr(head, "rv_embedding")) == (name != CAMERA, name != LIDAR)
    assert head.task_heads[0].center[0].kernel_size == ((3,) if name == LIDAR else (1,))
    if name != CAMERA:
        cells = 1024 if "r50" in name else 1440
        assert tuple(head.grid_size) == (cells, cells, 40) and model.pts_voxel_encoder.sparse_shape == (41, cells, cells)
        assert list(model.pts_middle_encoder.sparse_shape) == [41, cells, cells]
        assert model.pts_voxel_encoder.voxel_size[:2] == (0.1, 0.1) if "r50" in name else (0.075, 0.075)
    assert tuple(cfg.input_size) == ((320, 800) if "r50" in name else (640, 1600))
    if name in (AQR_R50, AQR_VOV):
        camera = 8 if name == AQR_R50 else 15
        assert tuple(head.aqr_router.window_sizes) == (camera, 5) and tuple(head.aqr_bias.window_sizes) == (camera, camera)
        assert cfg.model.pts_bbox_head.aqr.bias.gaussian_sigma == (1.0 if name == AQR_R50 else 2.5)


@pytest.mark.parametrize("name", [R50, VOV])
def test_image_backbone_stays_in_eval_mode(models, name):
    """Running statistics never move; scale and shift of the normalisation learn."""
    backbone = models(name)[1].train().img_backbone
    norms = [m for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert backbone.training and norms and not any(m.training for m in norms)
    assert all(m.weight.requires_grad and m.eps == 1e-5 for m in norms)


# Recipe


@pytest.mark.parametrize("name", RELEASED)
def test_optimiser(models, name):
    cfg, model = models(name)
    lr = 1.4e-4 if "r50" in name else 1e-4
    assert (cfg.batch_size, cfg.auto_scale_lr.base_batch_size) == ((4, 32) if "r50" in name else (2, 16))
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    assert isinstance(wrapper.optimizer, torch.optim.AdamW) and wrapper.clip_grad_kwargs == dict(max_norm=35, norm_type=2)
    settings = {id(p): (g["lr"], g["weight_decay"]) for g in wrapper.optimizer.param_groups for p in g["params"]}
    for key, parameter in model.named_parameters():
        factor, decay = ((0.01, 0.05) if key.startswith("img_backbone.") else (0.1, 0.01) if key.startswith("img_neck.")
                         else (1.0, 0.01))
        assert settings[id(parameter)] == pytest.approx((factor * lr, decay), rel=1e-12), key
    assert wrapper.optimizer.defaults["betas"] == (0.9, 0.999)


def half_cosine(a, b, t):
    return b + 0.5 * (a - b) * (1 + math.cos(math.pi * t))


@pytest.mark.parametrize("name", ALL)
def test_learning_rate_and_beta1_over_the_run(name):
    """The curves of all iterations against the formula, in each parameter group."""
    cfg, iterations = load_config(name), 2000
    peak = 8 if "vov" in name else 6
    model = torch.nn.ModuleDict({n: torch.nn.Linear(1, 1) for n in ("img_backbone", "img_neck", "head")})
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    schedulers = stretched(cfg.param_scheduler, cfg.train_cfg.max_epochs, iterations)
    schedulers = [PARAM_SCHEDULERS.build(dict(s, optimizer=wrapper)) for s in schedulers]
    assert cfg.train_cfg.max_epochs == 20
    base, worst = cfg.optim_wrapper.optimizer.lr, 0.0
    factors = {"img_backbone": 0.01, "img_neck": 0.05 if name in (AQR_R50, AQR_VOV) else 0.1, "head": 1.0}
    up = 0.4 * iterations
    for i in range(iterations):
        if i < up:
            lr, beta1 = half_cosine(1, peak, i / up), half_cosine(0.9, 0.9 * 0.85 / 0.95, i / up)
        else:
            t = (i - up) / (iterations - up)
            lr, beta1 = half_cosine(peak, 1e-4, t), half_cosine(0.9 * 0.85 / 0.95, 0.9, t)
        for group in wrapper.optimizer.param_groups:
            key = next(k for k, m in model.items() if any(p is group["params"][0] for p in m.parameters()))
            want = base * lr * factors[key]
            worst = max(worst, abs(group["lr"] / want - 1), abs(group["betas"][0] / beta1 - 1))
            assert group["betas"][1] == 0.999
        for scheduler in schedulers:
            scheduler.step()
    print(f"{name}: largest relative difference {worst:.1e}")
    assert worst < 1e-6


@pytest.mark.parametrize("name", ALL)
def test_data_recipe(name):
    cfg = load_config(name)
    mask = 0.0 if name in (CAMERA, LIDAR) else 0.25
    scene = (dict(rotation=(-0.3925, 0.3925), scale=(0.95, 1.05), translation=0.0, flip_scene=0.0) if name == CAMERA
             else dict(rotation=(-0.785, 0.785), scale=(0.9, 1.1), translation=0.5, flip_scene=0.5))
    recipe = dict(resize=(0.94, 1.25), flip_image=0.5, drop_image=mask, drop_lidar=mask, **scene)
    assert {k: cfg.augmentation[k] for k in recipe} == recipe
    assert cfg.sensors == {LIDAR: ["lidar"], CAMERA: ["camera"]}.get(name, ["lidar", "camera"])
    assert cfg.cbgs and cfg.sweeps_num == 10 and cfg.paste == (None if name == CAMERA else {})
    assert cfg.train_dataloader.batch_size == cfg.batch_size
    steps = [step["type"] for step in cfg.train_dataloader.dataset.dataset.pipeline]
    loads = {"LoadLidarPoints": name != CAMERA, "LoadCameraImages": name != LIDAR, "PasteObjects": name != CAMERA,
             "ModalityMask": name not in (CAMERA, LIDAR)}
    assert {step: step in steps for step in loads} == loads


# Steps


def small(name):
    """The config's model on coarse voxels and with few queries, everything else as it is."""
    cfg = load_config(name).model
    grid = dict(voxel_size=[0.28125, 0.28125, 0.2], grid_size=[384, 384, 40])
    cfg.pts_bbox_head.update(num_query=60, max_num=60, **grid)
    if cfg.get("pts_voxel_encoder"):
        cfg.pts_voxel_encoder.update(voxel_size=grid["voxel_size"], sparse_shape=[41, 384, 384])
        cfg.pts_middle_encoder.update(sparse_shape=[41, 384, 384])
    return cfg


def inputs_for(name, **sizes):
    """Random batch with the sensors of a config."""
    inputs, samples = batch(**sizes)
    missing = {LIDAR: "imgs", CAMERA: "points"}.get(name)
    return {k: v for k, v in inputs.items() if k != missing}, samples


@pytest.mark.parametrize("name", ALL)
def test_a_step_on_the_cpu_reaches_every_parameter(name):
    model = build(small(name)).train()
    if model.pts_bbox_head.with_aqr:  # the released start, zero, stops what lies behind the router's last layer
        torch.nn.init.normal_(model.pts_bbox_head.aqr_router.to_weights.weight, std=0.1)
    inputs, samples = inputs_for(name, points=(600,), boxes=(4,), size=(32, 96))
    losses = finite_step(model, inputs, samples)
    assert len(losses) == 4 * 6 and all(v > 0 for v in losses.values())
    assert not [k for k, p in model.named_parameters() if p.grad is None]
    # Queries start without content, so the first self-attention has nothing to weigh yet.
    first = "pts_bbox_head.transformer.decoder.layers.0."
    silent = {first + k for k in ("attentions.0.attn.in_proj_weight", "attentions.0.attn.out_proj.weight", "norms.0.weight")}
    assert {k for k, p in model.named_parameters() if not p.grad.any()} == silent
    with torch.no_grad():
        found = model.eval().predict(inputs, samples)[0].pred_instances_3d
    assert 0 < len(found) <= 60 and found.bboxes_3d.tensor.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ALL)
def test_a_step_at_full_size_on_the_gpu(cuda, record_property, name):
    """The config's own batch size, random input with more points than the voxeliser keeps."""
    cfg = load_config(name)
    model = build(cfg.model).to(cuda).train()
    count = cfg.batch_size
    inputs, samples = inputs_for(name, points=(250000,) * count, boxes=(40,) * count, size=tuple(cfg.input_size))
    inputs = {k: v.to(cuda) if k == "imgs" else [p.to(cuda) for p in v] for k, v in inputs.items()}
    torch.cuda.reset_peak_memory_stats()
    losses = finite_step(model, inputs, samples)
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(f"{name}: batch {count}, peak memory of forward and backward {peak:.2f} GiB")
    record_property("peak_memory_gib", round(peak, 2))
    assert len(losses) == 4 * 6
    assert not [k for k, p in model.named_parameters() if p.grad is None]
    assert peak * 2**30 > sum(p.numel() * 8 for p in model.parameters())
