"""Fast inference and its measurement: options leave the result, stages add up, parts compile without a break."""
import copy
import json
import logging
import shutil

import pytest
import torch

pytest.importorskip("mmdet3d")

from mmengine.config import Config  # noqa: E402

from cmtaqr.detector.inference import GRAPHS, GraphedCall, accelerate, compile_parts, fold_batchnorm, refused_graphs  # noqa: E402
from cmtaqr.engine.configure import load_config  # noqa: E402
from cmtaqr.engine.runner import FileLogRunner  # noqa: E402
from cmtaqr.engine.speed import SETTINGS, difference, main  # noqa: E402
from cmtaqr.engine.stages import STAGES, Stopwatch, copied, pinned, speed_frame, speed_model  # noqa: E402

TINY = "cmt_aqr_tiny"


@pytest.fixture(scope="module")
def frame():
    return speed_frame(load_config(TINY), turns=2)


@pytest.fixture(scope="module")
def model(frame):
    return speed_model(load_config(TINY), frame, torch.device("cpu"))


def boxes(model, frame):
    with torch.no_grad():
        found = model.test_step(copied(frame))[0].pred_instances_3d
    return torch.cat([found.scores_3d[:, None], found.bboxes_3d.tensor], 1)


def test_frames_repeat_and_differ():
    cfg = load_config(TINY)
    first, again, other = (speed_frame(cfg, i, turns=1) for i in (0, 0, 1))
    assert torch.equal(first["inputs"]["points"][0], again["inputs"]["points"][0])
    assert first["inputs"]["points"][0].shape != other["inputs"]["points"][0].shape
    assert first["inputs"]["img"][0].shape == (6, 3, *cfg.input_size)


def test_model_is_really_biased_and_shares_weights(model, frame):
    with torch.no_grad():
        out = model(**model.data_preprocessor(copied(frame), False), mode="tensor")
    assert out["aqr"]["weights"].std() > 0.2 and out["aqr"]["bias"].value.abs().max() > 1
    other = speed_model(load_config(TINY), frame, torch.device("cpu"), state=model.state_dict(), seed=5)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


def test_options_leave_fp32_results(model, frame):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fast = accelerate(model, precision="fp32")
    with torch.no_grad():
        apart = difference(fast, model, frame)
    assert apart["probability_max"] < 1e-4 and apart["centre_mean_m"] < 1e-2
    assert list(model.state_dict()) == list(before) and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in fast.modules())


@pytest.mark.parametrize("precision, limit", [("bf16", 0.15), ("fp16", 0.03)])
def test_half_precision_stays_near(model, frame, precision, limit):
    fast = accelerate(model, precision=precision)
    assert fast.img_neck.fpn_convs[0].conv.weight.dtype != torch.float32
    assert fast.pts_middle_encoder.conv_input[0].weight.dtype == torch.float32
    with torch.no_grad():
        apart = difference(fast, model, frame)
    assert apart["probability_mean"] < limit / 10 and apart["probability_max"] < limit and boxes(fast, frame).isfinite().all()


def test_unknown_options_are_refused(model):
    for wrong, message in ((dict(graphs=["sparse"]), "choose of"), (dict(precision="int8"), "choose one of"),
                           (dict(compile=["sparse"]), "refused, its sizes are known on the device only"),
                           (dict(compile=["imagee"]), "no part of the detector")):
        with pytest.raises(ValueError, match=message):
            accelerate(model, **wrong)
    with pytest.raises(ValueError, match="evaluation mode"):
        fold_batchnorm(copy.deepcopy(model).train())


@pytest.mark.parametrize("part", ["image", "bev", "decoder"])
def test_parts_compile_without_a_break(model, frame, part):
    torch._dynamo.reset()
    compiled = copy.deepcopy(model)
    compile_parts(compiled, [part], backend="aot_eager")  # fullgraph=True: a break is an error
    with torch.no_grad():
        apart = difference(compiled, model, frame)
    assert apart["probability_max"] < 1e-5 and apart["centre_mean_m"] < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert list(compiled.state_dict()) == list(model.state_dict())


