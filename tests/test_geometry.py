"""Projection and windows against golden files, float64 and literal loops; everything of 0x to 2x imports with torch alone."""
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from cmtaqr.bias import AttentionBiasGenerator, LocalBias
from cmtaqr.geometry import TokenLayout, Windows, query_windows
from cmtaqr.projection import project_points
from cmtaqr.router import AQRWeightGenerator


def random_windows(layout, batch, queries, sizes, seed=0, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    cells = (torch.rand(batch, queries, layout.num_maps, 2, generator=g) * torch.tensor(layout.maps)).long()
    seen = torch.rand(batch, queries, layout.num_maps, generator=g) < 0.6
    return Windows(layout, cells.to(device), seen.to(device), (1,) * layout.num_maps).resized(sizes)


def test_projection_matches_golden(shared):
    data = np.load(shared / "golden" / "projection.npz")
    matrices = torch.from_numpy(data["in/lidar2img"])
    points = torch.from_numpy(data["in/points_metric"])[None].expand(len(matrices), -1, -1)
    pixels, depth = project_points(points, matrices)
    homogeneous = torch.from_numpy(data["out/homogeneous_uvz1"]).double()
    torch.testing.assert_close(depth, homogeneous[..., 2], rtol=1e-5, atol=1e-4)
    expected = torch.from_numpy(data["out/uv_pixels"]).double()
    near = depth.abs() > 1e-2
    torch.testing.assert_close(pixels[near], expected[near], rtol=1e-4, atol=1e-2)

    height, width = (int(n) for n in data["in/pad_shape"][:2])
    layout = TokenLayout(None, (matrices.shape[1], height, width))
    windows = query_windows(points, matrices, (height, width), layout, None, None, 1)
    assert torch.equal(windows.seen.transpose(1, 2), torch.from_numpy(data["out/visible_mask"]))
    seen = windows.seen.transpose(1, 2)
    # one cell per pixel: the cell is the floored pixel, unless rounding decides
    flat = windows.cells.transpose(1, 2)[seen].double()
    error = flat + 0.5 - expected[seen].flip(-1)
    assert error.abs().max() < 0.51


def test_cells_match_scalar_arithmetic():
    """Every cell by the definition in Python floats: rotated, augmented cameras and an offset BEV map."""
    g = torch.Generator().manual_seed(0)
    batch, views, queries, size = 2, 3, 40, (64, 160)
    points = (torch.rand(batch, queries, 3, generator=g, dtype=torch.float64) - 0.5) * torch.tensor([100., 100., 10.])
    matrices = torch.eye(4, dtype=torch.float64).repeat(batch, views, 1, 1)
    for b in range(batch):
        for v in range(views):
            yaw = 0.9 * v + 0.3 * b  # neighbouring views overlap
            c, s = math.cos(yaw), math.sin(yaw)
            camera = torch.tensor([[s, -c, 0, 0.2], [0, 0, -1, 0.1], [c, s, 0, -0.3], [0, 0, 0, 1]], dtype=torch.float64)
            lens = torch.tensor([[70., 0, 80, 0], [0, 70., 32, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.float64)
            matrices[b, v] = lens @ camera
    layout = TokenLayout((50, 60), (views, 8, 20))
    windows = query_windows(points, matrices, size, layout, (-45, -40, -5, 45, 40, 3), (1.5, 1.6), [4, 5])
    first = query_windows(points, matrices, size, layout, (-45, -40, -5, 45, 40, 3), (1.5, 1.6), [4, 5], views="first")
    count = 0
    for b in range(batch):
        for q in range(queries):
            x, y, z = points[b, q].tolist()
            row, col = math.floor((y + 40) / 1.6), math.floor((x + 45) / 1.5)
            inside = 0 <= row < 50 and 0 <= col < 60
            assert bool(windows.seen[b, q, 0]) == inside
            assert not inside or windows.cells[b, q, 0].tolist() == [row, col]
            seen_before = False
            for v in range(views):
                u, w, depth, _ = (matrices[b, v] @ torch.tensor([x, y, z, 1.0], dtype=torch.float64)).tolist()
                seen = depth > 0 and 0 <= u / depth < size[1] and 0 <= w / depth < size[0]
                assert bool(windows.seen[b, q, 1 + v]) == seen
                assert bool(first.seen[b, q, 1 + v]) == (seen and not seen_before)
                if seen:
                    count += 1
                    cell = [math.floor(w / depth * 8 / size[0]), math.floor(u / depth * 20 / size[1])]
                    assert windows.cells[b, q, 1 + v].tolist() == cell
                seen_before |= seen
    assert count > 20


def moved(points, matrices, transform):
    """Points and matrices after one motion [4, 4] of the LiDAR frame."""
    return points @ transform[:3, :3].T + transform[:3, 3], matrices @ torch.linalg.inv(transform)


@pytest.mark.parametrize("seed", range(8))
def test_windows_keep_their_symmetries(seed):
    """Nothing else changes if points and matrices turn, mirror or scale together, or samples, queries or views are reordered."""
    g = torch.Generator().manual_seed(seed)
    points = (torch.rand(2, 200, 3, generator=g, dtype=torch.float64) - 0.5) * torch.tensor([90.0, 90.0, 8.0])
    matrices = torch.eye(4, dtype=torch.float64).repeat(2, 4, 1, 1)
    matrices[..., :3, :] = torch.randn(2, 4, 3, 4, generator=g, dtype=torch.float64)
    matrices[..., :2, :] = 60 * matrices[..., :2, :] + 100 * matrices[..., 2:3, :]
    layout, size, area = TokenLayout((45, 45), (4, 12, 20)), (200, 200), (-45, -45, -5, 45, 45, 3)

    def windows(points, matrices, views="all"):
        found = query_windows(points, matrices, size, layout, area, (2.0, 2.0), 3, views)
        return found.cells, found.seen

    cells, seen = windows(points, matrices)
    assert 100 < seen[..., 1:].sum() < seen[..., 1:].numel()
    angle = torch.randn((), generator=g).item()
    turn = torch.eye(4, dtype=torch.float64)
    turn[:2, :2] = 1.3 * torch.tensor([[math.cos(angle), math.sin(angle)], [math.sin(angle), -math.cos(angle)]])
    turn[:3, 3] = torch.randn(3, generator=g)
    for a, b in zip(windows(*moved(points, matrices, turn)), (cells, seen)):
        assert torch.equal(a[:, :, 1:], b[:, :, 1:])

    mirror = torch.diag(torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=torch.float64))
    mirrored, there = windows(*moved(points, matrices, mirror))
    assert torch.equal(there, seen)
    inside = seen[..., 0]
    assert torch.equal(mirrored[..., 0, 0][inside], 44 - cells[..., 0, 0][inside])  # y is the row
    assert torch.equal(mirrored[..., 0, 1], cells[..., 0, 1])

    order, views = torch.randperm(200, generator=g), torch.randperm(4, generator=g)
    maps = torch.cat([torch.zeros(1, dtype=torch.long), 1 + views])
    for a, b in zip(windows(points[:, order].flip(0), matrices[:, views].flip(0)), (cells, seen)):
        assert torch.equal(a, b[:, order][:, :, maps].flip(0))

    _, first = windows(points, matrices, "first")
    assert torch.equal(first[..., 1:].sum(-1), seen[..., 1:].any(-1).long()) and not (first & ~seen).any()


@pytest.mark.parametrize("length", [1, 2, 7])
def test_every_size_at_every_place(length):
    """Odd: from -(w - 1) / 2 to (w - 1) / 2; even: from -w / 2 + 1 to w / 2; cut off at the border; as large as one likes."""
    layout = TokenLayout((length, length), None)
    places = torch.cartesian_prod(torch.arange(length), torch.arange(length)).view(1, -1, 1, 2)
    for size in range(1, 2 * length + 4):
        windows = Windows(layout, places, torch.ones(1, length**2, 1, dtype=torch.bool), (size,))
        low, high = (-(size - 1) // 2, (size - 1) // 2) if size % 2 else (-size // 2 + 1, size // 2)
        assert high - low + 1 == size
        for place, mask in zip(places[0, :, 0].tolist(), windows.mask()[0]):
            row, col = ({n for n in range(length) if low <= n - centre <= high} for centre in place)
            assert set(mask.nonzero().flatten().tolist()) == {r * length + c for r in row for c in col}
        assert size < 2 * length or windows.mask().all()  # a window at least twice as long as the map is the map


@pytest.mark.parametrize("size", [0, -3, 2.5, True, None, "8", math.nan, math.inf, [8], [8, 0], [8, 5, 5], [8, None]])
def test_impossible_window_sizes_are_named(size):
    windows = random_windows(TokenLayout((4, 4), None), 1, 3, 3)
    points = torch.zeros(1, 3, 3)
    message = r"window size .*: expected one positive integer, or two as \[camera, lidar\]"
    for call in (lambda: windows.resized(size), lambda: AttentionBiasGenerator(window_size=size),
                 lambda: AQRWeightGenerator(window_sizes=size),
                 lambda: query_windows(points, None, None, windows.layout, (-2, -2, -1, 2, 2, 1), (1.0, 1.0), size)):
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert repr(size) in str(error.value)


def test_whole_numbers_of_any_type_are_window_sizes():
    windows = random_windows(TokenLayout((4, 4), (1, 3, 3)), 1, 3, 3)
    for size in (np.int64(4), 4.0, (4, np.int32(4)), [4, 4]):
        assert windows.resized(size).sizes == (4, 4)


@pytest.mark.parametrize("message, change", [
    (r"points must be \[B, Q, 3\] floating-point numbers \(metres\), got \[3, 3\]", lambda p, m: dict(points=p[0])),
    (r"points must be .* got \[1, 3, 3\] of torch.int64", lambda p, m: dict(points=p.long())),
    (r"lidar2img must be \[B, V, 4, 4\] with B = 1 as in points, got \[2, 1, 4, 4\]",
     lambda p, m: dict(lidar2img=m.repeat(2, 1, 1, 1))),
    (r"lidar2img must hold floating-point numbers on the device of the points, cpu; got torch.float64 on meta",
     lambda p, m: dict(lidar2img=m.to("meta"))),
    (r"lidar2img has 2 views, the feature maps 1", lambda p, m: dict(lidar2img=m.repeat(1, 2, 1, 1))),
    (r"image_size must be the \(height, width\) of the network input, pixels, got \(0, 8\)",
     lambda p, m: dict(image_size=(0, 8))),
    (r"cell_size 2 positive ones \(metres\), got .* and \(1.0, -1.0\)", lambda p, m: dict(bev_cell_size=(1.0, -1.0))),
    (r"cell_size 2 positive ones \(metres\), got .* and \(nan, 1.0\)", lambda p, m: dict(bev_cell_size=(math.nan, 1.0))),
    (r"views='last': choose 'all' or 'first'", lambda p, m: dict(views="last"))])
def test_impossible_scenes_are_named(message, change):
    points, matrices = torch.zeros(1, 3, 3), torch.eye(4, dtype=torch.float64)[None, None]
    scene = dict(points=points, lidar2img=matrices, image_size=(8, 8), layout=TokenLayout((4, 4), (1, 4, 4)), window_sizes=3,
                 point_cloud_range=(-2, -2, -1, 2, 2, 1), bev_cell_size=(1.0, 1.0))
    with pytest.raises(ValueError, match=message):
        query_windows(**{**scene, **change(points, matrices)})


@pytest.mark.parametrize("sizes", [1, 2, 5, 8, [4, 5], [30, 3]])
def test_keys_and_mask_agree(sizes):
    windows = random_windows(TokenLayout((9, 11), (4, 5, 7)), 2, 30, sizes)
    for limit in (None, windows.max_views()):
        index, valid = windows.keys(limit)
        counted = torch.zeros(2, 30, windows.layout.num_keys, dtype=torch.long).scatter_add_(2, index, valid.long())
        assert torch.equal(counted, windows.mask().long())


def test_dense_bias_gradient_is_the_window_size():
    windows = random_windows(TokenLayout((9, 11), (2, 5, 7)), 1, 12, [4, 5])
    value = torch.zeros(1, 12, 2, requires_grad=True)
    LocalBias(windows, value).dense().sum().backward()
    mask = windows.mask()
    assert torch.equal(value.grad, torch.stack([mask[..., :99].sum(-1), mask[..., 99:].sum(-1)], -1).float())


@pytest.mark.parametrize("mode", ["inward", "clamp"])
def test_scale_beyond_its_bound(mode):
    """A scale past its bound, with a loss that wants it back: only the inward mode listens."""
    generator = AttentionBiasGenerator(scale_mode=mode)
    windows = random_windows(TokenLayout((4, 4), None), 1, 3, 3)
    with torch.no_grad():
        generator.bias_scale.fill_(5.2)
    assert generator.scale().item() == 5.0
    generator(torch.full((1, 3, 2), 0.5), windows).value.sum().backward()
    assert generator.bias_scale.grad.item() == (3.0 if mode == "inward" else 0.0)
    generator.bias_scale.grad = None
    (-generator(torch.full((1, 3, 2), 0.5), windows).value.sum()).backward()
    assert generator.bias_scale.grad.item() == 0.0


def test_gradients_of_weights_and_scale():
    generator = AttentionBiasGenerator(bias_scale=2.5).double()
    windows = random_windows(TokenLayout((4, 4), (2, 3, 3)), 1, 4, 3)
    weights = (torch.rand(1, 4, 2, dtype=torch.float64) * 1.8 - 0.9).requires_grad_()

    def bias(weights, scale):
        return torch.func.functional_call(generator, {"bias_scale": scale}, (weights, windows)).dense()

    assert torch.autograd.gradcheck(bias, (weights, generator.bias_scale.detach().requires_grad_()))


def test_scale_stays_fp32_and_state_dict_has_one_key():
    generator = AttentionBiasGenerator(bias_scale=2.503)
    assert list(generator.state_dict()) == ["bias_scale"]
    assert generator.half().bias_scale.dtype == torch.float32
    assert generator.bias_scale.item() == pytest.approx(2.503, abs=1e-6)


def test_torch_alone_is_enough():
    """The modules of rooms 0x to 2x import while the detector's packages, SciPy and nbdev cannot be found."""
    code = """
import sys
for name in 'mmengine mmcv mmdet mmdet3d spconv nuscenes scipy cv2 matplotlib pandas fastcore nbdev'.split():
    sys.modules[name] = None
import cmtaqr, cmtaqr.sensitivity, cmtaqr.geometry, cmtaqr.bias, cmtaqr.attention, cmtaqr.router
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
