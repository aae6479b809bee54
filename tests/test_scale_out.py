"""A training on another number of GPUs: accumulated steps through the real runner, and the fast forms on a GPU."""
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("mmengine", reason='needs the extra: pip install "cmtaqr[detector]"')

from mmengine.config import Config  # noqa: E402

from cmtaqr.engine.configure import load_config, run_config  # noqa: E402
from cmtaqr.engine.parameters import ParameterError, TrainParameters  # noqa: E402
from cmtaqr.engine.runner import FileLogRunner, build_runner, train  # noqa: E402
from cmtaqr.engine.scale_out import IMAGE_PARTS, put_scale, to_channels_last  # noqa: E402
from cmtaqr.engine.stages import copied, speed_model  # noqa: E402
from cmtaqr.engine.trainer import training_batches  # noqa: E402
from toy_engine import CONFIG  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def toy_weights(folder, batch, iterations, **scale):
    """Weights of a toy model after a run with the given batch."""
    folder.mkdir()
    (folder / "toy.py").write_text(CONFIG.format(bases=ROOT / "cmtaqr/configs/_base_"))
    (folder / "data").mkdir()
    (folder / "data" / "train.pkl").touch()
    params = TrainParameters.check(dict(config=str(folder / "toy.py"), data_root=str(folder / "data"),
                                        work_dir=str(folder / "run"), max_iters=iterations, batch_size=batch, num_workers=0,
                                        device="cpu"))
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