def test_compiled_decoder_trains(model, frame):
    """Gradients of the compiled decoder, those of the bias included, are those of the plain one."""
    torch._dynamo.reset()
    grads = []
    for compiled in (False, True):
        one = copy.deepcopy(model)
        if compiled:
            compile_parts(one, ["decoder"], backend="aot_eager")
        out = one(**one.data_preprocessor(copied(frame), False), mode="tensor")
        sum(v.square().mean() for v in out["tasks"][0].values()).backward()
        head = one.pts_bbox_head
        grads.append([head.aqr_bias.bias_scale.grad, head.transformer.decoder.layers[0].attentions[1].attn.in_proj_weight.grad])
    for a, b in zip(*grads):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_inductor_gives_the_same(model, frame):
    if not shutil.which("g++"):
        pytest.skip("torch.compile's inductor needs a C++ compiler on the CPU: install g++")
    torch._dynamo.reset()
    compiled = copy.deepcopy(model)
    compile_parts(compiled, ["image", "decoder"])
    with torch.no_grad():
        apart = difference(compiled, model, frame)
    assert apart["probability_max"] < 1e-5 and apart["centre_mean_m"] < 1e-4


def test_stages_add_up_to_the_frame(model, frame):
    with torch.no_grad(), Stopwatch(model) as watch:
        mark = watch._now()
        model.test_step(copied(frame))
        total = 1e3 * (watch._now() - mark)
        spent = watch.times()
    assert set(spent) == set(STAGES)
    assert 0.5 * total < sum(spent.values()) <= total


def test_command_line(tmp_path, capsys):
    out = tmp_path / "speed.json"
    few = "--frames 2 --warmup 1 --scenes 1 --turns 1 --profiled 1 --device cpu --out".split() + [str(out)]
    assert main(["--configs", TINY, "--settings", "fast32", *few]) == 0
    result = json.loads(out.read_text())
    row = result["models"][0]
    assert row["frames_per_second"] > 0 and row["frame_ms"]["p10"] <= row["frame_ms"]["median"] <= row["frame_ms"]["p90"]
    assert set(row["stages_ms"]) == set(STAGES) and row["profile"]["kernels"][0]["ms"] > 0
    assert result["settings"]["fast32"]["precision"] == "fp32" and {"commit", "versions", "machine", "command"} <= set(result)
    assert main(["--configs", "cmt_aqr_tny", *few]) == 1
    assert "did you mean 'cmt_aqr_tiny'" in capsys.readouterr().err


def test_calls_without_a_gpu_pass_through():
    call = GraphedCall(lambda x: x * 2)
    assert call(torch.ones(2)).tolist() == [2, 2] and not call.kept


def test_a_run_compiles_its_parts(model):
    runner = object.__new__(FileLogRunner)
    runner.cfg = Config(dict(compiled_parts=["decoder"], device="cpu"))
    runner._distributed, runner.logger = False, logging.getLogger("run")
    wrapped = runner.wrap_model(None, copy.deepcopy(model))
    assert wrapped.pts_bbox_head.transformer._compiled_call_impl is not None and wrapped.img_backbone._compiled_call_impl is None
    assert list(wrapped.state_dict()) == list(model.state_dict())


@pytest.mark.gpu
def test_graphs_repeat_eager_results(cuda):
    cfg = load_config(TINY)
    frames = [speed_frame(cfg, i, turns=2) for i in range(2)]
    model = speed_model(cfg, frames[0], cuda)
    plain, fast = accelerate(model, **SETTINGS["plain"]), accelerate(model, fold=False, channels_last=False)
    for one in frames * 2:
        with torch.no_grad():
            assert difference(fast, plain, pinned(one))["probability_max"] < 1e-3
    recorded = vars(fast.pts_bbox_head.transformer)["forward"]
    assert len(recorded.kept) == 1 and recorded.kept[next(iter(recorded.kept))] is not None
    assert set(refused_graphs(fast)) <= {"pts_bbox_head.aqr_router"}


@pytest.mark.gpu
def test_a_function_that_waits_is_not_recorded(cuda):
    call = GraphedCall(lambda x: x * int(x.sum()))
    with torch.no_grad():
        assert call(torch.ones(2, device=cuda)).tolist() == [2, 2] and call.refused
        assert call(torch.full((2,), 2.0, device=cuda)).tolist() == [8, 8]


@pytest.mark.gpu
def test_compiled_and_recorded(cuda):
    cfg = load_config(TINY)
    frame = speed_frame(cfg, turns=2)
    model = speed_model(cfg, frame, cuda)
    fast = accelerate(model, compile=["image", "decoder"], graphs=list(GRAPHS))
    with torch.no_grad():
        for _ in range(2):
            assert difference(fast, accelerate(model, **SETTINGS["plain"]), frame)["probability_max"] < 1e-3
