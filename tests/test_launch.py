"""Runs of several processes on a CPU: the numbers of one process, a crash, an interrupt, refusals, and one real detector."""
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmengine", reason='needs the extra: pip install "cmtaqr[detector]"')

import cmtaqr  # noqa: E402
import toy_engine  # noqa: E402
from cmtaqr.engine.hooks import read_history  # noqa: E402
from cmtaqr.engine.train import main as train_main  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
HOOKS = """
import os, signal, time
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module(force=True)
class Crash(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if os.environ.get("RANK") == "1" and runner.iter == 3:
            raise OSError("the disk of rank 1 is gone")

@HOOKS.register_module(force=True)
class Killed(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if os.environ.get("RANK") == "1" and runner.iter == 3:
            os.kill(os.getpid(), signal.SIGKILL)

@HOOKS.register_module(force=True)
class Deaf(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(0.2)

@HOOKS.register_module(force=True)
class Slow(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        time.sleep(0.2)
"""


@pytest.fixture
def toy(tmp_path):
    """A toy config and its data; the rest of a command line of a training on the CPU."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.pkl").touch()
    (tmp_path / "extra_hooks.py").write_text(HOOKS)
    text = toy_engine.CONFIG.format(bases=Path(cmtaqr.__file__).parent / "configs" / "_base_")
    (tmp_path / "toy.py").write_text(text)
    (tmp_path / "sgd.py").write_text(f"{text}optim_wrapper.update(clip_grad=dict(max_norm=1e6), "
                                     'optimizer=dict(_delete_=True, type="SGD", lr=0.01, weight_decay=0.01))\n')
    for name in ("Crash", "Deaf", "Killed", "Slow"):
        hooks = f'custom_hooks = [dict(type="HistoryHook"), dict(type="{name}")]\n'
        imports = 'custom_imports = dict(imports=["cmtaqr.engine", "toy_engine", "extra_hooks"], allow_failed_imports=False)\n'
        (tmp_path / f"{name.lower()}.py").write_text(text + imports + hooks)
    return tmp_path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A synthetic data set whose evaluation has three frames: an odd number for two processes."""
    pytest.importorskip("mmdet3d", reason='needs the extra: pip install "cmtaqr[detector]"')
    from cmtaqr.data.nuscenes import make_infos
    from cmtaqr.data.world import make_world

    world = tmp_path_factory.mktemp("launch") / "world"
    make_world(world, scenes=["scene-0061", "scene-0103"], keyframes=3, sweeps=0, image_size=(400, 225), workers=1,
               progress=False)
    make_infos(world)
    return world


def submission(work_dir):
    """Detections by frame, as an evaluation hands them to the devkit."""
    return json.loads((Path(work_dir) / "nuscenes" / "pred_instances_3d" / "results_nusc.json").read_text())["results"]


def command(folder, config, work_dir, *words):
    """The typed command and its environment."""
    path = os.pathsep.join([str(folder), os.environ["PYTHONPATH"]])
    call = [sys.executable, "-m", "cmtaqr.engine.train", str(folder / f"{config}.py"), f"data_root={folder / 'data'}",
            f"work_dir={work_dir}", "device=cpu", *map(str, words)]
    return dict(args=call, env=os.environ | dict(PYTHONPATH=path, OMP_NUM_THREADS="1"), text=True)


def run(*arguments):
    return subprocess.run(**command(*arguments), capture_output=True)


def running(word):
    """Processes whose command line has a word."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [path.parent.name] if word.encode() in path.read_bytes() else []
        except OSError:
            continue
    return found


def weights(checkpoint):
    return torch.load(checkpoint, map_location="cpu", weights_only=False)["state_dict"]


def test_two_processes_take_the_steps_of_one(toy):
    """With SGD: Adam's steps, and steps of clipped gradients, are the same when all gradients are multiplied by a number."""
    alone = run(toy, "sgd", toy / "alone", "max_iters=8", "batch_size=4")
    both = run(toy, "sgd", toy / "both", "max_iters=8", "batch_size=2", "--nproc", "2")
    assert alone.returncode == both.returncode == 0, alone.stderr + both.stderr
    one, two = (weights(toy / name / "iter_8.pth") for name in ("alone", "both"))
    assert set(one) == set(two)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-6)
    norms = [[record["grad_norm"] for record in read_history(toy / name)["records"]] for name in ("alone", "both")]
    assert len(norms[0]) == 8 and norms[1] == pytest.approx(norms[0], rel=1e-4)
    result = json.loads((toy / "both" / "result.json").read_text())
    assert result["training"]["processes"] == 2 and result["training"]["samples"] == 32
    assert json.loads((toy / "both" / "status.json").read_text())["step"] == 8
    tables = json.loads((toy / "both" / "tables.json").read_text())
    assert [row["part"] for row in tables["model"]] == ["line", "aqr_bias", "total"]
    assert "base" in {g["group"] for g in tables["groups"]}
    assert len(list((toy / "both" / "ranks").rglob("stderr.log"))) == 2


