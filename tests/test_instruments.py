"""The instruments: what they record of real training steps in every version, and that these steps do not notice."""
import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet3d", reason='needs the extra: pip install "cmtaqr[detector]"')

import cmtaqr  # noqa: E402
from cmtaqr.engine.configure import load_config  # noqa: E402
from cmtaqr.engine.instruments import BINS, InstrumentsHook, read_instruments  # noqa: E402
from cmtaqr.engine.stages import copied  # noqa: E402
from cmtaqr.engine.trainer import VARIANT, Trainer, training_batches  # noqa: E402
from instrument_cases import Head, batch, record, runner_for  # noqa: E402

TINY = Path(cmtaqr.__file__).parent / "configs" / "cmt_aqr_tiny.py"
MAPS = "renderer=dict(type='WeightRenderer'), modulator=dict(type='FeatureModulator')"
NO_LIDAR = "pts_voxel_encoder=None, pts_middle_encoder=None, pts_backbone=None, pts_neck=None, "
VERSIONS = {  # aqr of the head, other parts of the model, precision, number of scales
    "version 3, fp32": ("", "", "fp32", 1),
    "version 3, bf16": ("", "", "bf16", 1),
    "version 3, a scale per layer": ("bias=dict(scale_per='layer', scale_mode='smooth')", "", "fp32", 2),
    "version 2": (f"version=2, {MAPS}", "", "fp32", 0),
    "version 1": (f"version=1, {MAPS}", "", "bf16", 0),
    "cameras alone": ("", NO_LIDAR, "fp32", 1),
}


@pytest.fixture(scope="module")
def data():
    """A batch of one frame for the tiny config."""
    return training_batches(load_config("cmt_aqr_tiny"), 1, 1, turns=1, boxes=10)[0]


def steps(config, precision, data, folder=None, count=3):
    """Losses of some training steps and the weights after them; recorded where there is a folder."""
    trainer = Trainer(str(config), dict(VARIANT, frozen=False, precision=precision), data, torch.device("cpu"), boxes=10)
    hook, losses = InstrumentsHook(interval=3), []
    runner = runner_for(trainer.model, folder, optim_wrapper=trainer.wrapper)
    if folder is not None:
        hook.before_train(runner)
    torch.manual_seed(0)
    for runner.iter in range(count):
        if folder is not None:
            hook.before_train_iter(runner, 0)
        losses.append(trainer.model.train_step(copied(data), trainer.wrapper))
        if folder is not None:
            hook.after_train_iter(runner, 0)
    if folder is not None:
        hook.after_train(runner)
    return losses, trainer.model.state_dict()


@pytest.mark.parametrize("name", VERSIONS)
def test_recording_changes_no_bit_of_the_training(name, data, tmp_path, capsys):
    aqr, parts, precision, scales = VERSIONS[name]
    config, head = tmp_path / "config.py", f"num_query=100, aqr=dict({aqr})" + (", in_channels=None" if parts else "")
    config.write_text(f"_base_ = [r'{TINY}']\nmodel = dict({parts}pts_bbox_head=dict({head}))\n")
    if parts:
        data = dict(data, inputs=dict(img=data["inputs"]["img"]))
    alone, weights = steps(config, precision, data)
    capsys.readouterr()
    watched, after = steps(config, precision, data, tmp_path)
    assert not capsys.readouterr().out
    for a, b in zip(alone, watched):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert all(torch.equal(weights[k], after[k]) for k in weights)

    found = read_instruments(tmp_path)
    assert [r["iter"] for r in found["records"]] == [1, 3]
    first, last = found["records"]
    assert sum(first["weights"]["lidar"]["histogram"]) == first["weights"]["lidar"]["number"] == 100, "no denoising query"
    assert first["weights"]["camera"]["std"] > 0 and abs(sum(first["prefer"].values()) - 1) < 1e-9
    assert first["seen"]["lidar"] == first["bias"][0]["lidar"]["number"] == 0 if parts else first["seen"]["lidar"] > 0.9
    assert len(first["scale"]) == len(first["bias"]) == scales
    if not scales:
        assert found["limit"] is None and first["scale_grad"] is None and set(first["attention"]) == {"entropy", "lidar_share"}
        return
    assert found["limit"] == 5.0 and found["bounds"] == [1.0, 8.0] and first["scale"] == pytest.approx([5.0] * scales)
    assert all(g != 0 for g in first["scale_grad"]) and len(first["scale_grad"]) == scales
    seen = first["attention"]
    assert seen["entropy_change"] == pytest.approx(seen["entropy"] - seen["entropy_without"]) and seen["entropy_change"] != 0
    assert last["weights"]["camera"]["mean"] != first["weights"]["camera"]["mean"], "the second record sees trained weights"


