"""Frozen parts stand still, every parameter has its recipe's rate, and a run cannot change its mind."""
import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("mmdet3d")

import cmtaqr.detector  # noqa: E402, F401
from cmtaqr.engine.configure import load_config, run_config  # noqa: E402
from cmtaqr.engine.freeze import main, verify  # noqa: E402
from cmtaqr.engine.frozen import (PARTS, FreezeHook, apply_freezing, check_resumed, fingerprints, freeze_modules,  # noqa: E402
                                  frozen_modules)
from cmtaqr.engine.groups import group_table, parameter_table  # noqa: E402
from cmtaqr.engine.parameters import TrainParameters  # noqa: E402
from cmtaqr.engine.runner import build_runner, train  # noqa: E402
from cmtaqr.engine.small import SavedBytes, small_batch, small_model  # noqa: E402
from cmtaqr.engine.stages import pinned  # noqa: E402
from cmtaqr.engine.train_speed import measure_round  # noqa: E402
from cmtaqr.engine.trainer import VARIANT, training_batches  # noqa: E402
from mmdet3d.registry import MODELS  # noqa: E402
from mmengine.model import BaseModel  # noqa: E402
from mmengine.optim import build_optim_wrapper  # noqa: E402
from mmengine.registry import MODELS as ENGINE_MODELS, init_default_scope  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
R50, VOV, TINY = "cmt_aqr_voxel0100_r50_800x320_cbgs", "cmt_aqr_voxel0075_vov_1600x640_cbgs", "cmt_aqr_tiny"
ENCODERS = ["pts_middle_encoder", "pts_backbone", "img_backbone"]  # of PARTS, those with weights

# Every parameter begins with exactly one of these: factors of learning rate and weight decay; None stands for frozen.
RECIPE = {
    "img_backbone": None, "pts_middle_encoder": None, "pts_backbone": None,
    "img_neck": (0.05, 1), "pts_neck": (0.05, 1),
    "pts_bbox_head.shared_conv": (0.5, 1), "pts_bbox_head.transformer": (0.5, 1),
    "pts_bbox_head.bev_embedding": (0.5, 1), "pts_bbox_head.rv_embedding": (0.5, 1),
    "pts_bbox_head.reference_points": (0.3, 1), "pts_bbox_head.task_heads": (0.8, 1),
    "pts_bbox_head.aqr_router": (1.0, 1), "pts_bbox_head.aqr_modulator": (1.0, 1), "pts_bbox_head.aqr_renderer": (1.0, 1),
    "pts_bbox_head.aqr_bias.bias_scale": (0.5, 0),
}
THAWED = {"img_backbone": (0.01, 5), "pts_middle_encoder": (0.05, 1), "pts_backbone": (0.05, 1)}
# tensors per prefix, counted in the released models' lists of names
TENSORS = {"img_neck": 6, "pts_neck": 6, "pts_bbox_head.shared_conv": 3, "pts_bbox_head.reference_points": 1,
           "pts_bbox_head.bev_embedding": 4, "pts_bbox_head.rv_embedding": 4, "pts_bbox_head.task_heads": 30,
           "pts_bbox_head.transformer": 110, "pts_middle_encoder": 63, "pts_backbone": 36, "pts_bbox_head.aqr_bias.bias_scale": 1}


def prefix_of(name):
    """The one prefix of `RECIPE` that a name begins with."""
    found = [p for p in RECIPE if name == p or name.startswith(p + ".")]
    assert len(found) == 1, f"{name} is in no group of the recipe, or in several: {found}"
    return found[0]


def full(name, freeze=None, **aqr):
    """Config and full model without memory for its weights."""
    cfg = load_config(name)
    cfg.model.pts_bbox_head.aqr.update(aqr)
    with torch.device("meta"):
        model = MODELS.build(copy.deepcopy(cfg.model))
    freeze_modules(model, apply_freezing(cfg, freeze))
    return cfg, model


# Groups


