"""Killed at any moment and resumed, a run gives the same numbers; what cannot give them is refused."""
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmengine", reason='needs the extra: pip install "cmtaqr[detector]"')

from cmtaqr.engine import state  # noqa: E402
from cmtaqr.engine.configure import run_config  # noqa: E402
from cmtaqr.engine.folder import entered, release  # noqa: E402
from cmtaqr.engine.parameters import EvalParameters, ParameterError, TrainParameters  # noqa: E402
from cmtaqr.engine.safe_files import BrokenCheckpoint, checkpoints, newest_checkpoint, verify  # noqa: E402
from cmtaqr.engine.state import ResumeError  # noqa: E402
from cmtaqr.engine.worker import run, run_launched, write_sbatch  # noqa: E402
from resume_engine import assert_equal_runs, course, finish, start, train_toy, write_toy  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("length", [dict(epochs=20), dict(max_iters=120)], ids=["epochs", "iterations"])
def test_killed_at_a_random_moment_and_resumed(tmp_path, length):
    values = write_toy(tmp_path) | length | dict(interval=7)
    reference = train_toy(**values)
    killed = values | dict(work_dir=str(tmp_path / "killed"))
    process, = start([killed])
    due, seen = random.randrange(14, 99, 7), {}
    while max(seen, default=0) < due and process.poll() is None:
        time.sleep(0.01)
        for file in (tmp_path / "killed").glob("iter_*.pth"):
            seen.setdefault(int(file.stem.removeprefix("iter_")), time.perf_counter())
    pace = (seen[max(seen)] - seen[min(seen)]) / max(1, max(seen) - min(seen))
    time.sleep(random.uniform(0, 7 * pace))  # anywhere between two checkpoints, however fast the machine is
    process.send_signal(signal.SIGKILL)
    (status,), (output,) = finish([process])
    assert status == -signal.SIGKILL, output
    at = torch.load(newest_checkpoint(tmp_path / "killed"), weights_only=False)["meta"]["iter"]
    resumed = train_toy(**killed, resume=True, num_workers=2)
    assert course(tmp_path / "killed") == course(tmp_path / "toy"), f"resumed at iteration {at}"
    assert_equal_runs(resumed, reference)
    assert not list((tmp_path / "killed").glob(".*.part"))


def test_killed_before_and_after_a_checkpoint(tmp_path):
    values = write_toy(tmp_path) | dict(epochs=2)
    newest = dict(before_save_checkpoint="iter_6.pth", after_train_iter="iter_9.pth")
    whole = train_toy(**values)
    started = [start([values | dict(work_dir=str(tmp_path / stage), die=[8, stage])])[0] for stage in newest]
    status, output = finish(started)
    assert status == [-signal.SIGKILL] * 2, output
    for stage, name in newest.items():
        assert newest_checkpoint(tmp_path / stage).name == name
        assert_equal_runs(train_toy(**values | dict(work_dir=str(tmp_path / stage), resume=True)), whole)
        assert course(tmp_path / stage) == course(tmp_path / "toy")


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
        one, other = (torch.load(tmp_path / name / f"weights{rank}.pth") for name in ("killed", "toy"))
        assert len(one) == len(other) and all(map(torch.equal, one, other))

    one, other = (torch.load(tmp_path / "spoiled" / f"weights{rank}.pth") for rank in range(2))
    assert all(map(torch.equal, one[:4] + one[7:], other[:4] + other[7:]))  # BatchNorm's statistics are each process's own
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
        assert_equal_runs(run, runs[0])


# The folder of another run


def files(folder):
    """What a run has left in its folder, but the lock and the logs, of which each start writes its own."""
    found = [f for f in folder.rglob("*") if f.is_file() and f.name != ".lock" and f.suffix != ".log"]
    return {f: f.read_bytes() for f in found if "ranks" not in f.parts}