def test_plain_cmt_is_left_alone_and_told_once(tmp_path, caplog):
    runner, hook = runner_for(torch.nn.Linear(2, 2), tmp_path), InstrumentsHook(interval=1)
    with caplog.at_level("INFO"):
        hook.before_train(runner)
        for runner.iter in range(3):
            hook.before_train_iter(runner, 0)
            hook.after_train_iter(runner, 0)
        hook.before_save_checkpoint(runner, {})
        hook.after_train(runner)
    assert [r.getMessage() for r in caplog.records] == ["InstrumentsHook: the model has no AQR, so there is nothing to record"]
    assert not list(tmp_path.iterdir())


# Numbers


def test_gradient_of_the_scale_is_that_of_the_loss(tmp_path):
    torch.manual_seed(0)
    model, inputs = Head(), batch(2)
    runner = record(model, inputs, tmp_path)
    found = read_instruments(tmp_path)["records"][0]
    assert found["scale_grad"] == pytest.approx([model.aqr_bias.bias_scale.grad.item()], rel=1e-6)
    scalars = runner.visualizer.scalars[1]
    assert scalars["instruments/scale_grad/0"] == found["scale_grad"][0] and scalars["instruments/bias/0/camera/std"] > 0
    assert not [name for name in scalars if "histogram" in name]


def test_loss_scale_of_fp16_is_divided_out(tmp_path):
    torch.manual_seed(0)
    model, inputs, hook = Head(), batch(1), InstrumentsHook()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    runner = runner_for(model, tmp_path, optim_wrapper=type("Wrapper", (), dict(loss_scaler=scaler)))
    hook.before_train(runner)
    hook.before_train_iter(runner, 0)
    scaler.scale(model(*inputs)["decoded"].square().mean()).backward()
    hook.after_train_iter(runner, 0)
    assert hook.records[0]["scale_grad"] == pytest.approx([model.aqr_bias.bias_scale.grad.item() / 1024], rel=1e-6)


def test_numbers_that_are_not_finite_are_left_out_and_written_at_once(tmp_path):
    torch.manual_seed(0)
    model, inputs, hook = Head(), batch(1), InstrumentsHook(interval=1, seconds=1e6)
    runner = runner_for(model, tmp_path)
    hook.before_train(runner)
    for runner.iter in range(3):
        if runner.iter == 2:
            with torch.no_grad():
                model.aqr_router.weight.fill_(float("nan"))
        hook.before_train_iter(runner, 0)
        model(*inputs)
        hook.after_train_iter(runner, 0)
        text = (tmp_path / "instruments.json").read_text()
        assert len(json.loads(text)["records"]) == (1, 1, 3)[runner.iter], "the second one waits"
    found = json.loads(text)["records"][2]
    nothing = dict(number=0, mean=None, std=None, saturated=None, histogram=[0] * BINS)
    assert "NaN" not in text and found["weights"]["lidar"] == nothing
    assert found["attention"]["entropy"] is None and found["scale"] == [2.5]
    assert not [n for n in runner.visualizer.scalars[3] if "weights" in n and "number" not in n]


def test_a_compiled_decoder_is_not_listened_to(tmp_path, caplog):
    torch.manual_seed(0)
    model = Head()
    model.transformer._compiled_call_impl = model.transformer._call_impl
    with caplog.at_level("INFO"):
        record(model, batch(1), tmp_path)
    found = read_instruments(tmp_path)["records"][0]
    assert found["attention"] is None and found["bias"][0]["lidar"]["number"] > 0
    assert "the decoder is compiled, its attention is not recorded" in caplog.text


