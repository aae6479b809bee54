"""The scale of the bias: bounds and modes, training to a known optimum in every precision and in two processes, bad input."""
import copy
import math

import pytest
import torch
from torch import nn

from cmtaqr.attention import biased_attention
from cmtaqr.bias import PRESETS, AttentionBiasGenerator
from cmtaqr.geometry import TokenLayout, Windows
from cmtaqr.scale import BoundedScale, inward_clamp, smooth_bound, smooth_start

LAYOUT = TokenLayout(lidar=(8, 8), camera=(1, 4, 4))
WEIGHT, INSIDE = 0.8, 9  # of 80 equal keys, in a window of 3 x 3 on the BEV map
CONFIG = "cmt_aqr_voxel0100_r50_800x320_cbgs"


def windows(batch=1, queries=4, device="cpu"):
    seen = torch.tensor([True, False], device=device).expand(batch, queries, 2)
    return Windows(LAYOUT, torch.full((batch, queries, 2, 2), 2, device=device), seen, (3, 3))


def wanted_mass(scale):
    """Attention that a window of `INSIDE` equal keys gets under a scale."""
    grown = INSIDE * math.exp(WEIGHT * scale)
    return grown / (grown + LAYOUT.num_keys - INSIDE)


def optimum(masses):
    """The scale at which the cross-entropy to wanted masses is least: the attention is then their mean."""
    mean, before = sum(masses) / len(masses), INSIDE / LAYOUT.num_keys
    return (math.log(mean / (1 - mean)) - math.log(before / (1 - before))) / WEIGHT


class Detector(nn.Module):
    """The names that the recipe's groups look at, around attention to equal keys."""

    def __init__(self, masses, **scale):
        super().__init__()
        self.pts_bbox_head = nn.Module()
        self.pts_bbox_head.transformer = nn.Linear(1, 1)
        self.pts_bbox_head.aqr_bias = AttentionBiasGenerator(window_size=3, **scale)
        self.masses = masses

    def forward(self):
        count, device = len(self.masses), self.pts_bbox_head.aqr_bias.bias_scale.device
        where, weights = windows(1, count, device), torch.tensor([WEIGHT, 0.0], device=device).expand(1, count, 2)
        biases = self.pts_bbox_head.aqr_bias(weights, where)
        q, k = (torch.zeros(1, 1, n, 16, device=device) for n in (count, LAYOUT.num_keys))
        inside = where.mask()[0, :1, :, None].float().expand(1, -1, 16)[None]
        wanted, losses = torch.tensor(self.masses, device=device), []
        for bias in biases if isinstance(biases, list) else [biases]:
            held = biased_attention(q, k, inside, bias)[0, 0, :, 0].float()
            losses.append(-(wanted * held.log() + (1 - wanted) * (1 - held).log()).mean())
        return sum(losses) + 0 * self.pts_bbox_head.transformer(torch.zeros(1, device=device)).sum()


def recipe(precision, device="cpu", lr=0.2):
    pytest.importorskip("mmengine")
    import cmtaqr.engine  # noqa: F401
    from cmtaqr.engine.configure import load_config
    from cmtaqr.engine.runner import MixedPrecisionWrapper  # noqa: F401
    cfg = copy.deepcopy(load_config(CONFIG).optim_wrapper)
    cfg.optimizer.lr = lr
    if precision != "fp32":
        loss_scale = "dynamic" if precision == "fp16" else 1.0
        cfg.update(type="MixedPrecisionWrapper", device=device, precision=precision, loss_scale=loss_scale)
    return cfg


def train(model, precision="fp32", steps=200):
    """Train with the groups of the shipped recipe; the last scale."""
    from mmengine.optim import build_optim_wrapper
    generator = next(m for m in model.modules() if isinstance(m, AttentionBiasGenerator))
    wrapper = build_optim_wrapper(model, recipe(precision, generator.bias_scale.device.type))
    own, = (g for g in wrapper.optimizer.param_groups if any(p is generator.bias_scale for p in g["params"]))
    assert own["lr"] == pytest.approx(0.5 * 0.2) and own["weight_decay"] == 0
    for step in range(steps):
        own["lr"] = 0.1 * (0.505 + 0.495 * math.cos(math.pi * step / steps))
        with wrapper.optim_context(model):
            loss = model()
        wrapper.update_params(loss)
    return generator.scale().detach()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("mode", ["inward", "smooth"])
