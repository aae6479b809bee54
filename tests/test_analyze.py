"""The analysis of a checkpoint: every version, its notebook, its command line, and what it refuses."""
import json
import os
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet3d", reason='needs the extra: pip install "cmtaqr[detector]"')
pytest.importorskip("papermill", reason='needs the extra: pip install "cmtaqr[dev]"')

import cmtaqr  # noqa: E402
from cmtaqr.data.nuscenes import make_infos  # noqa: E402
from cmtaqr.data.world import make_world  # noqa: E402
from cmtaqr.detector.convert import build_model  # noqa: E402
from cmtaqr.engine.analyze import AnalyzeParameters, analyze, draw, load_detector, main  # noqa: E402
from cmtaqr.engine.options import check_run_notebook  # noqa: E402
from cmtaqr.engine.query_tables import frame_arrays  # noqa: E402
from test_engine import call_papermill  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
TINY = Path(cmtaqr.__file__).parent / "configs" / "cmt_aqr_tiny.py"
MAPS = "renderer=dict(type='WeightRenderer'), modulator=dict(type='FeatureModulator')"
VERSIONS = {"v1": f"dict(version=1, {MAPS})", "v2": f"dict(version=2, {MAPS})", "v3": "dict()",
            "layers": "dict(bias=dict(scale_per='layer', use_gaussian_window=True))", "none": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A world of two frames in either split, and an untrained checkpoint with its config for every version."""
    folder = tmp_path_factory.mktemp("analyze")
    make_world(folder / "world", scenes=["scene-0061", "scene-0103"], keyframes=2, sweeps=0, image_size=(400, 225), workers=1,
               progress=False)
    make_infos(folder / "world")
    for name, aqr in VERSIONS.items():
        config = folder / f"{name}.py"
        config.write_text(f"_base_ = [r'{TINY}']\nmodel = dict(pts_bbox_head=dict(num_query=60, max_num=60, aqr={aqr}))\n")
        torch.manual_seed(0)
        model = build_model(str(config))
        if aqr:
            torch.nn.init.normal_(model.pts_bbox_head.aqr_router.to_weights.weight, std=0.3)
        torch.save(dict(state_dict=model.state_dict()), folder / f"{name}.pth")
    return folder


def values(folder, name, **changes):
    given = dict(checkpoint=str(folder / f"{name}.pth"), config=str(folder / f"{name}.py"), data_root=str(folder / "world"),
                 work_dir=str(folder / f"out_{name}"), device="cpu", windows=5)
    return given | changes


@pytest.mark.parametrize("name, scales", [("v1", 0), ("v2", 0), ("v3", 1), ("layers", 2)])
def test_every_version(folder, name, scales):
    analysis = analyze(AnalyzeParameters.check(values(folder, name)))
    if name in ("v2", "layers"):
        drawn = {path.stem for path in draw(analysis)}
        assert drawn >= {"weights_bev", "weights_cameras", "windows_bev", "windows_cameras"} and not drawn & {"scale", "training"}
    numbers = json.loads((folder / f"out_{name}" / "analysis.json").read_text())
    assert numbers["version"] == {"v1": 1, "v2": 2}.get(name, 3) and numbers["frames"] == 2
    assert len(analysis.queries) == numbers["weights"]["all"]["queries"] == 120 and numbers["weights"]["all"]["lidar"]["std"] > 0
    kinds = [numbers["weights"].get(n, dict(queries=0))["queries"] for n in ("objects", "background")]
    assert sum(kinds) == 120 and sum(g["queries"] for g in numbers["weights"]["distance"].values()) == kinds[0]
    assert analysis.view.unit == ("bias (logits)" if scales else "weight")
    if scales:
        assert len(numbers["scale"]["value"]) == len(numbers["bias"]["lidar"]) == len(numbers["bias"]["camera"]) == scales
        assert numbers["attention"]["entropy"] != numbers["attention"]["entropy_without"]
    else:
        assert numbers["scale"] is None and numbers["bias"] is None and set(numbers["attention"]) == {"entropy", "lidar_share"}
    for query in numbers["windows"]["queries"]:
        for at, (row0, row1, col0, col1) in query["cells"].items():
            rows, cols = (40, 40) if at == "0" else (8, 20)
            assert 0 <= row0 < row1 <= rows and 0 <= col0 < col1 <= cols


def test_frame_arrays_repeat_and_say_what_the_model_says(folder):
    """Predictions and weights of a frame agree with the detections that the detector gives for it."""
    detector = load_detector(AnalyzeParameters.check(values(folder, "v3")))
    token = json.loads((folder / "out_v3" / "analysis.json").read_text())["tokens"][0]
    arrays, frame, layout = frame_arrays(detector, token, folder / "world")
    again = frame_arrays(detector, token, folder / "world")[0]
    assert all(np.array_equal(arrays[name], again[name]) for name in arrays)
    assert (layout.lidar, layout.camera) == ((40, 40), (6, 8, 20)) and arrays["bounds"].shape == (60, 7, 4)
    best = arrays["scores"].argmax()
    first = frame.scores.argmax()
    assert frame.scores[first] == pytest.approx(arrays["scores"][best]) and frame.labels[first] == arrays["labels"][best]
    np.testing.assert_allclose(frame.boxes[first, :2], arrays["centres"][best], atol=1e-4)
    np.testing.assert_allclose(frame.box_weights[first], arrays["weights"][best], atol=1e-6)


def test_what_was_computed_is_not_computed_again(folder):
    given = values(folder, "v3", work_dir=str(folder / "again"))
    analyze(AnalyzeParameters.check(given))
    kept = sorted((folder / "again" / "frames").rglob("*.npz"))
    before, numbers = [path.stat().st_mtime_ns for path in kept], (folder / "again" / "analysis.json").read_text()
    kept[0].unlink()
    analyze(AnalyzeParameters.check(given))
    after = [path.stat().st_mtime_ns for path in kept]
    assert len(kept) == 2 and after[0] != before[0] and after[1] == before[1]
    parts = [json.loads(text)["weights"] for text in (numbers, (folder / "again" / "analysis.json").read_text())]
    assert parts[0] == parts[1]
    os.utime(folder / "v3.pth")
    analyze(AnalyzeParameters.check(given | dict(frames=1)))
    assert len(list((folder / "again" / "frames").rglob("*.npz"))) == 3, "other weights begin anew"


@pytest.mark.parametrize("name, changes, message", [
    ("none", {}, "has no AQR: analyse a checkpoint that was trained with AQR"),
    ("none", dict(config="cmt_aqr_tiny"), "does not fit this model"),
    ("v3", dict(config="cmt_aqr_voxel0100_r50_800x320_cbgs"), "does not fit this model"),
    ("v3", dict(config="cmt_aqr_tyni"), "no config 'cmt_aqr_tyni'.*did you mean 'cmt_aqr_tiny'"),
    ("v3", dict(checkpoint="absent.pth"), "no checkpoint .*absent.pth"),
    ("v3", dict(checkpoint=str(TINY)), "checkpoint"),
    ("v3", dict(data_root="nowhere"), "data root nowhere does not exist"),
    ("v3", dict(frame=2), "frame=2, but 2 frames are analysed: choose 0 to 1"),
    ("v3", dict(split="test"), "split='test' is unknown; expected val or train"),
    ("v3", dict(windows=0), "windows=0 must be at least 1"),
])
def test_refused(folder, name, changes, message, capsys):
    given = values(folder, name, **changes)
    names = {k: f"--{dict(work_dir='out').get(k, k).replace('_', '-')}" for k in given if k != "checkpoint"}
    assert main([given["checkpoint"], *(a for k, name in names.items() for a in (name, str(given[k])))]) == 1
    said = capsys.readouterr()
    assert re.search(message, said.err), said.err
    assert len(said.err.strip().splitlines()) <= 2


def test_weights_without_aqr_are_refused(folder):
    state = torch.load(folder / "v3.pth")["state_dict"]
    torch.save(dict(state_dict={k: v for k, v in state.items() if ".aqr_" not in k}), folder / "plain.pth")
    with pytest.raises(ValueError, match="plain.pth has no AQR weights: analyse a checkpoint that was trained with AQR"):
        analyze(AnalyzeParameters.check(values(folder, "v3", checkpoint=str(folder / "plain.pth"))))


def test_command_line_has_help_for_every_parameter(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    for field in fields(AnalyzeParameters):
        name = dict(checkpoint="checkpoint", work_dir="--out").get(field.name, f"--{field.name.replace('_', '-')}")
        assert name in said, name


def test_notebook(folder):
    check_run_notebook(ROOT / "nbs" / "analyze.ipynb", AnalyzeParameters)
    out = folder / "notebook"
    out.mkdir()
    history = dict(bounds=dict(aqr_bias=[1.0, 8.0]), records=[dict(iter=i, bias_scale=5.0, bias_scale_grad=0.1) for i in (1, 2)])
    (folder / "history.json").write_text(json.dumps(history))
    given = [a for k, v in values(folder, "v3").items() if k != "work_dir" for a in ("-p", k, str(v))]
    done = call_papermill("analyze", out / "analyze.ipynb", *given, cwd=folder)
    (folder / "history.json").unlink()
    assert done.returncode == 0, done.stderr
    outputs = [o for cell in json.loads((out / "analyze.ipynb").read_text())["cells"] for o in cell.get("outputs", [])]
    figures = {path.stem for path in (out / "figures").iterdir()}
    assert figures >= {"weights_bev", "weights_cameras", "windows_bev", "windows_cameras", "scale"}
    assert sum("image/png" in o.get("data", {}) for o in outputs) == len(figures)
    numbers = json.loads((out / "analysis.json").read_text())
    assert numbers["scale_curve"]["bias_scale"] == [5.0, 5.0] and numbers["parameters"]["windows"] == 5
