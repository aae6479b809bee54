"""Runs repeated from their records: the same bits on a CPU in one process and in two, and on a GPU with deterministic kernels."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmengine", reason='needs the extra: pip install "cmtaqr[detector]"')

import cmtaqr  # noqa: E402
import toy_engine  # noqa: E402
from cmtaqr.engine.hooks import read_history  # noqa: E402
from cmtaqr.engine.parameters import EvalParameters, ParameterError  # noqa: E402
from cmtaqr.engine.record import starts  # noqa: E402
from cmtaqr.engine.rerun import compare_losses, main, read_run, rerun  # noqa: E402
from cmtaqr.engine.train import main as train_main  # noqa: E402


@pytest.fixture
def toy(tmp_path):
    """A toy config and its data."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.pkl").touch()
    (tmp_path / "toy.py").write_text(toy_engine.CONFIG.format(bases=Path(cmtaqr.__file__).parent / "configs" / "_base_"))
    return tmp_path


def train(toy, *words):
    run = toy / "run"
    settings = f"data_root={toy / 'data'}", f"work_dir={run}", "max_iters=6", "device=cpu"
    assert train_main([str(toy / "toy.py"), *settings, *words]) == 0
    return run


def last_weights(run):
    return torch.load(next(Path(run).glob("iter_6.pth")), map_location="cpu", weights_only=False)["state_dict"]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_comes_out_again(toy, capsys, monkeypatch, processes):
    run = train(toy, "seed=5", *(["--nproc", "2"] if processes == 2 else []))
    assert read_run(run)[0] == "train" and read_run(run)[1].nproc == processes
    monkeypatch.chdir(run)
    assert main(["."]) == 0
    said = capsys.readouterr().out
    assert "the same numbers" in said and "config," not in said and "torch:" not in said
    again = Path(f"{run}_again")
    one, two = last_weights(run), last_weights(again)
    assert all(torch.equal(one[name], two[name]) for name in one)
    outcome = json.loads((again / "rerun.json").read_text())
    assert outcome["losses"] == dict(iterations=6, equal=True, first_difference=None, largest=0.0)


def test_what_has_changed_is_said_and_found(toy, capsys):
    run = train(toy)
    config = toy / "toy.py"
    config.write_text(config.read_text().replace("lr=0.01", "lr=0.02"))
    record = json.loads((run / "run.json").read_text())
    record["versions"]["numpy"] = "0.9"
    (run / "run.json").write_text(json.dumps(record))
    assert main([str(run), "--today", "--out", str(toy / "other")]) == 2
    said = capsys.readouterr().out
    assert "config, optim_wrapper.optimizer.lr: 0.01 then, 0.02 now" in said and "numpy: 0.9 then" in said
    assert "NOT the same numbers" in said
    outcome = json.loads((toy / "other" / "rerun.json").read_text())
    first, second = (read_history(folder)["records"] for folder in (run, toy / "other"))
    assert outcome["losses"] == compare_losses(first, second) and outcome["losses"]["first_difference"] == 2
    assert main([str(run), "--today", "--out", str(toy / "third"), "--tolerance", "10"]) == 0


@pytest.mark.parametrize("fate, processes", [("edited", 1), ("gone", 1), ("base gone", 1), ("gone", 2)])
def test_the_config_of_the_folder_is_taken_where_the_file_is_another_one(toy, capsys, fate, processes):
    """It has the run's parameters in it, which must not count twice: a scaled learning rate, a stretched schedule."""
    config, base = toy / "toy.py", toy / "base.py"
    config.rename(base)
    config.write_text('_base_ = ["base.py"]\n')
    run = train(toy, "scale_lr=linear", "precision=bf16", *(["--nproc", "2"] if processes == 2 else []))
    if fate == "edited":
        base.write_text(base.read_text().replace("lr=0.01", "lr=0.02").replace("conservative", "aggressive"))
    else:
        (config if fate == "gone" else base).unlink()
    assert main([str(run)]) == 0
    said = capsys.readouterr().out
    expected = dict(edited="config, model.aqr.bias.preset: 'conservative' then, 'aggressive' now",
                    gone=f"config {config} is gone") | {"base gone": "config, cannot be used any more"}
    assert expected[fate] in said and f"config: the one kept in {run} is taken" in said and "with that one too" not in said
    again = Path(f"{run}_again")
    assert all(map(torch.equal, last_weights(run).values(), last_weights(again).values()))
    assert [r["lr/base"] for r in read_history(again)["records"]] == [r["lr/base"] for r in read_history(run)["records"]]
    if fate == "gone":
        assert main([str(run), "--today", "--out", str(toy / "third")]) == 1 and "leave --today out" in capsys.readouterr().err
        assert rerun(again, toy / "third")["same"], "a repetition can be repeated too"


