"""Versions 1 and 2 of AQR: maps and modulation against literal loops, and both as a part of the head and the detector."""
import itertools
import math

import pytest
import torch

from cmtaqr.geometry import TokenLayout, Windows
from cmtaqr.modulation import ACTIVATIONS, KERNELS, MODES, FeatureModulator, WeightRenderer

LAYOUTS = {"both": TokenLayout((7, 9), (2, 4, 6)), "LiDAR": TokenLayout((7, 9), None), "cameras": TokenLayout(None, (3, 4, 6))}
PROFILES = {
    "direct": lambda d, size, sigma: 1.0,
    "bilinear": lambda d, size, sigma: 1 - d / (size // 2 + 1),
    "gaussian": lambda d, size, sigma: math.exp(-d * d / (2 * sigma * sigma)),
    "distance-weighted": lambda d, size, sigma: 1 / (1 + d),
}


def windows_on(layout, queries=14, batch=2, seed=0):
    """Random windows; the first query has none, some lie on each other and at the corners."""
    draw = torch.Generator().manual_seed(seed)
    maps = torch.tensor(layout.maps)
    cells = (torch.rand(batch, queries, layout.num_maps, 2, generator=draw) * maps).long()
    cells[:, 5:8] = cells[:, 4:5]
    cells[:, 8], cells[:, 9] = 0, maps - 1
    seen = torch.rand(batch, queries, layout.num_maps, generator=draw) < 0.7
    seen[:, 0] = False
    return Windows(layout, cells, seen, (1,) * layout.num_maps)


def loop_maps(weights, windows, pair, mode, sigmas):
    """The definition, query by query and cell by cell."""
    layout, maps = windows.layout, []
    for b in range(len(weights)):
        for m, (rows, cols) in enumerate(layout.maps):
            modality = layout.modality[m]
            size, sigma = pair[1 - modality], sigmas[1 - modality]
            low, high = (-(size - 1) // 2, (size - 1) // 2) if size % 2 else (-size // 2 + 1, size // 2)
            for r, c in itertools.product(range(rows), range(cols)):
                total, weighted = 0.0, weights.new_zeros(())
                for q in range(weights.shape[1]):
                    dr, dc = r - int(windows.cells[b, q, m, 0]), c - int(windows.cells[b, q, m, 1])
                    if windows.seen[b, q, m] and low <= dr <= high and low <= dc <= high:
                        kernel = PROFILES[mode](abs(dr), size, sigma) * PROFILES[mode](abs(dc), size, sigma)
                        total, weighted = total + kernel, weighted + kernel * weights[b, q, modality]
                maps.append(1 + weighted / max(1.0, total))
    return torch.stack(maps).view(len(weights), layout.num_keys)


@pytest.mark.parametrize("pair", [[1, 1], [4, 3], [3, 4], [2, 40]], ids=str)
@pytest.mark.parametrize("mode", KERNELS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_maps_equal_the_loop(name, mode, pair):
    windows = windows_on(LAYOUTS[name])
    weights = (2 * torch.rand(2, 14, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) - 1).requires_grad_()
    renderer = WeightRenderer(pair, mode, gaussian_sigma=[0.7, 1.6])
    maps, expected = renderer(weights, windows), loop_maps(weights, windows, pair, mode, (0.7, 1.6))
    torch.testing.assert_close(maps, expected, rtol=0, atol=1e-12)
    upstream = torch.randn(maps.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    got, wanted = (torch.autograd.grad((x * upstream).sum(), weights)[0] for x in (maps, expected))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)
    assert not got[:, 0].any() and (maps - 1).abs().max() <= 1
    assert (maps[~windows.resized(pair).mask().any(1)] == 1).all()
    single = renderer(weights.detach().float(), windows)
    assert single.dtype == torch.float32 and (single - expected).abs().max() < 1e-6
    assert (renderer(torch.zeros(2, 14, 2), windows) == 1).all()


def test_rendering_makes_no_matrix_of_queries_by_keys():
    """Neither result nor what autograd keeps grows with queries x keys; no atomics either: matrix products are all there is."""
    layout = TokenLayout((60, 60), (6, 20, 30))
    windows, weights = windows_on(layout, queries=300, batch=1), torch.zeros(1, 300, 2, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        WeightRenderer(8)(weights, windows).sum().backward()
    largest = max(math.prod(shape) for event in profile.events() for shape in event.input_shapes or () if shape)
    names = {event.name for event in profile.events()}
    assert largest <= 300 * 6 * 4 * 60 < 300 * layout.num_keys / 4
    assert "aten::bmm" in names and not any("scatter" in name or "index_add" in name for name in names)


def loop_modulation(module, memory, maps, layout):
    kinds = [m for m, (rows, cols) in zip(layout.modality, layout.maps) for _ in range(rows * cols)]
    activations = dict(none=lambda e: e, relu=lambda e: torch.maximum(e, e.new_tensor(-1.0)), tanh=torch.tanh,
                       exp=lambda e: torch.exp(e) - 1)
    out = []
    for b, (k, kind), c in itertools.product(range(len(memory)), enumerate(kinds), range(memory.shape[2])):
        gain = 1.0
        if module.mode == "channel-wise":
            gain = module.gain[kind, c]
        elif module.mode == "adaptive":
            gain = 2 * torch.sigmoid((module.gate.weight[c] * memory[b, k]).sum() + module.gate.bias[c])
        change = activations[module.activation](gain * (maps[b, k] - 1))
        out.append(memory[b, k, c] + module.residual_weight * memory[b, k, c] * change)
    return torch.stack(out).view_as(memory)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_modulation_equals_the_loop(name, mode, activation):
    full = LAYOUTS[name]
    layout = TokenLayout(full.lidar and (2, 3), full.camera and (full.num_views, 1, 2))
    torch.manual_seed(0)
    module = FeatureModulator(3, mode, 0.3, activation).double()
    memory = torch.randn(2, layout.num_keys, 3, dtype=torch.float64, requires_grad=True)
    maps = (2 * torch.rand(2, layout.num_keys, dtype=torch.float64)).requires_grad_()
    assert torch.equal(module(memory, torch.ones_like(maps), layout), memory)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    got, wanted = module(memory, maps, layout), loop_modulation(module, memory, maps, layout)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    inputs, upstream = [memory, maps, *module.parameters()], torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad((x * upstream).sum(), inputs) for x in (got, wanted))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_default_is_version_1_and_a_tenth_is_version_2():
    layout, memory, maps = LAYOUTS["both"], torch.randn(2, 111, 8), 2 * torch.rand(2, 111)
    torch.testing.assert_close(FeatureModulator(8)(memory, maps, layout), memory * maps[..., None])
    torch.testing.assert_close(FeatureModulator(8, residual_weight=0.1)(memory, maps, layout),
                               memory + memory * (maps[..., None] - 1) * 0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tokens_keep_their_type_and_are_rounded_once(dtype):
    layout, memory = LAYOUTS["both"], torch.randn(2, 111, 8).to(dtype)
    maps = torch.full((2, 111), 1.03)
    out = FeatureModulator(8, residual_weight=0.1)(memory, maps, layout)
    assert out.dtype == dtype and torch.equal(out, (memory.float() * (1 + 0.1 * (maps[..., None] - 1))).to(dtype))


@pytest.mark.parametrize("make, message", [
    (lambda: WeightRenderer(mode="nearest"), "direct, bilinear, gaussian, distance-weighted"),
    (lambda: WeightRenderer(window_size=[3, 0]), "window size"),
    (lambda: WeightRenderer(gaussian_sigma=0), "gaussian_sigma=0"),
    (lambda: WeightRenderer()(torch.zeros(2, 13, 2), windows_on(LAYOUTS["both"])), r"\[2, 14, 2\]"),
    (lambda: WeightRenderer(check=True)(torch.full((2, 14, 2), math.nan), windows_on(LAYOUTS["both"])), "nan"),
    (lambda: WeightRenderer(check=True)(torch.full((2, 14, 2), -1.5), windows_on(LAYOUTS["both"])), r"\[-1, 1\]"),
    (lambda: FeatureModulator(mode="spatial"), "element-wise, channel-wise, adaptive"),
    (lambda: FeatureModulator(activation="gelu"), "none, relu, tanh, exp"),
    (lambda: FeatureModulator(residual_weight=-0.1), "residual_weight=-0.1"),
    (lambda: FeatureModulator(8)(torch.zeros(2, 111, 9), torch.zeros(2, 111), LAYOUTS["both"]), "C = 8"),
    (lambda: FeatureModulator(8)(torch.zeros(2, 111, 8), torch.zeros(2, 110), LAYOUTS["both"]), "K = 111"),
])
def test_bad_input_names_the_choices(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def tiny(version, residual=None, **options):
    """The tiny detector with a version of AQR; its router answers 0 at first."""
    pytest.importorskip("mmdet3d")
    from test_detector import build, model_config

    cfg = model_config()
    aqr = cfg.pts_bbox_head.aqr
    if version is None:
        cfg.pts_bbox_head.aqr = None
    else:
        modulator = dict(mode="adaptive") if residual is None else dict(mode="adaptive", residual_weight=residual)
        aqr.update(version=version, initial_weight=0.0, renderer=dict(type="WeightRenderer", window_size=[4, 3]),
                   modulator=dict(type="FeatureModulator", **modulator), **options)
    return build(cfg)


def batch(boxes=(4, 2)):
    from test_detector import cloud, sample

    torch.manual_seed(1)
    return dict(points=[cloud(2000), cloud(3000, 1)], imgs=torch.randn(2, 6, 3, 128, 320)), [sample(n) for n in boxes]


@pytest.mark.parametrize("version", [1, 2, 3])
def test_every_version_trains(version):
    model = tiny(version).train()
    head = model.pts_bbox_head
    keys = {k for k in head.state_dict() if k.startswith("aqr_") and not k.startswith("aqr_router.")}
    learnt = {f"aqr_modulator.{name}" for name in ("gate.weight", "gate.bias", "trained_with")}
    assert keys == ({"aqr_bias.bias_scale"} if version == 3 else learnt)
    assert hasattr(head, "aqr_renderer") == (version != 3)
    if version != 3:
        assert head.aqr_modulator.residual_weight == {1: 1.0, 2: 0.1}[version]
    torch.nn.init.normal_(head.aqr_router.to_weights.weight, std=0.1)
    caught = {}
    head.register_forward_hook(lambda m, args, out: caught.update(out["aqr"]))
    losses = model.loss(*batch())
    assert "loss_aqr" not in losses and (caught["bias"] is None) == (version != 3) and caught["weights"].shape[2] == 2
    sum(losses.values()).backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing
    still = [n for n, p in head.named_parameters() if n.startswith("aqr_") and not p.grad.any()]
    assert not still or still == ["aqr_router.k_proj.bias"], "a shift of all keys changes no softmax"


@pytest.mark.parametrize("version", [1, 2, 3])
def test_every_version_starts_as_cmt(version):
    cmt, aqr = tiny(None), tiny(version)
    for model in (cmt, aqr):
        for layer in model.pts_bbox_head.transformer.decoder.layers:
            layer.attentions[1].attn.backend = "reference"
    left = aqr.load_state_dict(cmt.state_dict(), strict=False)
    assert not left.unexpected_keys and all(".aqr_" in key for key in left.missing_keys)
    with torch.no_grad():
        a, b = (m.eval()._forward(*batch())["tasks"][0] for m in (cmt, aqr))
        assert all(torch.equal(a[k], b[k]) for k in a)
        torch.nn.init.constant_(aqr.pts_bbox_head.aqr_router.to_weights.bias, 1.0)
        moved = aqr._forward(*batch())["tasks"][0]
    assert all(not torch.equal(a[k], moved[k]) for k in a)


@pytest.mark.parametrize("written, read", [(1, 1), (1, 2), (2, 1), (1, 3), (3, 2)])
def test_a_checkpoint_opens_in_its_own_version_alone(written, read, tmp_path):
    model = tiny(read)
    from cmtaqr.detector.checkpoint import load_checkpoint

    torch.save(dict(state_dict=tiny(written).state_dict()), tmp_path / "file.pth")
    if written == read:
        assert load_checkpoint(model, tmp_path / "file.pth") == []
        return
    with pytest.raises((ValueError, RuntimeError), match="residual_weight 1 and|residual_weight 0.1 and|aqr_bias.bias_scale"):
        load_checkpoint(model, tmp_path / "file.pth")


@pytest.mark.parametrize("version", [1, 2])
def test_denoising_queries_leave_no_trace_in_the_memory(version):
    """Boxes elsewhere change the denoising queries and nothing that match queries see; so training tells them no ground truth."""
    model = tiny(version).train()
    torch.nn.init.normal_(model.pts_bbox_head.aqr_router.to_weights.weight, std=0.5)
    memories, weights = [], []
    model.pts_bbox_head.transformer.register_forward_pre_hook(lambda m, args: memories.append(args[0]))
    model.pts_bbox_head.register_forward_hook(lambda m, args, out: weights.append(out["aqr"]["weights"]))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()
        inputs, samples = batch()
        for shift in (0.0, 5.0):
            for sample in samples:
                sample.gt_instances_3d.bboxes_3d.tensor[:, :2] += shift
            torch.manual_seed(2)
            model.loss(inputs, samples)
    slots = weights[0].shape[1] - model.pts_bbox_head.num_query
    assert slots > 0 and not torch.equal(weights[0][:, :slots], weights[1][:, :slots])
    torch.testing.assert_close(weights[0][:, slots:], weights[1][:, slots:], rtol=0, atol=1e-6)
    torch.testing.assert_close(memories[0], memories[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_islands_hold_in_every_version(version):
    pytest.importorskip("mmdet3d")
    from cmtaqr.detector.precision import FP32_ISLANDS, autocast, recorded_islands

    model = tiny(version).train()
    with recorded_islands() as record, torch.no_grad(), autocast("cpu", "bf16"):
        losses = model.loss(*batch())
        model.eval().predict(*batch())
    assert set(record) == set(FP32_ISLANDS) and all(v.isfinite() and v.dtype == torch.float32 for v in losses.values())
    for name, calls in record.items():
        for seen, made in calls:
            assert (seen | made) <= {torch.float32, torch.float64}, name


@pytest.mark.parametrize("change, message", [
    (dict(version=4), "choose 1 .*2 .*or 3"),
    (dict(version=0), "aqr=None is plain CMT"),
    (dict(version=1, renderer=None), "missing: renderer"),
    (dict(version=2, modulator=None), "missing: modulator"),
    (dict(bias=None), "missing: bias"),
    (dict(scale=2), "unknown entries scale"),
    (dict(version=1, modulator=dict(mode="spatial")), "channel-wise"),
    (dict(version=1, renderer=dict(mode="cubic")), "bilinear"),
    (dict(auxiliary=True), "weight, margin"),
    (dict(auxiliary=dict(factor=1)), "weight, margin"),
    (dict(auxiliary=dict(margin=0)), "margin"),
])
def test_bad_configs_name_the_choices(change, message):
    pytest.importorskip("mmdet3d")
    from test_head import AQR

    from cmtaqr.detector.aqr import AqrMixin

    class Head(AqrMixin, torch.nn.Module):
        pass

    aqr = {**AQR, "renderer": dict(), "modulator": dict(), **change}
    with pytest.raises(ValueError, match=message):
        Head().build_aqr(aqr, 16, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", KERNELS)
def test_maps_on_a_gpu(cuda, mode):
    """Full size in fp32: as on the CPU, and twice the same to the bit, gradients too."""
    layout = TokenLayout((180, 180), (6, 40, 100))
    windows = windows_on(layout, queries=900)
    weights, upstream = 2 * torch.rand(2, 900, 2) - 1, torch.randn(2, layout.num_keys)
    renderer, results = WeightRenderer([15, 5], mode), []
    for device in ("cpu", cuda, cuda):
        leaf = weights.to(device).requires_grad_()
        moved = Windows(layout, windows.cells.to(device), windows.seen.to(device), windows.sizes)
        maps = renderer(leaf, moved)
        results.append((maps.detach().cpu(), torch.autograd.grad((maps * upstream.to(device)).sum(), leaf)[0].cpu()))
    for reference, first, second in zip(*results):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_step_of_every_version_at_full_size_on_a_gpu(cuda, record_property, version):
    """The r50 config with its own batch size in bf16: finite losses and gradients, and what forward and backward need."""
    pytest.importorskip("mmdet3d")
    from cmtaqr.detector.precision import autocast
    from cmtaqr.engine.configure import load_config
    from test_configs import AQR_R50, build, finite_step, inputs_for

    cfg = load_config(AQR_R50)
    cfg.model.pts_bbox_head.aqr.update(version=version, renderer=dict(window_size=[8, 5]), modulator=dict(mode="adaptive"))
    model, count = build(cfg.model).to(cuda).train(), cfg.batch_size
    torch.nn.init.normal_(model.pts_bbox_head.aqr_router.to_weights.weight, std=0.1)
    inputs, samples = inputs_for(AQR_R50, points=(200000,) * count, boxes=(40,) * count, size=tuple(cfg.input_size))
    inputs = {k: v.to(cuda) if k == "imgs" else [p.to(cuda) for p in v] for k, v in inputs.items()}
    torch.cuda.reset_peak_memory_stats()
    with autocast(cuda, "bf16"):
        finite_step(model, inputs, samples)
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(f"version {version}: batch {count}, peak memory of forward and backward {peak:.2f} GiB")
    record_property("peak_memory_gib", round(peak, 2))
    assert not [k for k, p in model.named_parameters() if p.grad is None]
