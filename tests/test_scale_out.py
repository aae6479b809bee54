"""A training on another number of GPUs: accumulated steps through the real runner, and the fast forms on a GPU."""
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("mmengine", reason='needs the extra: pip install "cmtaqr[detector]"')

from mmengine.config import Config  # noqa: E402

from cmtaqr.engine.configure import load_config, run_config  # noqa: E402
from cmtaqr.engine.parameters import ParameterError, TrainParameters  # noqa: E402
from cmtaqr.engine.recompute import recomputed_modules  # noqa: E402
from cmtaqr.engine.runner import FileLogRunner, build_runner, train  # noqa: E402
from cmtaqr.engine.scale_out import IMAGE_PARTS, put_scale, to_channels_last  # noqa: E402
from cmtaqr.engine.stages import copied, speed_model  # noqa: E402
from cmtaqr.engine.trainer import training_batches  # noqa: E402
from toy_engine import CONFIG  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def write_run(folder):
    """Parameters of a short run, with its config file and data folder."""
    (folder / "toy.py").write_text(CONFIG.format(bases=ROOT / "cmtaqr/configs/_base_"))
    (folder / "data").mkdir()
    (folder / "data" / "train.pkl").touch()
    return dict(config=str(folder / "toy.py"), data_root=str(folder / "data"), work_dir=str(folder / "run"), max_iters=3,
                num_workers=0, device="cpu")


def toy_weights(folder, batch, iterations, **scale):
    """Weights of a toy model after a run with the given batch."""
    folder.mkdir()
    params = TrainParameters.check(write_run(folder) | dict(max_iters=iterations, batch_size=batch))
    cfg = run_config(params)
    asked = dict(accumulate=1, total_batch=None, scale_lr=False, channels_last=False, batch_size=params.batch_size, lr=None)
    put_scale(cfg, SimpleNamespace(**{**asked, **scale}))
    cfg.param_scheduler = []
    runner = build_runner(params, cfg)
    train(runner)
    return [p.detach().clone() for p in runner.model.parameters()], runner.optim_wrapper


def test_accumulated_steps_train_as_one_large_batch_does(tmp_path):
    large, _ = toy_weights(tmp_path / "large", 4, 3)
    small, wrapper = toy_weights(tmp_path / "small", 2, 6, total_batch=4)
    other, _ = toy_weights(tmp_path / "other", 2, 3)
    assert wrapper._accumulative_counts == 2 and wrapper.steps == 3 and wrapper.skipped == 0
    for one, two in zip(small, large):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)
    assert any(not torch.allclose(one, two, rtol=1e-4) for one, two in zip(other, large))


def test_schedules_may_move_on_before_the_first_update(tmp_path, recwarn):
    params = TrainParameters.check(write_run(tmp_path) | dict(accumulate=2, max_iters=4))
    cfg = run_config(params)
    assert cfg.param_scheduler and cfg.optim_wrapper.accumulative_counts == 2
    train(build_runner(params, cfg))
    assert [str(w.message) for w in recwarn if "scheduler.step" in str(w.message)] == []


def test_the_runner_lays_out_the_parts_that_the_config_names():
    runner = object.__new__(FileLogRunner)  # its constructor needs data
    runner.cfg = Config(dict(device="cpu", channels_last=["image"]))
    runner._distributed, runner.logger = False, logging.getLogger("none")
    model = runner.wrap_model(None, torch.nn.ModuleDict(dict(image=torch.nn.Conv2d(3, 8, 3), other=torch.nn.Conv2d(3, 8, 3))))
    assert model["image"].weight.is_contiguous(memory_format=torch.channels_last) and not model["image"].weight.is_contiguous()
    assert model["other"].weight.is_contiguous()


def test_totals_that_fit_are_named():
    cfg = load_config("cmt_aqr_voxel0100_r50_800x320_cbgs")
    cfg.device = "cpu"
    asked = SimpleNamespace(accumulate=1, total_batch=30, scale_lr=False, channels_last=False, batch_size=4, lr=None)
    with pytest.raises(ParameterError, match="total_batch=16 or 32"):
        put_scale(cfg, asked, world_size=4)


CHILDREN = ["img_backbone", "img_neck", "pts_middle_encoder", "pts_backbone", "pts_neck", "pts_bbox_head"]  # as a report advises
PARTS = ["img_backbone", "pts_middle_encoder", "pts_backbone", "pts_bbox_head.transformer.decoder"]


