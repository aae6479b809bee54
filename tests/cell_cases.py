"""Points at which the kernel of `cmtaqr.cells` could differ from plain torch; as a script, all cases in Triton's interpreter."""
import itertools
import json
import math

import torch

from cmtaqr.cells import query_cells
from cmtaqr.geometry import TokenLayout, _installed, query_windows

AREA = (-54.0, -54.0, -5.0, 54.0, 54.0, 3.0)
LAYOUTS = {"both": TokenLayout((128, 120), (6, 20, 50)), "LiDAR": TokenLayout((9, 12), None),
           "cameras": TokenLayout(None, (2, 6, 10)), "one cell": TokenLayout((1, 1), (1, 1, 1)),
           "nine views": TokenLayout((180, 180), (9, 40, 100))}
DTYPES = [(points, matrices) for points in (torch.float32, torch.float64) for matrices in (torch.float32, torch.float64)]
IMAGE = (320, 800)


def random_cameras(g, batch, views):
    """Cameras that look outwards, tilted, shifted and with different lenses: [B, V, 4, 4] float64."""
    yaw = torch.arange(views) * (2 * math.pi / views) + 0.2 * torch.randn(batch, views, generator=g, dtype=torch.float64)
    c, s, o, i = yaw.cos(), yaw.sin(), torch.zeros_like(yaw), torch.ones_like(yaw)
    turn = torch.stack([s, -c, o, o, o, o, -i, o, c, s, o, o, o, o, o, i], -1).unflatten(-1, (4, 4))
    tilt = torch.eye(4, dtype=torch.float64) + 0.05 * torch.randn(batch, views, 4, 4, generator=g, dtype=torch.float64)
    tilt[..., 3, :] = torch.tensor([0.0, 0, 0, 1])
    lens = torch.diag_embed(torch.ones(batch, views, 4, dtype=torch.float64))
    lens[..., 0, 0] = lens[..., 1, 1] = 400 + 300 * torch.rand(batch, views, generator=g, dtype=torch.float64)
    lens[..., 0, 2], lens[..., 1, 2] = IMAGE[1] / 2, IMAGE[0] / 2
    return lens @ tilt @ turn