def test_a_run_is_not_written_over(tmp_path):
    values = write_toy(tmp_path) | dict(max_iters=6)
    train_toy(**values)
    (tmp_path / "toy" / "result.json").write_text("{}")
    before = files(tmp_path / "toy")
    with pytest.raises(ParameterError, match="toy holds iter_6.pth of an earlier run, .*resume=True.*another work_dir, or remove"):
        train_toy(**values | dict(max_iters=40, seed=3))
    params = TrainParameters.check(values | dict(nproc=2, seed=3))
    with pytest.raises(ParameterError, match="iter_6.pth of an earlier run"):
        run_launched("train", params, run_config(params))
    with pytest.raises(ParameterError, match="iter_6.pth of an earlier run"):
        write_sbatch("train", params, run_config(params))
    assert files(tmp_path / "toy") == before and not (tmp_path / "toy" / "ranks").exists()
    shutil.rmtree(tmp_path / "toy")
    assert train_toy(**values).iter == 6


def test_an_evaluation_does_not_take_the_folder_of_a_training(tmp_path):
    values = write_toy(tmp_path)
    train_toy(**values, max_iters=3)
    folder = Path(values["work_dir"])
    with open(values["config"], "a") as config:
        config.write('test_dataloader = dict(num_workers=0, dataset=dict(type="NoisyPoints"))\n'
                     'test_evaluator = dict(type="Metric")\n')
    for file in (folder / "result.json", tmp_path / "weights.pth"):
        file.touch()
    for saved in (True, False):
        before = files(folder)
        for nproc in (1, 2):
            params = EvalParameters.check(values | dict(checkpoint=str(tmp_path / "weights.pth"), nproc=nproc))
            with pytest.raises(ParameterError, match="toy holds a training, .* another work_dir, .* work_dir=.*toy/eval"):
                run("eval", params, run_config(params))
        with pytest.raises(ParameterError, match="toy holds a training"):
            write_sbatch("eval", params, run_config(params))
        assert files(folder) == before
        checkpoints(folder)[0].unlink() if saved else None  # as of a training at work that has saved nothing yet


@pytest.mark.parametrize("processes", [1, 2])
def test_two_runs_at_once_in_one_folder(tmp_path, processes):
    """The second is refused and changes nothing; a killed one lets go at once."""
    values = write_toy(tmp_path) | dict(max_iters=400)
    first = start([values], processes)
    while not checkpoints(tmp_path / "toy") and first[0].poll() is None:
        time.sleep(0.02)
    for file in checkpoints(tmp_path / "toy") if processes == 1 else ():
        file.unlink()  # also where nothing is saved yet
    with pytest.raises(ParameterError, match=f"a run is at work in .*toy .process {first[0].pid}.: wait for it, end it, or"):
        train_toy(**values | dict(resume=processes == 2))
    params = TrainParameters.check(values | dict(nproc=2, resume=processes == 2))
    with pytest.raises(ParameterError, match="a run is at work in .*toy"):
        run_launched("train", params, run_config(params))
    assert not (tmp_path / "toy" / "ranks").exists()
    for process in first:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with entered(tmp_path / "toy", resume=True):
        release(tmp_path / "toy")


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


@pytest.mark.parametrize("processes", [1, 2])
def test_a_refused_resume_changes_no_file(tmp_path, processes):
    """The reason is one line, without a traceback; accepted, the same resume replaces the result."""
    values = write_toy(tmp_path) | dict(max_iters=6, nproc=processes)

    def go(**changes):
        params = TrainParameters.check(values | changes)
        return run("train", params, run_config(params))

    go()
    before = files(tmp_path / "toy")
    written = {file.name for file in before}
    assert {"result.json", "run.json", "tables.json", "toy.py", "history.json"} <= written
    assert ("status.json" in written) == (processes == 2)
    message = f"^{tmp_path}/toy/iter_6.pth: .* optim_wrapper.optimizer.lr was 0.01, is 5.0.*$"
    with pytest.raises(ValueError if processes == 1 else RuntimeError, match=message):
        go(resume=True, lr=5.0)
    assert files(tmp_path / "toy") == before
    again = go(resume=True)
    assert again["training"]["samples"] == 0, "it had come to its end"
    assert again["resumed"]["parameters"]["resume"] is False and again["resumed"]["training"]["samples"] > 0
    assert json.loads((tmp_path / "toy" / "result.json").read_text())["parameters"]["resume"] is True