def test_a_crash_in_one_rank_ends_all_and_shows_its_traceback(toy):
    begun = time.perf_counter()
    done = run(toy, "crash", toy / "crash", "max_iters=8", "--nproc", "2")
    assert done.returncode == 1 and "rank 1 failed" in done.stderr
    assert "the disk of rank 1 is gone" in done.stderr and "extra_hooks.py" in done.stderr
    assert time.perf_counter() - begun < 600  # not the half hour of a collective operation's patience


def test_a_killed_rank_is_named_and_not_the_one_that_lost_it(toy):
    done = run(toy, "killed", toy / "killed", "max_iters=8", "--nproc", "2")
    assert done.returncode == 1 and "rank 1 was killed by SIGKILL" in done.stderr
    assert "LostProcess" not in done.stderr


def test_an_interrupt_ends_all_and_the_run_goes_on(toy):
    words = "max_iters=16", "--nproc", "2"
    process = subprocess.Popen(**command(toy, "slow", toy / "slow", *words), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True)
    deadline = time.time() + 600
    while not (toy / "slow" / "iter_4.pth").is_file() and time.time() < deadline:
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "resume=true" in said
    assert running(str(toy / "slow" / "ranks")) == []
    again = run(toy, "slow", toy / "slow", *words, "resume=true")
    assert again.returncode == 0, again.stderr
    whole = run(toy, "slow", toy / "whole", *words)
    assert whole.returncode == 0, whole.stderr
    one, two = (weights(toy / name / "iter_16.pth") for name in ("slow", "whole"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    losses = [[r["loss"] for r in read_history(toy / name)["records"]] for name in ("slow", "whole")]
    assert losses[0] == losses[1] and len(losses[0]) == 16


IMPATIENT = """
import functools, sys
from cmtaqr.engine import launch, train, worker
launch.end_with_agent()  # here: with the test
worker.launch = functools.partial(worker.launch, patience=2)
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
@pytest.mark.parametrize("end, loaders", [("interrupt", 0), ("killed launcher", 0), ("killed agent", 1)])
def test_no_process_is_left_though_none_hears_sigterm(toy, end, loaders):
    """Loading processes hear SIGTERM, and their end would end the others: they are there when nobody sends it."""
    call = command(toy, "deaf", toy / "deaf", "max_iters=4000", f"num_workers={loaders}", "--nproc", "2")
    call["args"][1:3] = ["-c", IMPATIENT]
    job = str(toy / "deaf" / "ranks")
    process = subprocess.Popen(**call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.time() + 600
    while not (toy / "deaf" / "status.json").is_file() and time.time() < deadline:
        time.sleep(0.2)
    agent, = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(running(job)) >= 3 + 2 * loaders  # agent, two processes, their loaders
    target, signalled = {"interrupt": (process.pid, signal.SIGINT), "killed launcher": (process.pid, signal.SIGKILL),
                         "killed agent": (int(agent), signal.SIGKILL)}[end]
    os.kill(target, signalled)
    _, said = process.communicate(timeout=40)
    if end == "interrupt":
        assert process.returncode == 130 and "stopped before the first checkpoint" in said
    if end == "killed agent":
        assert process.returncode == 1 and "the agent, which watches the processes of the run, was killed by SIGKILL" in said
    deadline = time.time() + 40
    while running(job) and time.time() < deadline:
        time.sleep(0.2)
    assert running(job) == []


def test_a_batch_file_does_what_was_typed_wherever_it_is_submitted(toy):
    """With a batch system of a few lines. All paths are relative, and the record has the command of the user."""
    call = command(toy, "toy", toy / "slurm")
    call["args"][3:] = ["toy.py", "data_root=data", "work_dir=slurm", "device=cpu", "max_iters=2", "batch_size=2",
                        "launcher=slurm", "nproc=2"]
    done = subprocess.run(**call, cwd=toy, capture_output=True)
    assert done.returncode == 0, done.stderr
    text = (toy / "slurm" / "run.sbatch").read_text()
    assert "#SBATCH --no-requeue" in text and "resume=true" in text
    place, = re.findall("^#SBATCH --chdir=(.*)$", text, re.MULTILINE)
    for name, script in dict(srun='exec "$@"', scontrol="echo localhost").items():
        (toy / name).write_text(f"#!/bin/sh\n{script}\n")
        (toy / name).chmod(0o755)
    paths = os.pathsep.join([str(toy), str(Path(sys.executable).parent), os.environ["PATH"]])
    system = dict(PATH=paths, SLURM_NNODES="1", SLURM_JOB_ID=str(os.getpid()), SLURM_JOB_NODELIST="localhost")
    done = subprocess.run(["bash", str(toy / "slurm" / "run.sbatch")], env=call["env"] | system, cwd=place, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((toy / "slurm" / "result.json").read_text())
    assert result["training"]["processes"] == 2
    assert Path(result["command"][0]).name == "train.py" and result["command"][1:] == call["args"][3:]


@pytest.mark.parametrize("nproc", [1, 2])
def test_processes_of_another_launcher_are_refused(toy, nproc):
    call = command(toy, "toy", toy / "alone", "max_iters=2", f"nproc={nproc}")
    call["args"][1:2] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run(**call, capture_output=True)
    assert done.returncode != 0 and "this is one of 2 processes" in done.stderr and "nproc=N or launcher=slurm" in done.stderr
    assert not (toy / "alone").exists()


def test_refusals(toy, capsys):
    base = [str(toy / "toy.py"), f"data_root={toy / 'data'}", f"work_dir={toy / 'run'}", "max_iters=2"]
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus:
        assert train_main([*base, "device=cuda", "--nproc", str(gpus + 1)]) == 1
        assert f"torch sees {gpus} GPU(s)" in capsys.readouterr().err
    else:
        assert train_main([*base, "device=cuda", "--nproc", "2"]) == 1
        assert "torch" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert train_main([*base, "device=cpu", "--nproc", "2", "--port", str(port)]) == 1
    assert f"port={port} cannot be used" in capsys.readouterr().err
    assert train_main([*base, "device=cpu", "--nproc", "0"]) == 1
    assert "nproc=0" in capsys.readouterr().err
    assert not (toy / "run").exists()
    file = toy / "file"
    file.touch()
    assert train_main([*base[:2], f"work_dir={file}", "max_iters=2", "device=cpu", "launcher=slurm"]) == 1
    assert f"cannot write in {file}" in capsys.readouterr().err


def test_a_run_that_stops_itself_says_why_in_a_line(toy, capsys):
    hooks = 'custom_hooks = [dict(type="HistoryHook"), dict(type="FaultHook", in_a_row=1)]\nmodel.update(fail_at=2)\n'
    (toy / "nan.py").write_text((toy / "toy.py").read_text() + hooks)
    words = [str(toy / "nan.py"), f"data_root={toy / 'data'}", f"work_dir={toy / 'nan'}", "device=cpu", "max_iters=4"]
    assert train_main(words) == 1
    assert "steps in a row were skipped" in capsys.readouterr().err


def test_evaluation_in_two_processes_gives_the_metrics_of_one(world, tmp_path):
    found = {}
    for nproc in (1, 2):
        words = [sys.executable, "-m", "cmtaqr.engine.eval", "cmt_aqr_tiny", f"data_root={world}", "untrained=true", "device=cpu",
                 f"work_dir={tmp_path / str(nproc)}", "num_workers=0", "batch_size=1", "--nproc", str(nproc)]
        done = subprocess.run(words, env=os.environ | dict(OMP_NUM_THREADS="1"), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found[nproc] = json.loads((tmp_path / str(nproc) / "result.json").read_text())
    assert found[1]["metrics"] == found[2]["metrics"] and found[1]["classes"] == found[2]["classes"]
    assert found[1]["speed"]["frames"] == found[2]["speed"]["frames"] == 3
    assert submission(tmp_path / "1") == submission(tmp_path / "2")
