"""Faults of a run: a full disk, samples that cannot be read, losses that are not finite, lost workers, too little memory."""
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmengine", reason='needs the extra: pip install "cmtaqr[detector]"')

from mmengine.config import Config  # noqa: E402
from mmengine.registry import DATASETS  # noqa: E402
from mmengine.runner import Runner  # noqa: E402
from mmengine.visualization import LocalVisBackend, TensorboardVisBackend  # noqa: E402

import toy_engine  # noqa: E402
from cmtaqr.engine import launch, safe_files  # noqa: E402
from cmtaqr.engine.causes import LostProcess, OutOfMemory  # noqa: E402
from cmtaqr.engine.configure import run_config  # noqa: E402
from cmtaqr.engine.faults import QuarantineFull  # noqa: E402
from cmtaqr.engine.parameters import TrainParameters  # noqa: E402
from cmtaqr.engine.runner import FileLogRunner, build_runner  # noqa: E402
from cmtaqr.engine.safe_files import checkpoints, newest_checkpoint  # noqa: E402
from cmtaqr.engine.samples import PlacedSampler  # noqa: E402
from cmtaqr.engine.train import main as train_main  # noqa: E402
from resume_engine import NoisyPoints, assert_equal_runs, course, finish, start, train_toy, write_toy  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parent.parent


def test_full_disk_keeps_the_checkpoint_before(tmp_path):
    values = write_toy(tmp_path) | dict(max_iters=12)
    (status,), (output,) = finish(start([values | dict(full=[4, 8])]))
    assert status == 0, output
    assert "iter_6.pth not written: File too large" in output and "iter_3.pth, is kept" in output
    assert [file.name for file in checkpoints(tmp_path / "toy")] == ["iter_12.pth", "iter_9.pth"]
    values["work_dir"] = str(tmp_path / "end")
    (status,), (output,) = finish(start([values | dict(full=[10, 99])]))
    assert status == 1 and "the last checkpoint was not saved" in output
    assert newest_checkpoint(tmp_path / "end").name == "iter_9.pth"


FULL_DISK = """
import os
from pathlib import Path
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module(force=True)
class FullDisk(Hook):
    priority = "VERY_HIGH"

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        file = Path(runner.work_dir).parent / "filled"
        if os.environ.get("RANK", "0") == "0" and runner.iter == 14:
            with open(file, "wb", buffering=0) as stream:
                for size in (4096, 1):
                    try:
                        while True:
                            stream.write(b"0" * size)
                    except OSError:
                        continue
        if os.environ.get("RANK", "0") == "0" and runner.iter == 44:
            file.unlink()
"""


