"""Runs as a caller sees them: notebooks under papermill, refusals, resume, mixed precision, what is written."""
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmengine", reason='needs the extra: pip install "cmtaqr[detector]"')
papermill = pytest.importorskip("papermill", reason='needs the extra: pip install "cmtaqr[dev]"')

import cmtaqr  # noqa: E402
import toy_engine  # noqa: E402
from cmtaqr.engine.configure import run_config  # noqa: E402
from cmtaqr.engine.hooks import read_history  # noqa: E402
from cmtaqr.engine.parameters import (EvalParameters, ParameterError, TrainParameters, check_run_notebook,  # noqa: E402
                                      config_names)
from cmtaqr.engine.runner import build_runner, train  # noqa: E402
from cmtaqr.engine.train import main as train_main  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = {"train": TrainParameters, "eval": EvalParameters}


@pytest.fixture
def toy(tmp_path):
    """Parameters of a toy run: a config file and a data folder with its annotation file."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.pkl").touch()
    config = tmp_path / "toy.py"
    config.write_text(toy_engine.CONFIG.format(bases=Path(cmtaqr.__file__).parent / "configs" / "_base_"))
    return dict(config=str(config), data_root=str(tmp_path / "data"), work_dir=str(tmp_path / "run"), max_iters=6, device="cpu")


def run(values, **changes):
    params = TrainParameters.check(values | changes)
    runner = build_runner(params, run_config(params))
    return runner, train(runner)


def call_papermill(name, output, *arguments, cwd):
    """The command as it is typed, from another folder than the repository."""
    environment = os.environ | dict(OMP_NUM_THREADS="1")
    call = [sys.executable, "-m", "papermill", str(ROOT / "nbs" / f"{name}.ipynb"), str(output), *arguments]
    call += ["--no-progress-bar", "--log-output"]
    return subprocess.run(call, cwd=cwd, env=environment, capture_output=True, text=True)


# Parameters


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_run_notebook_declares_the_parameters(name):
    check_run_notebook(ROOT / "nbs" / f"{name}.ipynb", NOTEBOOKS[name])
    wanted = "config data_root work_dir epochs max_iters seed enable_aqr preset bias_scale min_scale max_scale learnable_scale " \
             "window_size device precision resume checkpoint".split()
    assert set(wanted) <= set(papermill.inspect_notebook(str(ROOT / "nbs" / f"{name}.ipynb")))


def test_misspelt_parameter_stops_papermill_before_anything_runs(tmp_path):
    done = call_papermill("train", "out.ipynb", "-p", "max_iter", "5", cwd=tmp_path)
    assert done.returncode != 0 and "unknown parameter 'max_iter'; did you mean 'max_iters'" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.ipynb"]


def test_every_packaged_config_takes_the_parameters(tmp_path):
    pytest.importorskip("mmdet3d", reason='needs the extra: pip install "cmtaqr[detector]"')
    for split in ("train", "val"):
        (tmp_path / f"nuscenes_infos_{split}.pkl").write_bytes(pickle.dumps(dict(metainfo={}, data_list=[])))
    for name in config_names():
        params = TrainParameters.check(dict(config=name, data_root=str(tmp_path), enable_aqr=True, preset="aggressive",
                                            window_size=[6, 5], max_iters=7, batch_size=2, lr=1e-3, num_workers=0, device="cpu"))
        cfg = run_config(params)
        bias = cfg.model.pts_bbox_head.aqr.bias
        assert (bias.preset, list(bias.window_size), cfg.train_dataloader.batch_size) == ("aggressive", [6, 5], 2)
        assert cfg.train_cfg.max_iters == 7 and cfg.optim_wrapper.optimizer.lr == 1e-3
        plain = run_config(TrainParameters.check(dict(config=name, data_root=str(tmp_path), enable_aqr=False, device="cpu")))
        assert plain.model.pts_bbox_head.aqr is None
        evaluation = run_config(EvalParameters.check(dict(config=name, data_root=str(tmp_path), untrained=True, device="cpu")))
        assert evaluation.train_dataloader is None
        assert evaluation.test_evaluator.ann_file == str(tmp_path / "nuscenes_infos_val.pkl")


def test_each_version_of_aqr_is_built_from_the_parameters(tmp_path):
    pytest.importorskip("mmdet3d", reason='needs the extra: pip install "cmtaqr[detector]"')
    from mmdet3d.registry import MODELS
    for split in ("train", "val"):
        (tmp_path / f"nuscenes_infos_{split}.pkl").write_bytes(pickle.dumps(dict(metainfo={}, data_list=[])))

    def head(**values):
        cfg = run_config(TrainParameters.check(dict(data_root=str(tmp_path), device="cpu") | values))
        return MODELS.build(cfg.model).pts_bbox_head

    assert not head(version=0).with_aqr
    for version in (1, 2):
        built = head(version=version, window_size=[5, 4])
        assert built.aqr_version == version and list(built.aqr_renderer.window_sizes) == [5, 4]
        assert built.aqr_modulator.residual_weight == {1: 1.0, 2: 0.1}[version] and not hasattr(built, "aqr_bias")
    values = dict(bias_form="gaussian", scale_mode="smooth", scale_per="layer", bias_scale=2.0, learnable_scale=False)
    bias = head(version=3, **values).aqr_bias
    assert bias.sigma == (1.0, 1.0) and not bias.is_global and bias.scale_mode == "smooth" and not bias.bias_scale.requires_grad
    torch.testing.assert_close(bias.scale(), torch.tensor([2.0, 2.0]))
    assert head(bias_form="global").aqr_bias.is_global


def test_freezing_by_a_parameter(tmp_path):
    pytest.importorskip("mmdet3d", reason='needs the extra: pip install "cmtaqr[detector]"')
    (tmp_path / "nuscenes_infos_train.pkl").write_bytes(pickle.dumps(dict(metainfo={}, data_list=[])))
    params = [TrainParameters.check(dict(data_root=str(tmp_path), device="cpu", freeze=freeze)) for freeze in (None, True, False)]
    frozen = [list(run_config(p).get("frozen") or []) for p in params]
    assert frozen == [[], ["img_backbone", "pts_voxel_encoder", "pts_middle_encoder", "pts_backbone"], []]


def test_without_mmengine_the_engine_names_the_extra(tmp_path):
    (tmp_path / "mmengine.py").write_text("raise ImportError('not installed')\n")
    done = subprocess.run([sys.executable, "-c", "import cmtaqr.engine"], capture_output=True, text=True, cwd=tmp_path,
                          env=os.environ | dict(PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])))
    assert done.returncode and 'cmtaqr.engine needs mmengine: pip install "cmtaqr[detector]"' in done.stderr


# Training


def test_train_notebook_from_another_folder(toy, tmp_path):
    (tmp_path / "out").mkdir()
    arguments = [a for name in ("config", "max_iters", "device") for a in ("-p", name, str(toy[name]))]
    arguments += ["-p", "data_root", "data", "-p", "preset", "aggressive"]
    done = call_papermill("train", "out/train.ipynb", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "train 6/6 (100 %), loss" in done.stdout + done.stderr, "a terminal shows life"
    out = tmp_path / "out"
    result = json.loads((out / "result.json").read_text())
    assert result["kind"] == "train"
    assert (result["parameters"]["preset"], result["parameters"]["data_root"]) == ("aggressive", "data")
    assert result["training"]["iterations"] == 6 and result["training"]["samples_per_second"] > 0
    assert result["training"]["peak_memory_mib"]["process"] > 0 and Path(result["training"]["checkpoint"]).is_file()
    assert "papermill" in " ".join(result["command"]) and result["versions"]["torch"] == torch.__version__
    assert {"run.json", "history.json", "train.ipynb", "iter_6.pth"} <= {p.name for p in out.iterdir()}
    notebook = json.loads((out / "train.ipynb").read_text())
    outputs = [o for cell in notebook["cells"] for o in cell.get("outputs", [])]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 3, "losses, scale, learning rates"
    printed = "".join(t for o in outputs if o["output_type"] == "stream" for t in o["text"])
    assert len(printed.splitlines()) < 30, printed


def test_resumed_run_equals_uninterrupted_run(toy, tmp_path):
    values = toy | dict(max_iters=8, batch_size=16)
    whole, _ = run(values, work_dir=str(tmp_path / "whole"))
    params = TrainParameters.check(values)
    stopped = build_runner(params, run_config(params))
    stopped.train_loop._max_iters = 4
    stopped.train()
    resumed, summary = run(values, resume=True)
    assert summary["iterations"] == 8 and summary["samples"] == 4 * 16
    first, second = (read_history(tmp_path / name)["records"] for name in ("whole", "run"))
    assert [r["iter"] for r in second] == list(range(1, 9))
    assert [r["loss"] for r in second] == pytest.approx([r["loss"] for r in first], rel=1e-5)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_command_with_resume_behind_it_goes_on_with_its_own_run(toy, tmp_path):
    words = [toy["config"], *(f"{name}={value}" for name, value in toy.items() if name not in ("config", "work_dir"))]
    first, tuned = tmp_path / "first", tmp_path / "tuned"
    assert train_main([*words, f"work_dir={first}"]) == 0
    words += [f"work_dir={tuned}", f"checkpoint={first}"]
    assert train_main(words) == 0
    (tuned / "iter_6.pth").unlink()
    weights = torch.load(next(tuned.glob("*.pth")), weights_only=False)["state_dict"]["line.weight"]
    params = TrainParameters.check(dict(toy, work_dir=str(tuned), checkpoint=str(first), resume=True))
    loaded = run_config(params).load_from
    assert Path(loaded).parent == tuned and torch.equal(torch.load(loaded, weights_only=False)["state_dict"]["line.weight"], weights)
    assert train_main([*words, "resume=true"]) == 0
    assert json.loads((tuned / "run.json").read_text())["resumed"]["parameters"]["checkpoint"] == str(first)
    assert [r["iter"] for r in read_history(tuned)["records"]] == list(range(1, 7))


def test_a_resume_that_could_mean_two_runs_is_refused(toy, tmp_path, capsys):
    run(toy, work_dir=str(tmp_path / "other"))
    run(toy)
    with pytest.raises(ParameterError, match="run holds iter_6.pth, and checkpoint=.*other' is none of its run: leave checkpoint out"):
        run(toy, resume=True, checkpoint=str(tmp_path / "other"))
    moved = dict(toy, resume=True, checkpoint=str(tmp_path / "other" / "iter_6.pth"), work_dir=str(tmp_path / "moved"))
    assert run_config(TrainParameters.check(moved)).load_from == moved["checkpoint"], "a new folder"


def test_another_model_is_not_resumed(toy, tmp_path):
    run(toy)
    with pytest.raises(ValueError, match="model.aqr.bias.max_scale was None, is 9.0. Resume with the settings"):
        run(toy, resume=True, max_scale=9.0)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["parameters"]["max_scale"] is None


def test_same_seed_same_run(toy, tmp_path):
    losses = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(toy, work_dir=str(tmp_path / name), seed=seed, deterministic=True)
        losses.append([r["loss"] for r in read_history(tmp_path / name)["records"]])
    torch.use_deterministic_algorithms(False)
    assert losses[0] == losses[1] != losses[2]


def test_loss_that_is_not_finite_stops_the_run(toy, tmp_path):
    hooks = 'custom_hooks = _base_.custom_hooks + [dict(type="FaultHook", in_a_row=1)]\n'
    Path(toy["config"]).write_text(Path(toy["config"]).read_text() + "model.update(fail_at=3)\n" + hooks)
    with pytest.raises(FloatingPointError, match="iteration 3: .*loss_fit not finite.* Lower lr"):
        run(toy)
    assert read_history(tmp_path / "run")["records"][-1]["loss"] is None


def test_missing_things_name_the_remedy(toy, tmp_path):
    for changes, error, message in [
        (dict(data_root=str(tmp_path / "no")), FileNotFoundError, r"no data folder .*no: .*python -m cmtaqr.data.world"),
        (dict(data_root=str(tmp_path)), FileNotFoundError, r"train.pkl: make it with `python -m cmtaqr.data.nuscenes"),
        (dict(checkpoint=str(tmp_path / "no.pth")), FileNotFoundError, r"no checkpoint .*no.pth"),
        (dict(resume=True), FileNotFoundError, r"no checkpoint in .*: train there first"),
        (dict(device="cuda:99"), ParameterError, r"sees \d+ GPU"),
        (dict(precision="fp16"), ParameterError, r"precision='fp16' needs a GPU"),
        (dict(bias_scale=7.0), ParameterError, r"bias_scale"),
    ]:
        with pytest.raises(error, match=message):
            run(toy, **changes)
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("text, says", [
    ("x = dict(a=1\ny = 2", r"toy.py, line \d+: '\(' was never closed"),
    ("x = nothing", r"toy.py, line \d+: NameError: name 'nothing' is not defined"),
    ("model.update(\n    type='ToyDetectr')", r"toy.py, line \d+: type 'ToyDetectr' is not registered \(mmengine::model\)"),
    ("train_dataloader['dataset'].update(type='ToyPoint')", r"toy.py, line \d+: type 'ToyPoint' is not registered \(mmengine::dataset\)"),
])
def test_a_config_that_cannot_be_read_or_built_is_one_line(toy, capsys, text, says):
    config = Path(toy["config"])
    lines = len(config.read_text().splitlines())
    config.write_text(config.read_text() + text + "\n")
    assert train_main([toy["config"], *(f"{n}={v}" for n, v in toy.items() if n != "config")]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(says, said) and lines < int(re.search(r"line (\d+)", said)[1]) <= lines + 2 and "Traceback" not in said


def test_a_command_line_says_what_a_shell_can_do(toy, capsys):
    for words, message in [(["config=other.py"], "config is given twice: .*toy.py' and config='other.py'"),
                           (["work_dir="], "work_dir is empty: give a value, or leave it out"),
                           (["compile=image"], r"in a shell as 'compile=\[image, decoder\]'"),
                           (["device=cuda:3", "nproc=2"], "device='cuda:3' is one GPU, .* CUDA_VISIBLE_DEVICES")]:
        assert train_main([toy["config"], f"data_root={toy['data_root']}", *words]) == 1
        assert re.search(message, capsys.readouterr().err)


def test_an_interrupt_says_whether_there_is_a_checkpoint(toy, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr("cmtaqr.engine.train.run", interrupted)
    words = [toy["config"], *(f"{name}={value}" for name, value in toy.items() if name != "config")]
    assert train_main(words) == 130
    assert capsys.readouterr().err == "stopped before the first checkpoint was saved: the same command begins anew\n"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "iter_2.pth").write_bytes(b"weights" * 100)
    assert train_main(words) == 130 and "resume=true goes on from it" in capsys.readouterr().err


def test_a_config_saves_as_often_as_it_says(toy, tmp_path):
    Path(toy["config"]).write_text(Path(toy["config"]).read_text()
                                   + "default_hooks = dict(checkpoint=dict(by_epoch=False, interval=3, max_keep_ckpts=-1))\n")
    run(toy, max_iters=20)
    assert {p.name for p in (tmp_path / "run").glob("iter_*.pth")} == {f"iter_{i}.pth" for i in (*range(3, 20, 3), 20)}


@pytest.mark.parametrize("words", [["precision=fp16"], ["device=cuda"], ["device=cuda", "precision=bf16"]])
def test_a_batch_file_is_written_where_there_is_no_gpu(toy, tmp_path, monkeypatch, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    toy = [toy["config"], *(f"{name}={toy[name]}" for name in ("data_root", "work_dir"))]
    assert train_main([*toy, *words, "--launcher", "slurm", "--nproc", "8"]) == 0 and (tmp_path / "run" / "run.sbatch").is_file()
    assert train_main([*toy, *words[:1]]) == 1, "run here, it is refused"
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ParameterError, match="sees 0 GPU|needs a GPU"):  # as on a node that has none
        run_config(TrainParameters.check(json.loads((tmp_path / "run" / "job.json").read_text())["parameters"]))


def test_bf16_on_a_cpu(toy, tmp_path):
    runner, summary = run(toy, precision="bf16", max_iters=30)
    assert runner.optim_wrapper.cast_dtype == torch.bfloat16 and summary["skipped_steps"] == 0
    assert summary["loss_last"]["loss"] < summary["loss_first"]["loss"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_on_a_gpu(toy, tmp_path, cuda, precision):
    _, summary = run(toy, device="cuda", precision=precision, max_iters=30)
    assert summary["loss_last"]["loss"] < summary["loss_first"]["loss"]
    gradients = [r["bias_scale_grad"] for r in read_history(tmp_path / "run")["records"] if r["bias_scale_grad"] is not None]
    assert gradients and max(map(abs, gradients)) < 100, "the loss scale of fp16 is divided out"