@pytest.mark.parametrize("freeze", [None, False])
@pytest.mark.parametrize("name, base", [(R50, 1.4e-4), (VOV, 2e-4)])
def test_every_parameter_has_the_rate_of_the_recipe(name, base, freeze):
    cfg, model = full(name, freeze)
    optimiser = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    settings = {id(p): (g["lr"], g["weight_decay"]) for g in optimiser.param_groups for p in g["params"]}
    counts, table = {}, {row["name"]: row for row in parameter_table(model, cfg.optim_wrapper)}
    for key, parameter in model.named_parameters():
        prefix = prefix_of(key)
        counts[prefix] = counts.get(prefix, 0) + 1
        factors = RECIPE[prefix] or (THAWED[prefix] if freeze is False else None)
        print(f"{key}: {table[key]['group']}")
        assert table[key]["group"] != "base", key
        if factors is None:
            assert id(parameter) not in settings and table[key]["group"] == "frozen" and not parameter.requires_grad
            continue
        want = pytest.approx((factors[0] * base, factors[1] * 0.01), rel=1e-12)
        assert settings[id(parameter)] == want and (table[key]["lr"], table[key]["weight_decay"]) == want, key
    assert {k: counts[k] for k in TENSORS} == TENSORS and set(counts) >= set(TENSORS)
    assert len(settings) == sum(p.requires_grad for p in model.parameters())
    assert len(optimiser.param_groups) == len({row["group"] for row in table.values()} - {"frozen"})
    assert optimiser.defaults["betas"] == (0.9, 0.999) and isinstance(optimiser, torch.optim.AdamW)


@pytest.mark.parametrize("name, share", [(R50, 0.731), (VOV, 0.875)])
def test_share_of_frozen_weights(name, share):
    cfg, model = full(name)
    rows = {row["group"]: row for row in group_table(parameter_table(model, cfg.optim_wrapper))}
    total = sum(row["numbers"] for row in rows.values())
    print(f"{name}: {rows['frozen']['numbers'] / total:.2%} of {total:,} weights are frozen")
    assert rows["frozen"]["numbers"] == sum(p.numel() for n in ENCODERS for p in model.get_submodule(n).parameters())
    assert rows["frozen"]["numbers"] / total == pytest.approx(share, abs=5e-4)
    assert total == sum(p.numel() for p in model.parameters())


def test_one_group_per_key_and_not_per_parameter():
    cfg, model = full(VOV)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    assert sorted(g["name"] for g in groups) == sorted(set(cfg.learning_rates) - set(ENCODERS))
    assert sum(len(g["params"]) for g in groups) > 15 * len(groups)


# A real step


@pytest.mark.parametrize("name, freeze", [(TINY, True), (TINY, False), (R50, True), (R50, False), (VOV, True)])
def test_a_step_moves_what_shall_learn_and_nothing_else(name, freeze):
    result = verify(name, freeze)
    assert result["problems"] == [] and result["frozen"] == (ENCODERS if freeze else [])
    for row in result["rows"]:
        assert row["moved"] == (row["gradient"] != "none") == (not freeze or row["name"].split(".")[0] not in PARTS), row
    kept = result["saved_bytes"]
    for part in ENCODERS:
        assert (kept.get(part, 0) == 0) == freeze, (part, kept)
    assert kept["pts_bbox_head"] > 0




def test_the_command_finds_a_statistic_that_moves(tmp_path, monkeypatch, capsys):
    from cmtaqr.detector.detector import CmtDetector
    original = CmtDetector.extract_img_feat

    def drift(self, imgs):
        with torch.no_grad():
            self.img_backbone.bn1.running_mean.add_(1e-3)
        return original(self, imgs)
    monkeypatch.setattr(CmtDetector, "extract_img_feat", drift)
    out = tmp_path / "freeze.json"
    assert main(["verify", "--config", TINY, "--freeze", "true", "--json", str(out)]) == 1
    assert json.loads(out.read_text())["problems"] == ["img_backbone.bn1.running_mean is frozen, but has moved"]
    assert "img_backbone.bn1.running_mean is frozen, but has moved" in capsys.readouterr().err