def test_a_run_that_was_stopped_and_resumed_is_repeated_as_a_whole(toy, monkeypatch, capsys):
    """From the weights it was started with, wherever it was resumed from, and from another folder than it was typed in."""
    first = train(toy, "seed=7").rename(toy / "first")
    monkeypatch.chdir(toy)
    words = ["toy.py", "data_root=data", "max_iters=6", "device=cpu", "work_dir=tuned"]
    assert train_main([*words, "checkpoint=first"]) == 0
    step = next(file for file in (toy / "tuned").glob("*.pth") if file.name != "iter_6.pth")
    (toy / "tuned" / "iter_6.pth").unlink()
    assert train_main([*words, "resume=true"]) == 0
    assert train_main([*words, "resume=true", f"checkpoint=tuned/{step.name}"]) == 0
    kind, params, record = read_run(toy / "tuned")
    assert (params.checkpoint, params.resume) == (str(first), False) and len(starts(record)) == 3
    monkeypatch.chdir(toy / "data")
    assert main([str(toy / "tuned")]) == 0 and "the same numbers" in capsys.readouterr().out


def test_a_run_that_went_on_in_a_new_folder_goes_on_again(toy):
    stopped = train(toy).rename(toy / "stopped")
    step = next(file for file in stopped.glob("*.pth") if file.name != "iter_6.pth")
    run = train(toy, "resume=true", f"checkpoint={step}")
    assert rerun(run, toy / "again")["same"]
    for repeated in (run, stopped):  # the one that was resumed would go on from them
        with pytest.raises(ParameterError, match="again holds the checkpoints of a training already: choose another folder"):
            rerun(repeated, toy / "again")
    with pytest.raises(ParameterError, match="tolerance -1: a relative difference is at least 0"):
        rerun(run, toy / "third", tolerance=-1)
    record = json.loads((run / "run.json").read_text())
    record["parameters"]["checkpoint"] = None
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(ParameterError, match="does not tell how the run began"):
        rerun(run, toy / "third")


def test_several_nodes_become_processes_of_one(toy):
    run = train(toy, "--nproc", "2")
    record = json.loads((run / "run.json").read_text())
    assert "cmtaqr" not in record["command"][0] and "worker" not in " ".join(record["command"]), "what was typed, not what it started"
    record["parameters"] |= dict(nproc=1, nodes=2, launcher="slurm", port=29500)
    (run / "run.json").write_text(json.dumps(record))
    outcome = rerun(run, toy / "again")
    assert outcome["same"] and "nodes: 2 with 1 process(es) each then, 1 with 2 now" in outcome["differences"]


def test_refusals(toy):
    with pytest.raises(FileNotFoundError, match="give the work_dir of a run"):
        rerun(toy, toy / "out")
    run = train(toy)
    with pytest.raises(ParameterError, match="is the run itself"):
        rerun(run, run)
    (run / "history.json").write_text("{")
    with pytest.raises(ValueError, match="history.json is broken"):
        rerun(run, toy / "out")
    assert not (toy / "out").exists()
    record = json.loads((run / "run.json").read_text())
    evaluation = toy / "eval"
    evaluation.mkdir()
    parameters = EvalParameters(config=str(toy / "toy.py"), untrained=True).asdict()
    (evaluation / "run.json").write_text(json.dumps(record | dict(parameters=parameters)))
    with pytest.raises(FileNotFoundError, match="the evaluation there did not come to its end"):
        rerun(evaluation, toy / "out")
    record["parameters"]["magic"] = 1
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(ParameterError, match="unknown parameter 'magic'"):
        rerun(run, toy / "out")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gpu_deterministic_run_comes_out_again(tmp_path, cuda, precision):
    pytest.importorskip("mmdet3d", reason='needs the extra: pip install "cmtaqr[detector]"')
    from cmtaqr.data.nuscenes import make_infos
    from cmtaqr.data.world import make_world

    make_world(tmp_path / "world", scenes=["scene-0061"], keyframes=8, sweeps=0, image_size=(400, 225), workers=4, progress=False)
    make_infos(tmp_path / "world")
    words = [f"data_root={tmp_path / 'world'}", f"work_dir={tmp_path / 'run'}", "max_iters=12", "deterministic=true",
             f"precision={precision}"]
    call = [sys.executable, "-m"]
    done = subprocess.run([*call, "cmtaqr.engine.train", "cmt_aqr_tiny", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    again = subprocess.run([*call, "cmtaqr.engine.rerun", str(tmp_path / "run")], capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert json.loads((tmp_path / "run_again" / "rerun.json").read_text())["losses"]["equal"]