def test_refused_and_passed_over(tmp_path, monkeypatch):
    values = write_toy(tmp_path) | dict(max_iters=6)
    train_toy(**values)
    folder = tmp_path / "toy"
    shutil.copytree(folder, tmp_path / "kept")
    before = files(folder)

    def resumed(**changes):
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "kept", folder)
        return train_toy(**values | dict(resume=True) | changes)

    for changes, message in ((dict(batch_size=2), "batch size was 4, is 2"), (dict(seed=5), "seed was 0, is 5"),
                             (dict(max_iters=None, epochs=2), "runs by was iterations, is epochs"),
                             (dict(lr=5.0), "optim_wrapper.optimizer.lr was 0.01, is 5.0"),
                             (dict(precision="bf16"), "precision was fp32, is bf16"),
                             (dict(max_iters=8), "train_cfg.max_iters was 6, is 8.* or start a new run from its weights")):
        with pytest.raises(ResumeError, match=f"iter_6.pth: .*{message}"):
            resumed(**changes)
        assert files(folder) == before
    installed = state.versions() | {"torch": "9.9", "papermill": "1", "spconv-cu999": "2"}
    monkeypatch.setattr(state, "versions", lambda: installed)
    with pytest.raises(ResumeError, match=r"torch was .*, is 9.9.*spconv-cu999 was None, is 2.*exact_resume = False"):
        resumed()
    Path(values["config"]).write_text(Path(values["config"]).read_text() + "exact_resume = False\n")
    assert resumed(checkpoint=str(folder / "iter_3.pth")).iter == 6
    monkeypatch.undo()
    monkeypatch.setenv("CMTAQR_COMMIT", "another")
    resumed()
    logged = "".join(p.read_text() for p in folder.rglob("*.log"))
    assert re.search("resumed with something else: commit was .*, is another", logged)
    monkeypatch.undo()

    newest = tmp_path / "kept" / "iter_6.pth"
    newest.write_bytes(newest.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match=r"passed over: .*iter_6.pth: it is cut off. Taken instead: .*iter_3.pth"):
        assert resumed().iter == 6
    with pytest.raises(BrokenCheckpoint, match="iter_6.pth is broken"):
        verify(newest)
    with pytest.raises(BrokenCheckpoint, match="iter_6.pth is broken: it is cut off"):
        resumed(resume=False, checkpoint=str(newest), work_dir=str(tmp_path / "new"))
    (tmp_path / "kept" / "iter_3.pth").write_text("no checkpoint")
    message = "no checkpoint in .* is intact: .*iter_3.pth: torch.save did not write it; .*iter_6.pth: it is cut off"
    with pytest.raises(BrokenCheckpoint, match=message):
        resumed()


def test_a_run_at_a_constant_rate_may_go_on_for_longer(tmp_path):
    values = write_toy(tmp_path)
    Path(values["config"]).write_text(Path(values["config"]).read_text() + "param_scheduler = []\n")
    whole = train_toy(**values | dict(max_iters=9, work_dir=str(tmp_path / "whole")))
    train_toy(**values, max_iters=6)
    assert_equal_runs(train_toy(**values, max_iters=9, resume=True), whole)
    before = files(tmp_path / "toy")
    with pytest.raises(ResumeError, match="has done 9 iterations, and 4 are asked for"):
        train_toy(**values, max_iters=4, resume=True)
    assert files(tmp_path / "toy") == before


def test_a_run_at_its_end_keeps_its_checkpoint_in_the_result(tmp_path):
    values = write_toy(tmp_path) | dict(max_iters=6)
    done, again = train_toy(**values).summary, train_toy(**values, resume=True).summary
    assert again["checkpoint"] == done["checkpoint"] == str(tmp_path / "toy" / "iter_6.pth")


def test_a_broken_record_is_named(tmp_path):
    values = write_toy(tmp_path) | dict(max_iters=6)
    train_toy(**values)
    for name in ("history.json", "run.json"):
        (tmp_path / "toy" / name).write_text("")
        with pytest.raises(ValueError, match=f"{name} is broken .*: restore it, or remove it"):
            train_toy(**values, resume=True)
        (tmp_path / "toy" / name).unlink()


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
    assert_equal_runs(resumed, whole)
