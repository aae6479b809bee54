"""Faults of a run: a full disk, samples that cannot be read, losses that are not finite, lost workers, too little memory."""
import json
import signal

import pytest
import torch

pytest.importorskip("mmengine", reason='needs the extra: pip install "cmtaqr[detector]"')

from cmtaqr.engine.causes import LostProcess, OutOfMemory  # noqa: E402
from cmtaqr.engine.configure import run_config  # noqa: E402
from cmtaqr.engine.faults import QuarantineFull  # noqa: E402
from cmtaqr.engine.parameters import TrainParameters  # noqa: E402
from cmtaqr.engine.runner import build_runner  # noqa: E402
from cmtaqr.engine.safe_files import checkpoints, newest_checkpoint  # noqa: E402
from cmtaqr.engine.samples import PlacedSampler  # noqa: E402
from resume_engine import assert_equal_runs, course, finish, start, train_toy, write_toy  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


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