def test_the_command_finds_weights_that_move(tmp_path, monkeypatch):
    from cmtaqr.engine import freeze
    def mark_only(model, names):
        model.img_backbone.train = lambda mode=True: None
    monkeypatch.setattr(freeze, "freeze_modules", mark_only)
    result = verify(TINY, True)
    assert "img_backbone.conv1.weight is frozen, but gets gradients" in result["problems"]
    assert "img_backbone.conv1.weight is frozen, but has moved" in result["problems"]
    assert "img_backbone.bn1 is frozen, but in training mode" in result["problems"]


def test_the_command_finds_what_does_not_learn(tmp_path, capsys):
    config = tmp_path / "stopped.py"
    config.write_text(f"_base_ = [{load_config(TINY).filename!r}]\nfrozen = ['img_backbone']\n"
                      "optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'pts_neck': dict(lr_mult=0.0)}))\n")
    assert main(["verify", "--config", str(config)]) == 1
    text = capsys.readouterr()
    lines = text.err.splitlines()
    assert lines and all(line.startswith("pts_neck.") and "has not moved" in line for line in lines)
    assert "stopped: 2 steps; frozen: img_backbone" in text.out


def test_the_command_from_a_shell(tmp_path):
    call = [sys.executable, "-m", "cmtaqr.engine.freeze", "table", "--config", R50, "--json", str(tmp_path / "t.json")]
    done = subprocess.run(call, capture_output=True, text=True, cwd=ROOT)
    names = {line.split()[0] for line in done.stdout.splitlines()}
    assert done.returncode == 0 and done.stderr == "" and "pts_bbox_head.aqr_bias.bias_scale" in names
    assert "% of the weights are frozen" in done.stdout
    assert set(names) > {row["name"] for row in json.loads((tmp_path / "t.json").read_text())["rows"]}


def test_the_command_explains_itself(capsys):
    assert main(["verify", "--config", "cmt_aqr_tyni"]) == 1 and "did you mean 'cmt_aqr_tiny'" in capsys.readouterr().err
    assert main(["verify", "--config", TINY, "--steps", "1"]) == 1 and "at least 2 are needed" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0 and "verify" in text and "table" in text



# Frozen modules


def small(freeze=ENCODERS):
    cfg = load_config(TINY)
    torch.manual_seed(0)
    model = MODELS.build(small_model(cfg))
    freeze_modules(model, freeze)
    return cfg, model.train()


def test_evaluation_mode_survives_train_and_copies():
    _, model = small()
    modes = {n: m.training for n, m in model.named_modules() if n.split(".")[0] in ENCODERS}
    assert modes and not any(modes.values()) and model.training and model.pts_neck.training
    assert model.pts_voxel_encoder.training  # it holds no weights, and keeps the number of voxels of training
    twin = copy.deepcopy(model)
    twin.train()
    assert frozen_modules(twin) == frozen_modules(model) == ENCODERS and not twin.img_backbone.training
    assert twin.img_backbone.train.__self__ is twin.img_backbone
    assert model.state_dict().keys() == small([])[1].state_dict().keys()


def test_frozen_vovnet_keeps_nothing_despite_its_checkpointing():
    cfg = load_config(VOV)
    model = MODELS.build(small_model(cfg)).train()
    images = torch.randn(2, 3, 64, 96)
    with SavedBytes(model) as saved:
        model.img_backbone(images)
    assert saved.bytes["img_backbone"] > 0
    freeze_modules(model, ["img_backbone"])
    with SavedBytes(model.train()) as saved:
        model.img_backbone(images)
    assert saved.bytes == {}


def test_gradients_pass_through_a_frozen_part_in_the_middle():
    _, model = small(["img_neck"])
    data = model.data_preprocessor(small_batch(load_config(TINY)), True)
    sum(model(**data, mode="loss").values()).backward()
    assert all(p.grad is None for p in model.img_neck.parameters())
    assert all(p.grad is not None and p.grad.any() for n, p in model.img_backbone.named_parameters() if "conv1" in n)


def test_unknown_modules_are_refused():
    _, model = small([])
    with pytest.raises(ValueError, match="no module 'img_backbon'; choose of .*img_backbone"):
        freeze_modules(model, ["img_backbon"])
    for wrong in (dict(steps=1), dict(steps=9, patience=5)):
        with pytest.raises(ValueError, match=f"steps={wrong['steps']}, patience="):
            FreezeHook(**wrong)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [R50, VOV])