@pytest.mark.parametrize("start", [0.1, 6.0, *PRESETS])
def test_follows_the_optimum(mode, start, precision):
    preset = start if isinstance(start, str) else "conservative"
    model = Detector([wanted_mass(1.7), wanted_mass(2.8)], scale_mode=mode, preset=preset)
    if not isinstance(start, str):
        nn.init.constant_(model.pts_bbox_head.aqr_bias.bias_scale, start)
    best = optimum(model.masses)
    assert 2.0 < best < 2.5
    assert train(model, precision).item() == pytest.approx(best, rel=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("mode", ["inward", "smooth"])
def test_follows_the_optimum_on_a_gpu(cuda, mode, precision):
    model = Detector([wanted_mass(1.7), wanted_mass(2.8)], scale_mode=mode)
    nn.init.constant_(model.pts_bbox_head.aqr_bias.bias_scale, 6.0)
    assert train(model.to(cuda), precision).item() == pytest.approx(optimum(model.masses), rel=0.01)


@pytest.mark.parametrize("start, bound", [(0.1, 0.5), (6.0, 5.0)])
def test_clamp_stays_where_it_is_beyond_a_bound(start, bound):
    model = Detector([wanted_mass(2.2)], scale_mode="clamp")
    nn.init.constant_(model.pts_bbox_head.aqr_bias.bias_scale, start)
    assert train(model, steps=20).item() == bound
    assert model.pts_bbox_head.aqr_bias.bias_scale.item() == pytest.approx(start)


@pytest.mark.parametrize("target, bound", [(0.1, 0.5), (8.0, 5.0)])
def test_rests_on_the_bound_nearest_to_an_optimum_beyond_it(target, bound):
    assert train(Detector([wanted_mass(target)]), steps=150).item() == bound


def test_each_layer_finds_its_own_optimum():
    model = Detector([wanted_mass(2.2)], scale_per="layer", num_layers=3)
    with torch.no_grad():
        model.pts_bbox_head.aqr_bias.bias_scale.copy_(torch.tensor([0.2, 2.5, 5.5]))
    torch.testing.assert_close(train(model), torch.full((3,), 2.2), rtol=0.01, atol=0)


def work(rank, folder):
    """One of two processes, with half of the data."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for name, precision, options in (("fp32", "fp32", {}), ("bf16", "bf16", {}), ("smooth", "fp32", dict(scale_mode="smooth")),
                                     ("layer", "fp32", dict(scale_per="layer", num_layers=2))):
        model = Detector([wanted_mass((1.2, 3.4)[rank])], **options)
        nn.init.constant_(model.pts_bbox_head.aqr_bias.bias_scale, 6.0 - rank)  # the second process begins with the first one's
        found[name] = train(nn.parallel.DistributedDataParallel(model), precision, steps=150)
    torch.save(found, f"{folder}/rank{rank}.pth")
    torch.distributed.destroy_process_group()


def test_two_processes_follow_the_optimum_of_all_data(tmp_path):
    """Each has data that wants another scale: only the mean of both gradients leads to the optimum of all."""
    recipe("fp32")
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{r}.pth") for r in (0, 1))
    best = optimum([wanted_mass(1.2), wanted_mass(3.4)])
    assert abs(best - 1.2) > 0.5 and abs(best - 3.4) > 0.5
    for name, scale in first.items():
        assert torch.equal(scale, second[name]), name
        torch.testing.assert_close(scale, torch.full_like(scale, best), rtol=0.01, atol=0, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("mode", ["inward", "clamp", "smooth"])
@pytest.mark.parametrize("preset", PRESETS)
def test_start_is_that_of_the_config(mode, preset):
    made = BoundedScale(preset, scale_mode=mode)
    assert list(made.state_dict()) == ["bias_scale"] and made.bias_scale.dtype == torch.float32
    assert made.scale().item() == pytest.approx(PRESETS[preset]["bias_scale"], rel=2.4e-7)
    again = BoundedScale(preset, scale_mode=mode)
    again.set_scale(PRESETS[preset]["max_scale"] - 0.5)
    made.load_state_dict(again.state_dict())
    assert made.scale().item() == pytest.approx(PRESETS[preset]["max_scale"] - 0.5, rel=1e-6)


@pytest.mark.parametrize("low, high", [(0.5, 5.0), (1.0, 8.0), (2.0, 2.5)])
def test_smooth_bound_against_its_formula(low, high):
    x = torch.linspace(low - 3 * (high - low), high + 3 * (high - low), 101, dtype=torch.float64, requires_grad=True)
    s = smooth_bound(x, low, high)
    assert ((s > low) & (s < high)).all() and (s.diff() > 0).all()
    share = (s.detach() - low) / (high - low)
    torch.testing.assert_close(torch.autograd.grad(s.sum(), x)[0], 4 * share * (1 - share), rtol=1e-9, atol=1e-12)
    back = torch.tensor([smooth_start(v, low, high) for v in s.tolist()], dtype=torch.float64)
    torch.testing.assert_close(back, x.detach(), rtol=1e-5, atol=1e-5)


def test_inward_clamp_of_nan_and_infinity():
    x = torch.tensor([float("nan"), math.inf, -math.inf], requires_grad=True)
    y = inward_clamp(x, -1.0, 1.0)
    assert y[0].isnan() and y[1:].tolist() == [1, -1]
    assert torch.autograd.grad(y, x, torch.ones(3), retain_graph=True)[0][1:].tolist() == [1, 0]
    assert torch.autograd.grad(y, x, -torch.ones(3))[0][1:].tolist() == [0, -1]


@pytest.mark.parametrize("settings, words", [
    (dict(min_scale=4.0, max_scale=1.0), "set the three together"), (dict(min_scale=0.0), "0 < min_scale"),
    (dict(min_scale=-0.5), "0 < min_scale"), (dict(max_scale=-1.0), "0 < min_scale"), (dict(bias_scale=0.1), "<= bias_scale"),
    (dict(bias_scale=6.0), "bias_scale <= max_scale"), (dict(bias_scale=math.nan), "nan"), (dict(max_scale=math.inf), "inf"),
    (dict(max_scale="8"), "max_scale='8': expected a number"), (dict(bias_scale=True), "expected a number"),
    (dict(preset="brave"), "preset='brave': choose one of 'conservative', 'aggressive', 'ultra_conservative'"),
    (dict(preset=None), "preset=None"), (dict(preset=["aggressive"]), "choose one of"),
    (dict(scale_mode="soft"), "'inward', 'clamp', 'smooth'"),
    (dict(scale_mode="smooth", bias_scale=0.5), "scale_mode='inward'"), (dict(scale_per="head"), "'model', 'layer'"),
    (dict(scale_per="layer"), "needs num_layers"), (dict(scale_per="layer", num_layers=0), "needs num_layers"),
    (dict(scale_per="layer", num_layers=6.0), "needs num_layers"), (dict(scale_per="layer", num_layers=True), "needs num_layers"),
    (dict(window_size=0), "window size 0"), (dict(window_size=[8, -1]), "window size"),
    (dict(window_size=[8, 5, 3]), "window size"),
    (dict(use_gaussian_window=True, gaussian_sigma=-1.0), "gaussian_sigma")])
def test_settings_that_make_no_sense(settings, words):
    with pytest.raises(ValueError) as error:
        AttentionBiasGenerator(**settings)
    assert words in str(error.value)


BAD_WEIGHTS = torch.zeros(2, 4, 2)
BAD_WEIGHTS[0, 1, 0], BAD_WEIGHTS[1, 2, 1], BAD_WEIGHTS[1, 3, 0] = 1.5, math.nan, -math.inf


@pytest.mark.parametrize("scale_per", ["model", "layer"])
def test_weights_outside_their_range_are_bounded(scale_per):
    made = AttentionBiasGenerator(preset="aggressive", bias_scale=8.0, window_size=3, scale_per=scale_per, num_layers=2)
    biases = made(BAD_WEIGHTS, windows(2))
    for bias in biases if scale_per == "layer" else [biases]:
        assert bias.value[0, 1, 0] == 5 and bias.value[1, 3, 0] == -5 and bias.value[1, 2, 1].isnan()
        assert bias.value.isnan().sum() == 1 and torch.count_nonzero(bias.value) == 3


def test_check_names_the_queries():
    strict = AttentionBiasGenerator(window_size=3, check=True)
    with pytest.raises(ValueError) as error:
        strict(BAD_WEIGHTS, windows(2))
    for words in ("sample 0 query 1 LiDAR 1.5", "sample 1 query 2 camera nan", "sample 1 query 3 LiDAR -inf"):
        assert words in str(error.value)
    with pytest.raises(ValueError, match="and 11 more"):
        strict(torch.full((2, 4, 2), 2.0), windows(2))
    edge = torch.tensor([1.0, -1.0]).expand(2, 4, 2)
    assert torch.equal(strict(edge, windows(2)).value, edge * 2.5)
    nn.init.constant_(strict.bias_scale, math.nan)
    with pytest.raises(ValueError, match="bias_scale is nan"):
        strict(edge, windows(2))


def test_a_weight_of_nan_harms_its_own_query_alone():
    made = AttentionBiasGenerator(window_size=3)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 16) for n in (4, LAYOUT.num_keys, LAYOUT.num_keys))
    weights = torch.rand(1, 4, 2)
    fine = biased_attention(q, k, v, made(weights, windows()))
    weights[0, 2, 0] = math.nan
    broken = biased_attention(q, k, v, made(weights, windows()))
    others = [0, 1, 3]
    assert broken[:, :, 2].isnan().all() and torch.equal(broken[:, :, others], fine[:, :, others])


def test_weights_that_do_not_fit_the_windows():
    for shape in ((1, 3, 2), (4, 2), (1, 4, 1), (2, 4, 2)):
        with pytest.raises(ValueError, match=r"\[B, Q, 2\]"):
            AttentionBiasGenerator()(torch.zeros(shape), windows())


def test_detector_with_a_scale_per_layer():
    """Each layer's scale gets a gradient; equal scales are the same as one; a wrong number of layers is refused."""
    pytest.importorskip("mmdet3d")
    from test_detector import batch, build, model_config
    cfg, results = model_config(), {}
    for per in ("model", "layer"):
        cfg.pts_bbox_head.aqr.bias.scale_per = per  # the head knows its number of layers
        model = build(cfg).train()
        torch.manual_seed(0)
        nn.init.normal_(model.pts_bbox_head.aqr_router.to_weights.weight, std=0.1)
        losses = model.loss(*batch())
        sum(losses.values()).backward()
        results[per] = losses, model.pts_bbox_head.aqr_bias.bias_scale.grad
    for name, loss in results["model"][0].items():
        torch.testing.assert_close(results["layer"][0][name], loss)
    one, each = results["model"][1], results["layer"][1]
    assert one.shape == () and each.shape == (2,) and each.count_nonzero() == 2
    torch.testing.assert_close(each.sum(), one, rtol=1e-4, atol=1e-6)
    cfg.pts_bbox_head.aqr.bias.num_layers = 3
    with pytest.raises(ValueError, match="3 biases for 2 decoder layers: give the bias generator num_layers=2"):
        build(cfg).loss(*batch())


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, dict(scale_mode="smooth"), dict(scale_per="layer", num_layers=6)])
def test_bias_of_900_queries_on_a_gpu(cuda, options):
    """Few kernels, little memory, and the CPU waits for nothing."""
    layout = TokenLayout(lidar=(180, 180), camera=(6, 40, 100))
    cells = torch.stack([torch.stack([torch.randint(n, (1, 900), device=cuda) for n in shape], -1) for shape in layout.maps], 2)
    many = Windows(layout, cells, torch.rand(1, 900, 7, device=cuda) < 0.4, (15,) * 7)
    made, weights = AttentionBiasGenerator(window_size=15, **options).to(cuda), torch.rand(1, 900, 2, device=cuda) * 2 - 1
    made(weights, many)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
            made(weights, many)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    print(f"{options}: {len(kernels)} kernels, {torch.cuda.max_memory_allocated() - before} bytes")
    assert 3 <= len(kernels) <= 7 and torch.cuda.max_memory_allocated() - before < 2 ** 17