@pytest.mark.parametrize("error, outcome", [(KeyboardInterrupt(), pytest.raises(KeyboardInterrupt)),
                                            (OSError("no space left on device"), contextlib.nullcontext())])
def test_a_killed_writer_or_a_full_disk_leaves_the_last_file(tmp_path, monkeypatch, error, outcome):
    """A full disk does not end the run."""
    torch.manual_seed(0)
    record(Head(), batch(1), tmp_path)
    before = (tmp_path / "instruments.json").read_bytes()

    def cut(number):
        os.ftruncate(number, 40)
        raise error

    monkeypatch.setattr(os, "fsync", cut)
    with outcome:
        record(Head(), batch(1, seed=1), tmp_path)
    assert (tmp_path / "instruments.json").read_bytes() == before


def same(a, b, name=""):
    """Whether two nested records agree but for rounding."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k], f"{name}/{k}") for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y, name) for x, y in zip(a, b))
    return a == b if a is None else bool(np.isclose(a, b, rtol=1e-4, atol=1e-7)) or pytest.fail(f"{name}: {a} is not {b}")


def test_two_processes_record_what_one_does_with_the_whole_batch(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script, folders = Path(__file__).parent / "instrument_cases.py", [tmp_path / name for name in ("model", "layer")]
    environment = os.environ | dict(OMP_NUM_THREADS="1")
    for folder in folders:
        folder.mkdir()
    calls = [subprocess.Popen([sys.executable, str(script), str(rank), "2", str(port), *map(str, folders)], env=environment)
             for rank in range(2)]
    assert [call.wait(timeout=120) for call in calls] == [0, 0]
    for folder, scales in zip(folders, (1, 2)):
        torch.manual_seed(0)
        record(Head(scale_per=folder.name), batch(4), tmp_path)
        one, two = (read_instruments(place)["records"][0] for place in (tmp_path, folder))
        assert same(one, two)
        assert two["weights"]["lidar"]["number"] == 4 * 8 and len(two["scale"]) == scales
        assert [p.name for p in folder.iterdir()] == ["instruments.json"]


# On a GPU


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu_but_one_read_per_record(cuda, tmp_path):
    torch.manual_seed(0)
    model, hook = Head().to(cuda), InstrumentsHook(interval=2)
    inputs = batch(2, device=cuda)
    runner = runner_for(model, tmp_path)
    hook.before_train(runner)
    model(*inputs)  # kernels are compiled
    reads = []
    original = torch.Tensor.cpu

    def counted(self, *args, **kwargs):
        torch.cuda.set_sync_debug_mode("default")
        reads.append(runner.iter)
        return original(self, *args, **kwargs)

    torch.Tensor.cpu = counted
    try:
        for runner.iter in range(4):
            torch.cuda.set_sync_debug_mode("error")
            hook.before_train_iter(runner, 0)
            loss = model(*inputs)["decoded"].square().mean()
            loss.backward()
            hook.after_train_iter(runner, 0)
    finally:
        torch.Tensor.cpu = original
        torch.cuda.set_sync_debug_mode("default")
    assert reads == [0, 1, 3]


@pytest.mark.gpu
def test_a_step_is_recorded_on_the_gpu_as_on_the_cpu(cuda, tmp_path):
    torch.manual_seed(0)
    model = Head(scale_per="layer")
    record(model, batch(2), tmp_path)
    (tmp_path / "gpu").mkdir()
    record(model.to(cuda), batch(2, device=cuda), tmp_path / "gpu")
    cpu, gpu = (read_instruments(folder)["records"][0] for folder in (tmp_path, tmp_path / "gpu"))
    for name in ("lidar", "camera"):
        assert gpu["weights"][name]["mean"] == pytest.approx(cpu["weights"][name]["mean"], abs=1e-3)
    assert gpu["attention"] == pytest.approx(cpu["attention"], abs=5e-3)
    assert gpu["scale_grad"] == pytest.approx(cpu["scale_grad"], abs=5e-3)