@pytest.fixture
def toy(tmp_path):
    """A toy config that writes all that a real one writes, after each iteration; the words of its command line."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.pkl").touch()
    (tmp_path / "full_disk.py").write_text(FULL_DISK)
    imports = 'dict(imports=["cmtaqr.engine", "toy_engine", "full_disk"], allow_failed_imports=False)'
    hooks = '_base_.custom_hooks + [dict(type="FullDisk"), dict(type="StatusHook", seconds=0.0)]'
    text = toy_engine.CONFIG.format(bases=ROOT / "cmtaqr/configs/_base_") + "default_hooks = dict(logger=dict(interval=1))\n"
    (tmp_path / "toy.py").write_text(text)
    (tmp_path / "full.py").write_text(text + f"custom_imports = {imports}\ncustom_hooks = {hooks}\n")
    return [f"data_root={tmp_path / 'data'}", "max_iters=48", "device=cpu"]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_disk_that_is_full_for_a_while(tmp_path, toy, processes):
    """A real one, of a megabyte: log, scalars, history, status, output of the processes, two checkpoints cannot be written."""
    apart = ["unshare", "-m"] if os.getuid() == 0 else ["unshare", "-rm"]
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs"]
    if not shutil.which("unshare") or subprocess.run([*apart, *mount, tmp_path / "data"], capture_output=True).returncode:
        pytest.skip("needs a small disk: a user that may mount a tmpfs in a namespace (unshare -m)")
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    words = [sys.executable, "-m", "cmtaqr.engine.train", str(tmp_path / "full.py"), f"work_dir={disk / 'run'}", *toy]
    words += ["--nproc", str(processes)]
    script = f'{" ".join(mount)} {disk} && "$@"; status=$?; cp -r {disk}/run {kept}; exit $status'
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    done = subprocess.run([*apart, "sh", "-c", script, "sh", *words], env=os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=path),
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [file.name for file in checkpoints(kept)] == ["iter_48.pth", "iter_12.pth"]
    assert len(course(kept)) == 48 and json.loads((kept / "status.json").read_text())["step"] == 48
    scalars, = kept.glob("*/vis_data/scalars.json")
    steps = [json.loads(line)["step"] for line in scalars.read_text().splitlines() if line.startswith("{") and line.endswith("}")]
    assert steps[-1] == 48 and len(steps) < 48
    if processes == 1:
        assert "iter_24.pth not written: No space left on device" in done.stdout
        assert "scalars of TensorboardVisBackend not written, the run goes on: No space left on device" in done.stdout


def test_what_a_run_can_do_without_does_not_end_it(tmp_path, toy, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    board = TensorboardVisBackend
    for owner, name in ((LocalVisBackend, "add_scalars"), (board, "add_scalars"), (board, "close"), (launch, "write_status")):
        monkeypatch.setattr(owner, name, full)
    config = tmp_path / "toy.py"
    config.write_text(config.read_text() + 'custom_hooks = _base_.custom_hooks + [dict(type="StatusHook")]\n')
    safe_files._told.clear()
    assert train_main([str(config), f"work_dir={tmp_path / 'run'}", *toy]) == 0
    said = capsys.readouterr().out
    for what in ("scalars of LocalVisBackend", "scalars of TensorboardVisBackend", "status.json"):
        assert said.count(f"{what} not written, the run goes on: No space left on device") == 1, said
    assert newest_checkpoint(tmp_path / "run").name == "iter_48.pth"


def test_unreadable_samples(tmp_path):
    values = write_toy(tmp_path, "some", unreadable=[4]) | dict(epochs=2)
    one = train_toy(**values)
    other = train_toy(**values | dict(work_dir=str(tmp_path / "again"), num_workers=2))
    assert_equal_runs(one, other)
    events = [json.loads(line) for line in (tmp_path / "some" / "faults.jsonl").read_text().splitlines()]
    assert {event["name"] for event in events} == {"token4"} and "image 4.jpg is truncated" in events[0]["reason"]
    assert len(course(tmp_path / "some")) == 12 and all(samples in (4, 2) for *_, samples in course(tmp_path / "some"))
    with pytest.raises(QuarantineFull, match="2 samples cannot be read, at most 1 may be.*restore them and resume"):
        train_toy(**write_toy(tmp_path, "many", unreadable=[4, 5]) | dict(epochs=2))


def test_resampling_does_not_raise_the_limit(tmp_path):
    """Ten classes make ten places of each sample; two of 22 samples are too many all the same."""
    pytest.importorskip("mmdet3d.datasets", reason='needs the extra: pip install "cmtaqr[detector]"')

    @DATASETS.register_module(force=True)
    class ClassedPoints(NoisyPoints):
        metainfo = dict(classes=tuple(map(str, range(10))))

        def full_init(self):
            pass

        def get_cat_ids(self, index):
            return set(range(10))

    values = write_toy(tmp_path, unreadable=[4, 5]) | dict(epochs=1)
    config = tmp_path / "toy.py"
    config.write_text(config.read_text().replace('dict(type="NoisyPoints"', 'dict(type="mmdet3d.CBGSDataset", dataset=dict(type='
                                                 '"mmengine.ClassedPoints"').replace("deadly=[])", "deadly=[]))"))
    with pytest.raises(QuarantineFull, match="2 samples cannot be read, at most 1 may be"):
        train_toy(**values)


def test_two_processes_count_unreadable_samples_together(tmp_path):
    """Each meets one: as many as one process may meet, and too many for the data."""
    first = PlacedSampler(range(22), seed=0).order(0)[:2]
    one = write_toy(tmp_path, "one", unreadable=first[1:]) | dict(max_iters=4, batch_size=11)
    status, output = finish(start([one], 2))
    assert status == [0, 0], output
    summaries = [json.loads((tmp_path / "one" / f"summary{rank}.json").read_text()) for rank in range(2)]
    assert [s["quarantined_samples"] for s in summaries] == [1, 1] and not (tmp_path / "one" / "faults.jsonl").is_file()
    assert f"sample token{first[1]} cannot be read" in output[0], "the first process says what the other met"
    assert [s["epochs"] for s in summaries] == [4.0, 4.0] and [epoch for *_, epoch, _ in course(tmp_path / "one")] == [1, 2, 3, 4]
    status, output = finish(start([write_toy(tmp_path, "both", unreadable=first) | dict(max_iters=4)], 2))
    assert status == [1, 1] and all("2 samples cannot be read, at most 1 may be" in text for text in output), output


def test_counts_go_on_after_a_resume(tmp_path):
    values = write_toy(tmp_path, spoiled=["token5"], unreadable=[4]) | dict(epochs=3)
    whole = train_toy(**values)
    killed = values | dict(work_dir=str(tmp_path / "killed"))
    status, output = finish(start([killed | dict(die=[14, "before_train_iter"])]))
    assert status == [-signal.SIGKILL], output
    resumed = train_toy(**killed, resume=True)
    assert_equal_runs(resumed, whole)
    assert (tmp_path / "killed" / "faults.jsonl").read_text() == (tmp_path / "toy" / "faults.jsonl").read_text()
    hooks = [next(hook for hook in runner.hooks if type(hook).__name__ == "FaultHook") for runner in (whole, resumed)]
    assert hooks[0].state_dict() == hooks[1].state_dict() and resumed.optim_wrapper.skipped == whole.optim_wrapper.skipped == 3


def test_lost_worker_ends_with_its_cause(tmp_path):
    with pytest.raises(LostProcess, match="killed by signal: Killed: the system or somebody killed it, .*fewer num_workers"):
        train_toy(**write_toy(tmp_path, deadly=[9]) | dict(epochs=1, num_workers=1))


def test_lost_process_ends_the_other_with_its_cause(tmp_path):
    status, output = finish(start([write_toy(tmp_path) | dict(epochs=2, die=[4, "before_train_iter", 1])], 2))
    assert status == [1, -signal.SIGKILL] and "LostProcess: process 0 lost another process of the run" in output[0], output


def test_out_of_memory_before_and_without_training(monkeypatch, tmp_path):
    """An evaluation, and a model that does not fit, get the report of a training, and advice of their own."""
    class Large(torch.nn.Linear):
        def to(self, *_):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has ...")

    def full(runner):
        runner.model.to("cuda")

    monkeypatch.setattr(Runner, "wrap_model", lambda self, cfg, model: model)
    monkeypatch.setattr(Runner, "test", full)
    runner = object.__new__(FileLogRunner)  # its constructor needs data
    runner.cfg = Config(dict(device="cuda", test_dataloader=dict(batch_size=2)))
    runner._distributed, runner.model, runner.optim_wrapper = False, Large(2**10, 2**10), None
    runner._work_dir = str(tmp_path)
    with pytest.raises(OutOfMemory, match="(?s)moving the model to the GPU: CUDA out of memory.*a smaller model, or a GPU"):
        runner.wrap_model(None, runner.model)
    with pytest.raises(OutOfMemory, match="(?s)total.*first helps most: batch_size below 2; precision=bf16; smaller images"):
        runner.test()


@pytest.mark.gpu
def test_out_of_memory_on_a_gpu(tmp_path, cuda):
    class Greedy(torch.nn.Module):
        def forward(self, x):
            return torch.empty(2**44, device=cuda)

    params = TrainParameters.check(write_toy(tmp_path) | dict(max_iters=3, device="cuda"))
    runner = build_runner(params, run_config(params))
    runner.model.head.register_forward_pre_hook(lambda *_: Greedy()(None))
    message = "(?s)out of GPU memory in the forward pass.*Tried to allocate.*activations and the rest.*batch_size"
    with pytest.raises(OutOfMemory, match=message):
        runner.train()
