"""The tools behind the sensitivity notebook, on a real detector and a small world, and what they recorded."""
import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet3d")

from cmtaqr.bias import AttentionBiasGenerator  # noqa: E402
from cmtaqr.data.nuscenes import make_infos  # noqa: E402
from cmtaqr.data.world import make_world  # noqa: E402
from cmtaqr.engine import saturation  # noqa: E402
from cmtaqr.engine.logits import AttentionProbe, cross_attention_logits, logit_models  # noqa: E402
from cmtaqr.engine.logits import main as logits_main  # noqa: E402
from cmtaqr.engine.parameters import EvalParameters, TrainParameters  # noqa: E402
from cmtaqr.sensitivity import attention_moved, recommend_scale, window_gradient, window_mass  # noqa: E402

RESULTS = Path(__file__).resolve().parent.parent / "nbs" / "results"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("worlds") / "world"
    make_world(root, scenes=["scene-0061", "scene-0103"], keyframes=2, sweeps=0, image_size=(400, 225), workers=1, progress=False)
    make_infos(root)
    return root


def test_probe_sees_the_attention_of_the_detector(world):
    """Softmax of the probe's logits plus bias, times the values, is what the decoder's attention answered."""
    models, loader = logit_models(EvalParameters.check(dict(data_root=str(world), untrained=True, device="cpu", num_workers=0)))
    model, seen = models["untrained"], []
    head = model.pts_bbox_head
    torch.nn.init.normal_(head.aqr_router.to_weights.weight, std=0.3)
    for layer in head.transformer.decoder.layers:
        layer.attentions[1].attn.in_proj_weight.data *= 3  # random weights give flat attention
        layer.attentions[1].attn.register_forward_hook(lambda *call: seen.append(call), with_kwargs=True)
    with AttentionProbe(head, queries=30, chunk=7) as probe, torch.no_grad():
        model.test_step(next(iter(loader)))
        for (attention, (query, key, value), kwargs, out), chunks in zip(seen, probe.layers):
            bias = kwargs["bias"]
            p = (cross_attention_logits(attention, query, key).double() + bias.dense()[:, None].double()).softmax(-1)
            v = torch.nn.functional.linear(value, attention.in_proj_weight.chunk(3)[2], attention.in_proj_bias.chunk(3)[2])
            mixed = (p @ v.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2).double()).transpose(1, 2).flatten(2)
            torch.testing.assert_close(attention.out_proj(mixed.float()), out, rtol=1e-4, atol=1e-5)
            inside = bias.windows.mask()[:, ::10]
            lidar = torch.arange(probe.keys) < math.prod(bias.windows.layout.lidar)
            for name, sensor in (("lidar", lidar), ("camera", ~lidar)):
                found = torch.cat([chunk[f"biased_mass_{name}"] for chunk in chunks], -1)
                want = (p[:, :, ::10] * (inside & sensor)[:, None]).sum(-1)
                known = ~found.isnan()
                assert torch.equal(known[:, 0], (inside & sensor).any(-1)) and known.any()
                torch.testing.assert_close(found[known].double(), want[known], rtol=1e-4, atol=1e-7)
    assert len(probe.layers) == 2 and sum(chunk["spread"].shape[-1] for chunk in probe.layers[0]) == 30


def test_logits_command(world, tmp_path, capsys):
    file = tmp_path / "logits.json"
    common = ["--data-root", str(world), "--device", "cpu", "--json", str(file)]
    assert logits_main([*common, "--batches", "1", "--queries", "20"]) == 0
    result = json.loads(file.read_text())
    assert list(result["models"]) == ["untrained"] and result["keys"] == 2560 and result["window_sizes"] == [3, 3]
    for head in (head for layer in result["models"]["untrained"] for head in layer):
        assert head["spread"]["count"] == 40 and head["effective_keys"]["mean"] > 2400
    for bad, words in ((["--batches", "0"], "at least 1"), (["--levels", "2"], "between 0 and 1"),
                       (["--checkpoint", str(tmp_path / "none.pth")], "no checkpoint"),
                       (["--config", "cmt_voxel0100_r50_800x320_cbgs"], "no AQR"), (["--config", "cmt_tiny"], "did you mean"),
                       (["--data-root", str(tmp_path / "nowhere")], "no data folder")):
        assert logits_main([*common, *bad]) == 1
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        logits_main(["--help"])


