"""Killed at any moment and resumed, a run gives the same numbers; what cannot give them is refused; faults are noted, not suffered."""
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmengine", reason='needs the extra: pip install "cmtaqr[detector]"')

from cmtaqr.engine import state  # noqa: E402
from cmtaqr.engine.causes import LostProcess, OutOfMemory  # noqa: E402
from cmtaqr.engine.faults import QuarantineFull  # noqa: E402
from cmtaqr.engine.hooks import read_history  # noqa: E402
from cmtaqr.engine.safe_files import BrokenCheckpoint, checkpoints, newest_checkpoint, verify  # noqa: E402
from cmtaqr.engine.state import ResumeError  # noqa: E402
from resume_engine import train_toy, write_toy  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def start(runs, processes=1):
    """Processes that train the runs, one after the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | dict(PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]), OMP_NUM_THREADS="1")
    several = dict(WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)) if processes > 1 else {}
    call = [sys.executable, str(ROOT / "tests" / "resume_engine.py"), json.dumps(runs)]
    ranks = [dict(RANK=str(rank), LOCAL_RANK=str(rank)) if several else {} for rank in range(processes)]
    return [subprocess.Popen(call, env=environment | several | rank, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for rank in ranks]


def finish(started):
    """Exit statuses and outputs."""
    outputs = [process.communicate(timeout=200)[0] for process in started]
    return [process.returncode for process in started], outputs


def course(folder):
    names = ("iter", "loss", "loss_fit", "grad_norm", "lr/base", "epoch", "samples")
    return [[record[name] for name in names] for record in read_history(folder)["records"]]


def weights(runner):
    model = getattr(runner.model, "module", runner.model)
    return list(model.state_dict().values()) + [value for entry in runner.optim_wrapper.optimizer.state_dict()["state"].values()
                                                for value in entry.values()]


def assert_same(one, other):
    assert len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize("length", [dict(epochs=20), dict(max_iters=120)], ids=["epochs", "iterations"])
def test_killed_at_a_random_moment_and_resumed(tmp_path, length):
    values = write_toy(tmp_path) | length | dict(interval=7)
    reference = train_toy(**values)
    killed = values | dict(work_dir=str(tmp_path / "killed"))
    process, = start([killed])
    while not checkpoints(tmp_path / "killed") and process.poll() is None:
        time.sleep(0.02)
    time.sleep(random.uniform(0, 0.7))
    process.send_signal(signal.SIGKILL)
    (status,), (output,) = finish([process])
    assert status == -signal.SIGKILL, output
    at = torch.load(newest_checkpoint(tmp_path / "killed"), weights_only=False)["meta"]["iter"]
    resumed = train_toy(**killed, resume=True, num_workers=2)
    assert course(tmp_path / "killed") == course(tmp_path / "toy"), f"resumed at iteration {at}"
    assert_same(weights(resumed), weights(reference))
    assert not list((tmp_path / "killed").glob(".*.part"))


@pytest.mark.parametrize("stage", ["before_train_iter", "after_train_iter", "before_save_checkpoint"])
def test_killed_at_every_stage_of_an_iteration(tmp_path, stage):
    values = write_toy(tmp_path) | dict(epochs=2)
    child = os.fork()
    if not child:
        train_toy(**values, die=[8, stage])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert newest_checkpoint(tmp_path / "toy").name == ("iter_9.pth" if stage == "after_train_iter" else "iter_6.pth")
    reference = train_toy(**values | dict(work_dir=str(tmp_path / "whole")))
    assert_same(weights(train_toy(**values, resume=True)), weights(reference))
    assert course(tmp_path / "toy") == course(tmp_path / "whole")


def test_two_processes(tmp_path):
    """Killed and resumed on two processes; and a loss that is not finite on one of them skips the step on both."""
    values = write_toy(tmp_path) | dict(epochs=3)
    spoiled = write_toy(tmp_path, "spoiled", spoiled=["token5"]) | dict(epochs=1)
    killed = values | dict(work_dir=str(tmp_path / "killed"))
    status, output = finish(start([spoiled, values, killed | dict(die=[7, "before_train_iter"])], 2))
    assert status == [-signal.SIGKILL] * 2, output
    processes = torch.load(newest_checkpoint(tmp_path / "killed"), weights_only=False)["exact"]["processes"]
    assert len(processes) == 2 and not torch.equal(*(process["random"]["torch"] for process in processes))
    status, output = finish(start([killed | dict(resume=True)], 2))
    assert status == [0, 0], output
    assert course(tmp_path / "killed") == course(tmp_path / "toy") and len(course(tmp_path / "toy")) == 9
    for rank in range(2):
        assert_same(*(torch.load(tmp_path / name / f"weights{rank}.pth") for name in ("killed", "toy")))

    one, other = (torch.load(tmp_path / "spoiled" / f"weights{rank}.pth") for rank in range(2))
    assert_same(one[:4] + one[7:], other[:4] + other[7:])  # BatchNorm's statistics are each process's own
    assert all(value.isfinite().all() for value in one + other)
    events = [json.loads(line) for line in (tmp_path / "spoiled" / "faults.jsonl").read_text().splitlines()]
    found = [rank for event in events for rank, process in enumerate(event["processes"]) if "token5" in process["samples"]]
    assert len(events) == len(found) == 1 and events[0]["processes"][found[0]]["terms"] == ["loss", "loss_fit"]
    assert events[0]["processes"][1 - found[0]]["terms"] == [] and events[0]["processes"][1 - found[0]]["samples"]

    with pytest.raises(ResumeError, match="processes was 2, is 1. Resume with the settings it was made with"):
        train_toy(**killed, resume=True)


def test_loading_processes_do_not_change_the_numbers(tmp_path):
    values = write_toy(tmp_path) | dict(max_iters=9)
    runs = [train_toy(**values | dict(work_dir=str(tmp_path / str(workers)), num_workers=workers)) for workers in (0, 1, 3)]
    for run in runs[1:]:
        assert_same(weights(run), weights(runs[0]))


def test_full_disk_keeps_the_checkpoint_before(tmp_path):
    values = write_toy(tmp_path) | dict(max_iters=12)
    (status,), (output,) = finish(start([values | dict(full=[4, 8])]))
    assert status == 0, output
    assert "iter_6.pth not written: File too large" in output and "iter_3.pth, is kept" in output
    assert [file.name for file in checkpoints(tmp_path / "toy")] == ["iter_12.pth", "iter_9.pth"]
    values["work_dir"] = str(tmp_path / "end")
    (status,), (output,) = finish(start([values | dict(full=[10, 99])]))
    assert status == 1 and "the last checkpoint was not saved" in output and newest_checkpoint(tmp_path / "end").name == "iter_9.pth"


# Bad input


class Evil:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
def test_foreign_checkpoint_is_never_unpickled_blindly(tmp_path, resume, zipped):
    values = write_toy(tmp_path) | dict(max_iters=2, resume=resume, checkpoint=str(tmp_path / "evil.pth"))
    torch.save(dict(meta=Evil(tmp_path / "owned"), state_dict={}), tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="holds more than weights and was not opened"):
        train_toy(**values)
    assert not (tmp_path / "owned").exists()


def test_refused_and_passed_over(tmp_path, monkeypatch):
    values = write_toy(tmp_path) | dict(max_iters=6)
    train_toy(**values)
    run = tmp_path / "toy"
    shutil.copytree(run, tmp_path / "kept")

    def resumed(**changes):
        shutil.rmtree(run)
        shutil.copytree(tmp_path / "kept", run)
        return train_toy(**values | dict(resume=True) | changes)

    for changes, message in ((dict(batch_size=2), "batch size was 4, is 2"), (dict(seed=5), "seed was 0, is 5"),
                             (dict(max_iters=None, epochs=2), "runs by was iterations, is epochs")):
        with pytest.raises(ResumeError, match=f"iter_6.pth: .*{message}"):
            resumed(**changes)
    monkeypatch.setattr(state, "versions", lambda: dict(torch="9.9", papermill="1"))
    with pytest.raises(ResumeError, match=r"torch was .*, is 9.9.*exact_resume = False"):
        resumed()
    Path(values["config"]).write_text(Path(values["config"]).read_text() + "exact_resume = False\n")
    assert resumed(max_iters=8).iter == 8
    monkeypatch.undo()

    newest = tmp_path / "kept" / "iter_6.pth"
    newest.write_bytes(newest.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match=r"passed over: .*iter_6.pth: it is cut off. Taken instead: .*iter_3.pth"):
        assert resumed().iter == 6
    with pytest.raises(BrokenCheckpoint, match="iter_6.pth is broken"):
        verify(newest)
    with pytest.raises(BrokenCheckpoint, match="iter_6.pth is broken: it is cut off"):
        resumed(resume=False, checkpoint=str(newest))
    (tmp_path / "kept" / "iter_3.pth").write_text("no checkpoint")
    with pytest.raises(BrokenCheckpoint, match="no checkpoint in .* is intact: .*iter_3.pth: torch.save did not write it; .*iter_6.pth: it is cut off"):
        resumed()


# Faults


def test_unreadable_samples(tmp_path):
    values = write_toy(tmp_path, "some", unreadable=[4]) | dict(epochs=2)
    one = train_toy(**values)
    other = train_toy(**values | dict(work_dir=str(tmp_path / "again"), num_workers=2))
    assert_same(weights(one), weights(other))
    events = [json.loads(line) for line in (tmp_path / "some" / "faults.jsonl").read_text().splitlines()]
    assert {event["name"] for event in events} == {"token4"} and "image 4.jpg is truncated" in events[0]["reason"]
    assert len(course(tmp_path / "some")) == 12 and all(samples in (4, 2) for *_, samples in course(tmp_path / "some"))
    with pytest.raises(QuarantineFull, match="2 samples cannot be read, at most 1 may be.*restore them and resume"):
        train_toy(**write_toy(tmp_path, "many", unreadable=[4, 5]) | dict(epochs=2))


def test_counts_go_on_after_a_resume(tmp_path):
    values = write_toy(tmp_path, spoiled=["token5"], unreadable=[4]) | dict(epochs=3)
    whole = train_toy(**values)
    killed = values | dict(work_dir=str(tmp_path / "killed"))
    child = os.fork()
    if not child:
        train_toy(**killed, die=[14, "before_train_iter"])
        os._exit(0)
    os.waitpid(child, 0)
    resumed = train_toy(**killed, resume=True)
    assert_same(weights(resumed), weights(whole))
    assert (tmp_path / "killed" / "faults.jsonl").read_text() == (tmp_path / "toy" / "faults.jsonl").read_text()
    hooks = [next(hook for hook in runner.hooks if type(hook).__name__ == "FaultHook") for runner in (whole, resumed)]
    assert hooks[0].state_dict() == hooks[1].state_dict() and resumed.optim_wrapper.skipped == whole.optim_wrapper.skipped == 3


def test_lost_worker_ends_with_its_cause(tmp_path):
    with pytest.raises(LostProcess, match="killed by signal: Killed: the system or somebody killed it, .*fewer num_workers"):
        train_toy(**write_toy(tmp_path, deadly=[9]) | dict(epochs=1, num_workers=1))


@pytest.mark.gpu
def test_out_of_memory_on_a_gpu(tmp_path, cuda):
    class Greedy(torch.nn.Module):
        def forward(self, x):
            return torch.empty(2**44, device=cuda)

    from cmtaqr.engine.configure import run_config
    from cmtaqr.engine.parameters import TrainParameters
    from cmtaqr.engine.runner import build_runner
    params = TrainParameters.check(write_toy(tmp_path) | dict(max_iters=3, device="cuda"))
    runner = build_runner(params, run_config(params))
    runner.model.head.register_forward_pre_hook(lambda *_: Greedy()(None))
    with pytest.raises(OutOfMemory, match="(?s)out of GPU memory in the forward pass.*Tried to allocate.*activations and the rest.*batch_size"):
        runner.train()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_resumed_on_a_gpu(tmp_path, cuda, precision):
    values = write_toy(tmp_path, spoiled=["token5"]) | dict(epochs=2, device="cuda", deterministic=True, precision=precision)
    whole = train_toy(**values)
    short = values | dict(work_dir=str(tmp_path / "short"))
    train_toy(**short)
    for file in checkpoints(tmp_path / "short")[:1]:
        file.unlink()
    resumed = train_toy(**short, resume=True)
    torch.use_deterministic_algorithms(False)
    assert course(tmp_path / "short") == course(tmp_path / "toy") and whole.optim_wrapper.skipped >= 2
    assert_same(weights(resumed), weights(whole))