def tiny_step(recomputed, distributed=False):
    """Losses, gradients and state of the tiny detector, with dropout, after the passes of one step."""
    from mmdet3d.registry import MODELS
    from mmengine.registry import init_default_scope

    from cmtaqr.engine.small import small_batch, small_model
    init_default_scope("mmdet3d")
    cfg = load_config("cmt_aqr_tiny")
    cfg.model.pts_bbox_head.transformer.decoder.layer.dropout = 0.1
    runner = object.__new__(FileLogRunner)  # its constructor needs data
    runner.cfg = Config(dict(device="cpu", recomputed_parts=recomputed))
    runner._distributed, runner.logger = distributed, logging.getLogger("none")
    torch.manual_seed(0)
    model = runner.wrap_model(None, MODELS.build(small_model(cfg)).train())
    inner = getattr(model, "module", model)
    rank = torch.distributed.get_rank() if distributed else 0
    losses = model(**inner.data_preprocessor(small_batch(cfg, samples=2, seed=rank), True), mode="loss")
    sum(losses.values()).backward()
    assert set(recomputed_modules(inner)) == set(recomputed)
    return {name: value.detach() for name, value in losses.items()}, \
        {name: p.grad for name, p in inner.named_parameters() if p.grad is not None}, inner.state_dict()


def assert_equal_steps(one, other):
    for a, b in zip(one, other):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("parts", [PARTS[:1], PARTS, CHILDREN], ids=["image", "inside", "all"])
def test_recomputed_activations_leave_losses_gradients_and_statistics_alone(parts):
    """To the bit; mmengine's own form leaves an image backbone without gradients, and fails in the decoder."""
    pytest.importorskip("mmdet3d", reason='needs the extra: pip install "cmtaqr[detector]"')
    plain = tiny_step([])
    assert sum(name.startswith("img_backbone") for name in plain[1]) == 60
    assert_equal_steps(tiny_step(parts), plain)


def test_recomputed_activations_in_two_processes(tmp_path):
    pytest.importorskip("mmdet3d", reason='needs the extra: pip install "cmtaqr[detector]"')
    program = "import torch, test_scale_out as t\ntorch.distributed.init_process_group('gloo')\n" \
              "t.assert_equal_steps(t.tiny_step(t.PARTS, True), t.tiny_step([], True))"
    environment = os.environ | dict(OMP_NUM_THREADS="1")
    (tmp_path / "both.py").write_text(program)
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "both.py")]
    done = subprocess.run(call, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_config_says_what_is_recomputed(tmp_path):
    values = write_run(tmp_path)
    config = tmp_path / "toy.py"
    config.write_text(config.read_text() + "activation_checkpointing = 'line'\n")
    params = TrainParameters.check(values | dict(work_dir=str(tmp_path / "run")))
    runner = build_runner(params, run_config(params))
    train(runner)
    assert recomputed_modules(runner.model) == ["line"] and list(runner.cfg.recomputed_parts) == ["line"]
    config.write_text(config.read_text() + "activation_checkpointing = ['lines']\n")
    params = TrainParameters.check(values | dict(work_dir=str(tmp_path / "other")))
    with pytest.raises(ParameterError, match="the model has no module 'lines'; choose of line, aqr_bias"):
        build_runner(params, run_config(params))


@pytest.mark.gpu
def test_fused_adamw_equals_the_plain_one_to_rounding(cuda):
    def stepped(fused):
        torch.manual_seed(0)
        layer = torch.nn.Linear(256, 256).to(cuda)
        optimiser = torch.optim.AdamW(layer.parameters(), lr=1e-2, weight_decay=0.01, fused=fused)
        for _ in range(20):
            for parameter in layer.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimiser.step()
        return layer.weight.detach()
    torch.testing.assert_close(stepped(True), stepped(False), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_channels_last_changes_the_image_features_by_rounding_only(cuda, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    cfg = load_config("cmt_aqr_tiny")
    frame = training_batches(cfg, batch=1, count=1, turns=1, boxes=10)[0]
    model = speed_model(cfg, copied(frame), torch.device(cuda))
    images = torch.randn(6, 3, 128, 320, device=cuda)
    with torch.no_grad():
        before = model.img_neck(model.img_backbone(images))[0]
        to_channels_last(model, IMAGE_PARTS)
        after = model.img_neck(model.img_backbone(images))[0]
    assert after.is_contiguous(memory_format=torch.channels_last) and before.is_contiguous()
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5 * float(before.abs().max()))