def test_freezing_saves_memory_of_a_step_at_full_size_on_the_gpu(cuda, record_property, name):
    batches = [pinned(b) for b in training_batches(load_config(name), 1, 1)]
    rows = measure_round(name, 1, [dict(VARIANT, frozen=False), dict(VARIANT)], batches, cuda, steps=2, warmup=2)
    full, frozen = (row["memory_mib"] for row in rows)
    record_property("peak_memory_mib", [full["peak"], frozen["peak"]])
    assert frozen["peak"] < 0.7 * full["peak"] and frozen["static"] < full["static"]
    assert all(row["memory_mib"]["reserved"] >= row["memory_mib"]["peak"] for row in rows)


# Several processes


def ddp_worker(rank, folder):
    """One of two processes: steps of a frozen detector, without a search for unused parameters."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    init_default_scope("mmdet3d")
    cfg, model = small()
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
    wrapper, before = build_optim_wrapper(wrapped, cfg.optim_wrapper), fingerprints(model)
    for step in range(2):
        wrapped.train()
        data = model.data_preprocessor(small_batch(cfg, seed=10 * rank + step), True)
        wrapper.update_params(sum(wrapped(**data, mode="loss").values()))
    after = fingerprints(model)
    moved = {name for name, old in before.items() if not torch.equal(old, after[name])}
    parameters = {n: f.tolist() for n, f in after.items() if n in dict(model.named_parameters())}
    Path(folder, f"{rank}.json").write_text(json.dumps(dict(moved=sorted(moved), parameters=parameters)))
    torch.distributed.destroy_process_group()


def test_two_processes_need_no_search_for_unused_parameters(tmp_path):
    torch.multiprocessing.spawn(ddp_worker, (str(tmp_path),), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["parameters"] == second["parameters"]  # gradients were averaged: the replicas are the same, bit by bit
    names = {n for n, _ in small()[1].named_parameters()}
    assert not [n for n in first["moved"] if n.split(".")[0] in ENCODERS]
    assert {n for n in first["moved"] if n in names} == {n for n in names if n.split(".")[0] not in ENCODERS}


# Runs


@ENGINE_MODELS.register_module(force=True)
class FrozenToy(BaseModel):
    """An encoder with normalisation, and a line behind it."""

    def __init__(self, aqr=None):
        super().__init__()
        self.encoder, self.line = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4)), nn.Linear(4, 1)

    def forward(self, inputs, mode="tensor"):
        x = torch.stack(list(inputs))
        y = self.line(self.encoder(x))
        return dict(loss_fit=(y - 3 * x).square().mean()) if mode == "loss" else y


@pytest.fixture
def toy(tmp_path):
    import toy_engine
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.pkl").touch()
    text = toy_engine.CONFIG.format(bases=ROOT / "cmtaqr" / "configs" / "_base_")
    (tmp_path / "toy.py").write_text(text + "model = dict(type='FrozenToy')\nfrozen = ['encoder']\n")
    return dict(config=str(tmp_path / "toy.py"), data_root=str(tmp_path / "data"), work_dir=str(tmp_path / "run"), max_iters=4,
                device="cpu")


def run(values, prepare=lambda runner: None, **changes):
    params = TrainParameters.check(values | changes)
    runner = build_runner(params, run_config(params))
    before = fingerprints(runner.model)
    prepare(runner)
    train(runner)
    after = fingerprints(runner.model)
    return runner, {n for n, f in before.items() if not torch.equal(f, after[n])}


def log_of(values):
    return "".join(p.read_text() for p in Path(values["work_dir"]).rglob("*.log"))


def test_a_run_freezes_and_verifies(toy):
    runner, moved = run(toy)
    assert moved == {"line.weight", "line.bias"} and not runner.model.encoder.training
    assert "frozen: encoder" in log_of(toy) and "freezing verified after 2 optimiser steps" in log_of(toy)
    held = [p for g in runner.optim_wrapper.optimizer.param_groups for p in g["params"]]
    assert len(held) == 2 and len(runner.optim_wrapper.optimizer.state) == 2
    assert torch.load(Path(toy["work_dir"], "iter_4.pth"), weights_only=False)["frozen"] == ["encoder"]


def test_a_run_can_train_everything(toy):
    _, moved = run(toy, freeze=False)
    assert {n.split(".")[0] for n in moved} == {"encoder", "line"} and "encoder.1.running_mean" in moved
    assert "frozen: nothing" in log_of(toy)


def test_a_run_in_which_something_frozen_moves_stops(toy):
    def disturb(runner):
        def drift(*_):
            runner.model.encoder[1].running_var.mul_(1.001)
        runner.model.line.register_forward_pre_hook(drift)
    with pytest.raises(RuntimeError, match="after 2 optimiser steps: encoder.1.running_var is frozen, but has moved"):
        run(toy, disturb)


def test_a_run_in_which_something_does_not_learn_stops(toy):
    def stop(runner):
        nn.init.zeros_(runner.model.line.bias)  # weight decay does not move it either
        runner.model.line.bias.register_hook(torch.zeros_like)
    with pytest.raises(RuntimeError, match="after 20 optimiser steps: line.bias shall learn, but has not moved"):
        run(toy, stop, max_iters=25)


def test_what_begins_to_learn_late_has_time(toy):
    def hold(runner):
        nn.init.zeros_(runner.model.line.bias)
        runner.model.line.bias.register_hook(lambda g: g * (runner.iter >= 4))
    _, moved = run(toy, hold, max_iters=8)
    assert "line.bias" in moved and "freezing verified after 5 optimiser steps" in log_of(toy)


def test_evaluation_mode_survives_the_epochs(toy):
    runner, moved = run(toy, max_iters=None, epochs=2)
    assert runner.epoch == 2 and moved == {"line.weight", "line.bias"} and not runner.model.encoder[1].training


def test_resume_goes_on_with_the_same_choice(toy):
    toy["max_iters"] = 8
    run(toy, lambda runner: setattr(runner.train_loop, "_max_iters", 4))  # as if it had been stopped
    runner, moved = run(toy, resume=True)
    assert runner.iter == 8 and {"line.weight", "line.bias"} <= moved
    assert all(state["step"] == 8 for state in runner.optim_wrapper.optimizer.state.values())


@pytest.mark.parametrize("first, then", [(True, False), (False, True)])
def test_resume_with_another_choice_is_refused(toy, first, then):
    run(toy, freeze=first)
    with pytest.raises(RuntimeError) as error:
        run(toy, freeze=then, resume=True)
    words = ("encoder", "nothing") if first else ("nothing", "encoder")
    text = str(error.value)
    assert f"checkpoint's run froze {words[0]}, this one freezes {words[1]}" in text
    assert f"base ({2 if first else 6} tensors)" in text and "Give freeze as it was" in text


def test_a_frozen_run_starts_from_the_weights_of_another(toy, tmp_path):
    run(toy, freeze=False)
    changes = dict(checkpoint=str(Path(toy["work_dir"], "iter_4.pth")), work_dir=str(tmp_path / "second"))
    _, moved = run(toy, freeze=True, **changes)  # relative to the random start, the loaded encoder differs
    state = torch.load(tmp_path / "second" / "iter_4.pth", weights_only=False)["state_dict"]
    loaded = torch.load(Path(toy["work_dir"], "iter_4.pth"), weights_only=False)["state_dict"]
    assert all(torch.equal(state[k], loaded[k]) for k in state if k.startswith("encoder.")) and moved
    assert not torch.equal(state["line.weight"], loaded["line.weight"])


def test_check_resumed_lists_the_groups():
    groups = [dict(name="pts_neck", params=[0, 1]), dict(name="pts_bbox_head.transformer", params=[2])]
    check_resumed(dict(frozen=["a", "b"]), ["b", "a"])
    with pytest.raises(RuntimeError, match=r"pts_neck \(2 tensors\), pts_bbox_head.transformer \(1 tensors\)"):
        check_resumed(dict(frozen=["a"], optimizer=dict(param_groups=groups)), [])
