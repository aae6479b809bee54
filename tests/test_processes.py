"""Gradients of the tiny detector in two processes against those in one: what averaging over processes does to CMT's losses."""
import os
import socket
import subprocess
import sys

import pytest
import torch

pytest.importorskip("mmdet3d", reason='needs the extra: pip install "cmtaqr[detector]"')

from cmtaqr.engine.configure import load_config  # noqa: E402
from cmtaqr.engine.small import small_batch, small_model  # noqa: E402

# isort: split
from mmdet3d.registry import MODELS  # noqa: E402
from mmengine.model import MMDistributedDataParallel  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
EQUAL, UNEQUAL = (6, 6), (2, 20)  # numbers of boxes in the two frames


def gradient(counts, places=(0, 1), parallel=False):
    """All gradients of a step on those of two frames with so many boxes, in a row; if parallel, averaged over two processes.

    Without denoising, which draws noise, and with BatchNorm's statistics at rest: each process has its own.
    """
    cfg = load_config("cmt_aqr_tiny")
    cfg.model.pts_bbox_head.denoising = None
    torch.manual_seed(0)
    model = MODELS.build(small_model(cfg)).train()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    wrapped = MMDistributedDataParallel(module=model, broadcast_buffers=False) if parallel else model
    frames = [small_batch(cfg, points=1000, boxes=counts[place], seed=place) for place in places]
    inputs = {name: [tensor for frame in frames for tensor in frame["inputs"][name]] for name in frames[0]["inputs"]}
    data = dict(inputs=inputs, data_samples=[sample for frame in frames for sample in frame["data_samples"]])
    losses = wrapped(**model.data_preprocessor(data, True), mode="loss")
    sum(value for name, value in losses.items() if "loss" in name).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """Gradients of two processes with one frame each, by numbers of boxes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    file = tmp_path_factory.mktemp("processes") / "gradients.pth"
    environment = os.environ | dict(OMP_NUM_THREADS="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    started = [subprocess.Popen([sys.executable, __file__, str(file)], env=environment | dict(RANK=str(rank)),
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for rank in range(2)]
    outputs = [process.communicate(timeout=200)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    return torch.load(file, weights_only=True)


def distance(one, other):
    return ((one - other).norm() / other.norm()).item()


def test_with_equal_numbers_of_boxes_two_processes_take_the_step_of_one(averaged):
    assert distance(averaged[EQUAL], gradient(EQUAL)) < 1e-5


def test_with_others_they_take_the_mean_of_the_steps_of_each_frame_alone(averaged):
    """Each process divides its losses by its own boxes, as the release does; one process divides by those of both frames."""
    assert distance(averaged[UNEQUAL], (gradient(UNEQUAL, [0]) + gradient(UNEQUAL, [1])) / 2) < 1e-5
    assert distance(averaged[UNEQUAL], gradient(UNEQUAL)) > 0.5


if __name__ == "__main__":
    init_default_scope("mmdet3d")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    found = {counts: gradient(counts, [rank], parallel=True) for counts in (EQUAL, UNEQUAL)}
    if rank == 0:
        torch.save(found, sys.argv[1])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