def edge_points(layout, matrices, cell):
    """Borders of cells and their neighbours in float32, places without a pixel, infinities and NaN: [1, N, 3] float64."""
    special = [0.0, -0.0, 1e-40, -1e-40, 1e-7, -1e-6, 1e30, -1e30, 3e38, math.nan, math.inf, -math.inf]
    points = [torch.tensor(list(itertools.product(special, repeat=3)), dtype=torch.float64)]
    if layout.lidar:
        for axis, count in ((0, layout.lidar[1]), (1, layout.lidar[0])):
            border = torch.zeros(count + 1, 3, dtype=torch.float64)
            border[:, axis] = AREA[axis] + cell[axis] * torch.arange(count + 1)
            points.append(border)
    if layout.camera:
        _, rows, cols = layout.camera
        u, v = (torch.arange(n + 1, dtype=torch.float64) * size / n for n, size in ((cols, IMAGE[1]), (rows, IMAGE[0])))
        for depth in (-7.0, -1e-6, 0.0, 1e-6, 3.0, 40.0):
            pixel = torch.cartesian_prod(u[:: max(1, cols // 8)], v[:: max(1, rows // 4)])
            image = torch.cat([pixel * depth, torch.full((len(pixel), 1), depth), torch.ones(len(pixel), 1)], 1).double()
            points.append((image @ torch.linalg.inv(matrices[0, 0]).T)[:, :3])
    points = torch.cat(points)
    single = points.float()
    around = [torch.nextafter(single, torch.full_like(single, to)).double() for to in (-math.inf, math.inf)]
    return torch.cat([points, *around])[None]


def scene(layout, batch, queries, seed, edges=None):
    """Arguments of `query_windows` but for the window sizes, float64; with `edges` = n every n-th point of `edge_points`."""
    g = torch.Generator().manual_seed(seed)
    matrices = random_cameras(g, batch, layout.num_views) if layout.camera else None
    cell = (100 / layout.lidar[1], 108 / layout.lidar[0]) if layout.lidar else None
    points = (torch.rand(batch, queries, 3, generator=g, dtype=torch.float64) * 2 - 1) * torch.tensor([60.0, 60.0, 5.0])
    if edges:
        points = edge_points(layout, matrices, cell)[:, seed::edges].expand(batch, -1, -1)
    return points, matrices, IMAGE if layout.camera else None, layout, AREA if layout.lidar else None, cell


def check(scene, device="cpu", dtypes=DTYPES):
    """The kernel gives the bits of plain torch on the same device and on the CPU; returns how many cells were seen."""
    points, matrices, *rest = scene
    count = 0
    for metres, pixels in dtypes:
        inputs = points.to(metres), matrices if matrices is None else matrices.to(pixels)
        there = [t if t is None else t.to(device) for t in inputs]
        for views in ("all", "first"):
            got = query_windows(*there, *rest, 3, views, "triton")
            for given in (there, inputs):
                expected = query_windows(*given, *rest, 3, views, "reference")
                for name in ("cells", "seen"):
                    a, b = getattr(got, name).cpu(), getattr(expected, name).cpu()
                    assert a.dtype == b.dtype and torch.equal(a, b), (name, metres, pixels, views, int((a != b).sum()))
            count += int(got.seen.sum())
    return count


def check_strides(device="cpu"):
    """Points and matrices that are views of other tensors: transposed, expanded, sliced."""
    points, matrices, *rest = scene(LAYOUTS["both"], 1, 50, 0)
    points, matrices = points.to(device), matrices.to(device)
    expected = query_windows(points, matrices, *rest, 3, backend="reference")
    padded = torch.nn.functional.pad(points, (2, 1))[..., 2:5]
    for way in ((points.mT.contiguous().mT, matrices.mT.contiguous().mT), (padded, matrices),
                (points.expand(3, -1, -1), matrices.expand(3, -1, -1, -1))):
        got = query_windows(*way, *rest, 3, backend="triton")
        assert torch.equal(got.cells, expected.cells.expand_as(got.cells))
        assert torch.equal(got.seen, expected.seen.expand_as(got.seen))


def check_operator(device="cpu"):
    """PyTorch's checks of the operator; tracing `query_windows` as a whole changes no bit."""
    points, matrices, image, layout, area, cell = scene(LAYOUTS["both"], 2, 20, 0)
    points, matrices = points.float().to(device), matrices.to(device)
    numbers = [*area[:2], *cell, layout.camera[1] / image[0], layout.camera[2] / image[1]]
    none, both = [0] * 3, [*layout.lidar, *layout.camera]
    for maps, given in ((both, matrices), (both[:2] + none, None), (none[:2] + both[2:], matrices)):
        for first in (False, True):
            torch.library.opcheck(query_cells, (points, given, maps, numbers, first))

    def windows(points, matrices):
        found = query_windows(points, matrices, image, layout, area, cell, 3, backend="triton")
        return found.cells, found.seen

    traced = torch.compile(windows, fullgraph=True, backend="inductor" if str(device) == "cuda" else "aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(traced(points, matrices), windows(points, matrices)))


CASES = {}
for name, layout in LAYOUTS.items():
    CASES[f"{name}, edges"] = lambda layout=layout: check(scene(layout, 1, 0, 5, edges=41), dtypes=DTYPES[1:3])
    CASES[f"{name}, random"] = lambda layout=layout: check(scene(layout, 2, 20, 0))
CASES |= {"no query": lambda: check(scene(LAYOUTS["both"], 2, 0, 0)), "one query": lambda: check(scene(LAYOUTS["both"], 1, 1, 0)),
         "strides": check_strides, "operator": check_operator}

if __name__ == "__main__":
    assert _installed("triton")
    for name, case in CASES.items():
        try:
            result = case()
        except Exception as error:
            result = repr(error)
        print(json.dumps([name, result]), flush=True)
