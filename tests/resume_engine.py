"""A model with dropout and noisy data, and a program that trains it and dies where it is told to: what `test_resume.py` breaks.

`python tests/resume_engine.py '[{"config": ..., "work_dir": ..., "die": [7, "before_train_iter"]}, ...]'` trains one run after
the other, on several processes where RANK and WORLD_SIZE are set.
"""
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, HOOKS, MODELS
from mmengine.structures import BaseDataElement
from torch import nn


@MODELS.register_module(force=True)
class NoisyDetector(BaseModel):
    """y = 3x through dropout and BatchNorm; the loss of a sample named in `spoiled` is not finite."""

    def __init__(self, aqr=None, spoiled=()):
        super().__init__()
        self.spoiled = set(spoiled)
        self.body = nn.Sequential(nn.Linear(1, 16), nn.BatchNorm1d(16), nn.Dropout(0.3))
        self.head = nn.Linear(16, 1)

    def forward(self, inputs, data_samples=None, mode="tensor"):
        x = torch.stack(list(inputs)).to(self.head.weight.device)
        loss = (self.head(self.body(x)) - 3 * x * random.random() * np.random.rand()).square().mean()
        tokens = {sample.metainfo["token"] for sample in data_samples}
        return dict(loss_fit=loss * (float("nan") if tokens & self.spoiled else 1.0))


@DATASETS.register_module(force=True)
class NoisyPoints(torch.utils.data.Dataset):
    """Points with noise of three generators; those in `unreadable` cannot be read, and one in `deadly` ends its process."""

    metainfo = dict(classes=("point",))

    def __init__(self, data_root=None, ann_file=None, length=22, unreadable=(), deadly=()):
        self.length, self.unreadable, self.deadly = length, unreadable, deadly

    def __len__(self):
        return self.length

    def get_data_info(self, index):
        return dict(token=f"token{index}")

    def __getitem__(self, index):
        if index in self.unreadable:
            raise ValueError(f"image {index}.jpg is truncated or broken (12 bytes): restore it")
        if index in self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        noise = random.random() + np.random.rand() + torch.rand(1).item()
        return dict(inputs=torch.tensor([index / self.length + 0.1 * noise]),
                    data_samples=BaseDataElement(metainfo=dict(token=f"token{index}")))


CONFIG = """
_base_ = [r"{bases}/runtime.py", r"{bases}/schedule.py"]
default_scope = "mmengine"
custom_imports = dict(imports=["cmtaqr.engine", "resume_engine"], allow_failed_imports=False)
data_root = "data/toy"
model = dict(type="NoisyDetector", spoiled={spoiled})
train_dataloader = dict(batch_size=4, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=True),
                        dataset=dict(type="NoisyPoints", data_root=data_root, ann_file="train.pkl", unreadable={unreadable},
                                     deadly={deadly}))
val_cfg = None
test_cfg = None
optim_wrapper = dict(optimizer=dict(lr=0.01))
visualizer = dict(type="Visualizer", vis_backends=[])
custom_hooks = _base_.custom_hooks + [dict(type="Trouble")]
"""


def write_toy(folder, name="toy", spoiled=(), unreadable=(), deadly=()):
    """Parameters of a toy run, with its config file and data folder."""
    import cmtaqr
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "train.pkl").touch()
    config = folder / f"{name}.py"
    config.write_text(CONFIG.format(bases=Path(cmtaqr.__file__).parent / "configs" / "_base_", spoiled=list(spoiled),
                                    unreadable=list(unreadable), deadly=list(deadly)))
    return dict(config=str(config), data_root=str(folder / "data"), work_dir=str(folder / name), device="cpu")


@HOOKS.register_module(force=True)
class Trouble(Hook):
    """Ends the process (SIGKILL) or the disk (a limit on the size of files) at a stage of an iteration."""

    priority = "VERY_LOW"
    die, full = None, None

    def _at(self, runner, stage):
        if self.die and self.die[:2] == [runner.iter, stage] and int(os.environ.get("RANK", 0)) in (self.die[2:] or [0, 1]):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.full and stage == "before_train_iter":
            first, last = self.full
            limit = 4096 if first <= runner.iter < last else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    def before_train_iter(self, runner, *_, **__):
        self._at(runner, "before_train_iter")

    def after_train_iter(self, runner, *_, **__):
        self._at(runner, "after_train_iter")

    def before_save_checkpoint(self, runner, checkpoint):
        self._at(runner, "before_save_checkpoint")


def train_toy(interval=3, keep=2, die=None, full=None, processes=False, **values):
    """Train with a checkpoint every so many iterations; returns the runner, with what came out in `summary`."""
    from cmtaqr.engine.configure import run_config
    from cmtaqr.engine.parameters import TrainParameters
    from cmtaqr.engine.runner import build_runner, train

    params = TrainParameters.check(values)
    cfg = run_config(params)
    cfg.default_hooks.checkpoint.update(by_epoch=False, interval=interval, max_keep_ckpts=keep)
    if processes:
        cfg.launcher = "pytorch"
    Trouble.die, Trouble.full = die, full
    runner = build_runner(params, cfg)
    runner.summary = train(runner)
    return runner


def start(runs, processes=1):
    """Start processes that train the runs, one run after the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | dict(OMP_NUM_THREADS="1")
    several = dict(WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)) if processes > 1 else {}
    call = [sys.executable, __file__, json.dumps(runs)]
    ranks = [dict(RANK=str(rank), LOCAL_RANK=str(rank)) if several else {} for rank in range(processes)]
    return [subprocess.Popen(call, env=environment | several | rank, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for rank in ranks]


def finish(started):
    """Wait for processes; their exit statuses and outputs."""
    outputs = [process.communicate(timeout=200)[0] for process in started]
    return [process.returncode for process in started], outputs


def course(folder):
    """What a run recorded in each iteration and what must not differ after a resume."""
    from cmtaqr.engine.hooks import read_history
    names = ("iter", "loss", "loss_fit", "grad_norm", "lr/base", "epoch", "samples")
    return [[record.get(name) for name in names] for record in read_history(folder)["records"]]


def assert_equal_runs(one, other):
    """Weights, BatchNorm's statistics and optimiser state of two runners are the same in every bit."""
    def everything(runner):
        model, state = getattr(runner.model, "module", runner.model), runner.optim_wrapper.optimizer.state_dict()["state"]
        return [*model.state_dict().values(), *(value for entry in state.values() for value in entry.values())]
    one, other = everything(one), everything(other)
    assert len(one) == len(other) and all(map(torch.equal, one, other))


if __name__ == "__main__":
    from resume_engine import train_toy  # the classes of the module, which the config imports too, not those of __main__
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several:
        torch.distributed.init_process_group("gloo")
    for run in json.loads(sys.argv[1]):
        result = train_toy(processes=several, **run)
        state = [*result.model.state_dict().values()]
        torch.save(state, Path(run["work_dir"], f"weights{os.environ.get('RANK', 0)}.pth"))
        Path(run["work_dir"], f"summary{os.environ.get('RANK', 0)}.json").write_text(json.dumps(result.summary))
