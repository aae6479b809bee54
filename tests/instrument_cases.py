"""A head that is all that `InstrumentsHook` looks at; as a script, a process that records its share of a batch."""
import logging
import sys
from types import SimpleNamespace

import torch
from mmengine.registry import init_default_scope
from torch import nn

from cmtaqr.bias import AttentionBiasGenerator
from cmtaqr.detector.decoder import CmtTransformer
from cmtaqr.engine.instruments import InstrumentsHook
from cmtaqr.geometry import TokenLayout, Windows

LAYOUT = TokenLayout((6, 7), (2, 3, 4))


class Head(nn.Module):
    """Router, bias and decoder on given queries, keys and windows; 3 denoising queries come first."""

    num_query = 8

    def __init__(self, **bias):
        super().__init__()
        init_default_scope("mmdet3d")
        layer = dict(embed_dims=16, num_heads=2, feedforward_channels=32, dropout=0.0)
        self.transformer = CmtTransformer(dict(num_layers=2, layer=layer))
        self.aqr_router = nn.Linear(16, 2)
        self.aqr_bias = AttentionBiasGenerator(window_size=3, num_layers=2, **bias)

    def forward(self, query, memory, windows):
        weights = torch.tanh(self.aqr_router(query))
        bias = self.aqr_bias(weights, windows)
        decoded = self.transformer(memory, torch.zeros_like(memory), query, None, bias, LAYOUT)
        return dict(decoded=decoded, aqr=dict(weights=weights, bias=bias, windows=windows, points=None))


def batch(size, seed=0, device="cpu"):
    """Queries, keys and windows of `size` samples."""
    draw = torch.Generator().manual_seed(seed)
    query, memory = (torch.randn(size, n, 16, generator=draw).to(device) for n in (11, LAYOUT.num_keys))
    cells = [torch.stack([torch.randint(n, (size, 11), generator=draw) for n in shape], -1) for shape in LAYOUT.maps]
    seen = torch.rand(size, 11, LAYOUT.num_maps, generator=draw) < 0.6
    return query, memory, Windows(LAYOUT, torch.stack(cells, 2).to(device), seen.to(device), (3,) * LAYOUT.num_maps)


def part(inputs, chosen):
    """Some samples of a batch."""
    query, memory, windows = inputs
    return query[chosen], memory[chosen], Windows(LAYOUT, windows.cells[chosen], windows.seen[chosen], windows.sizes)


class Board:
    """Stands in for mmengine's visualizer: keeps scalars."""

    def __init__(self):
        self.scalars = {}

    def add_scalars(self, scalars, step):
        self.scalars[step] = scalars

    def get_backend(self, name):
        return None


def runner_for(model, folder, **attributes):
    """What the hook needs of a runner."""
    return SimpleNamespace(**dict(dict(model=model, work_dir=str(folder), iter=0, optim_wrapper=None, visualizer=Board(),
                                       logger=logging.getLogger("instruments")), **attributes))


def record(model, inputs, folder, hook=None):
    """Forward and backward pass of the mean squared output with the hook, which records it."""
    hook, runner = hook or InstrumentsHook(queries=4 * len(inputs[0])), runner_for(model, folder)
    hook.before_train(runner)
    hook.before_train_iter(runner, 0)
    model(*inputs)["decoded"].square().mean().backward()
    hook.after_train_iter(runner, 0)
    hook.after_train(runner)
    return runner


if __name__ == "__main__":
    rank, world, port, *folders = sys.argv[1:]
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=int(rank), world_size=int(world))
    for per, folder in zip(("model", "layer"), folders):
        torch.manual_seed(0)
        model = nn.parallel.DistributedDataParallel(Head(scale_per=per))
        record(model, part(batch(4), slice(int(rank), None, int(world))), folder)
    torch.distributed.destroy_process_group()