@pytest.mark.gpu
def test_layers_share_one_plan_on_a_gpu(cuda, monkeypatch):
    pytest.importorskip("mmdet3d")
    import cmtaqr.detector  # noqa: F401
    from cmtaqr.attention import fused
    from cmtaqr.detector.inference import GraphedCall
    from mmdet3d.registry import MODELS
    calls, plan = [], fused.plan_bias
    monkeypatch.setattr(fused, "plan_bias", lambda bias: calls.append(bias) or plan(bias))
    torch.manual_seed(0)
    decoder = MODELS.build(dict(type="CmtTransformer", decoder=dict(num_layers=3, layer=dict(embed_dims=64, num_heads=4)))).eval()
    made = AttentionBiasGenerator(window_size=3, scale_per="layer", num_layers=3)
    made.set_scale(torch.tensor([1.0, 2.0, 4.0]))
    inputs = torch.randn(1, LAYOUT.num_keys, 64), torch.randn(1, LAYOUT.num_keys, 64), torch.randn(1, 4, 64)
    weights = torch.rand(1, 4, 2)
    with torch.no_grad():
        want = decoder(*inputs, None, made(weights, windows()), LAYOUT)
        out = decoder.to(cuda)(*(t.to(cuda) for t in inputs), None, made.to(cuda)(weights.to(cuda), windows(device=cuda)), LAYOUT)
        assert len(calls) == 1
        graphed, runs = GraphedCall(decoder, warmup=3), 5  # three to warm up, one to look for waiting, one recorded
        again = graphed(*(t.to(cuda) for t in inputs), None, made(weights.to(cuda), windows(device=cuda)), LAYOUT)
    assert len(calls) == 1 + runs and not graphed.refused
    torch.testing.assert_close(out.cpu(), want, rtol=0, atol=5e-3)
    torch.testing.assert_close(again, out)