def test_saturation_run_is_not_done_twice(world, tmp_path, monkeypatch, capsys):
    """Beyond the limit the bias follows the weights, within it does not; a run that is done is read back."""
    params = dict(data_root=str(world), max_iters=2, num_workers=0, device="cpu")
    free = saturation.saturation_run(45.0, False, params, tmp_path / "free")
    held = saturation.saturation_run(45.0, True, params, tmp_path / "held")
    for run, bias in ((free, 0.8 * 45), (held, 5.0)):
        first, second = run["records"]
        assert abs(first["bias"] - bias) < 1e-3 and abs(first["weight"] - 0.8) < 1e-6 and abs(first["scale"] - 45) < 0.1
        assert first["windows"]["lidar"]["mass"] > 0 and "windows" not in second and second["iter"] == 2
        assert run["run"]["parameters"]["work_dir"] is None and first["loss"] > 0
    # windows of both sensors at the same large bias share everything: a larger scale changes nothing, other weights would
    assert abs(free["records"][0]["scale_gradient"]) < 1e-5 < free["records"][0]["bias_gradient"]
    monkeypatch.setattr(saturation, "build_runner", lambda *_: pytest.fail("trained again"))
    again = saturation.saturation_run(45.0, False, params, tmp_path / "free")
    assert again == json.loads((tmp_path / "free" / "saturation.json").read_text())
    assert saturation.main(["--iterations", "5", "--json", str(tmp_path / "x.json")]) == 1
    assert "at least 20" in capsys.readouterr().err


def test_curve_takes_the_limit_away(world, tmp_path):
    """At a scale of 45 the curve biases by 45 times the weight, and the scale's gradient has gone."""
    models, _ = logit_models(EvalParameters.check(dict(data_root=str(world), untrained=True, device="cpu")))
    file = tmp_path / "weights.pth"
    torch.save(dict(state_dict=models["untrained"].state_dict()), file)
    given = dict(data_root=str(world), checkpoint=str(file), num_workers=0, batch_size=1, device="cpu")
    params = TrainParameters.check(given)
    low, high = saturation.scale_curve(params, scales=(2.0, 45.0), queries=20)
    assert abs(low["bias"] - 1.6) < 1e-4 and abs(high["bias"] - 36) < 1e-3
    assert abs(high["scale_gradient"]) < 1e-4 * abs(low["scale_gradient"])
    assert low["windows"]["lidar"]["mass"] < 0.1 < high["windows"]["lidar"]["mass"]


@pytest.mark.parametrize("mass", [1e-9, 1e-4, 0.003, 0.05, 0.3, 0.5, 0.7, 0.999])
@pytest.mark.parametrize("limit", [0.5, 5.0, 8.0])
def test_advice_is_usable(mass, limit):
    """The generator takes any advice as it is, and the three marks mean what they say unless a bound cuts them."""
    advice = recommend_scale(8, 22_384, mass=mass, limit=limit)
    assert 0 < advice.min_scale < advice.start < advice.max_scale <= limit
    AttentionBiasGenerator(8, bias_scale=advice.start, min_scale=advice.min_scale, max_scale=advice.max_scale)
    m = torch.tensor(mass, dtype=torch.float64)
    if advice.start < 0.9 * advice.max_scale - 1e-9:
        assert abs(attention_moved(m, advice.start) - 0.5) < 1e-6
    if advice.min_scale < 0.9 * advice.start - 1e-9:
        assert abs(attention_moved(m, advice.min_scale) - 0.05) < 1e-6
    window, = advice.windows
    assert abs(window["reach"] - float(window_mass(m, advice.max_scale))) < 1e-6
    if window["smallest"] and window["judgement"] == "too small":
        assert window_mass(m * (window["smallest"] / 8) ** 2, limit) >= 0.5 > window_mass(m, limit)


def test_formulas_hold_at_the_ends():
    mass = torch.tensor([0.0, 1e-30, 0.5, 1.0], dtype=torch.float64)
    assert window_mass(mass, 1000.0).tolist() == [0, 1, 1, 1] and window_mass(mass, -1000.0).tolist()[2:] == [0, 1]
    assert torch.isfinite(window_gradient(mass, 45.0)).all() and float(window_gradient(0.5, 45.0)) > 0


def test_recorded_measurements():
    """The files that the notebook draws are whole: quantiles rise, runs have all their iterations."""
    file = RESULTS / "logits.json"
    if not file.is_file():
        pytest.skip(f"no {file.name}: `python -m cmtaqr.engine.logits` writes it")
    logits = json.loads(file.read_text())
    assert list(logits["models"]) == ["untrained", "trained"]
    for found in (found for layers in logits["models"].values() for heads in layers for head in heads for found in head.values()):
        assert len(found["quantiles"]) == len(logits["levels"]) and found["quantiles"] == sorted(found["quantiles"])
    file = RESULTS / "saturation.json"
    if not file.is_file():
        pytest.skip(f"no {file.name}: `python -m cmtaqr.engine.saturation` writes it")
    recorded = json.loads(file.read_text())
    assert list(recorded["runs"]) == list(saturation.CASES)
    assert [row["scale"] for row in recorded["curve"]] == list(saturation.SCALES)
    for run in recorded["runs"].values():
        assert [r["iter"] for r in run["records"]] == list(range(1, run["training"]["iterations"] + 1))
