"""The attention benchmark: its file, its ratios, going on where it stopped, and the notebook that draws it."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install triton")

from cmtaqr.attention import benchmark as module  # noqa: E402
from cmtaqr.attention.alternatives import ALTERNATIVES, POINTS  # noqa: E402
from cmtaqr.attention.benchmark import benchmark, main, ratios, rows  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
FEW = ["100w3/unfused", "100w3/cudnn", "100w3/flex", "100w3/fused"]


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """A file measured on the CPU, without Triton's interpreter: the fused kernels say why they do not run."""
    path = tmp_path_factory.mktemp("benchmark") / "trial.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        assert main(["--quick", "--device", "cpu", "--out", str(path), "--only", *FEW]) == 0
    return path


def test_points_are_those_of_the_configurations():
    shapes = [(p.batch, p.queries, p.layout.num_keys, p.window) for p in POINTS["shapes"]]
    assert shapes == [(2, 900, 22384, 8), (2, 900, 56400, 15), (2, 1792, 56400, 15)]
    assert [p.queries for p in POINTS["queries"]] == [225, 450, 900, 1800, 3600]
    assert [p.layout.num_keys for p in POINTS["keys"]] == [5104, 22384, 56400, 114256, 225600]
    assert [p.window for p in POINTS["window"]] == [1, 3, 8, 15, 31] and [p.batch for p in POINTS["batch"]] == [1, 2, 4, 8]
    assert [(p.layout.num_keys, p.field_of_view) for p in POINTS["views_per_query"]] == [(56400, 70), (56400, 130), (56400, 170)]


def test_rows_are_unique_and_flex_comes_last():
    names = [name for name, *_ in rows()]
    assert len(set(names)) == len(names) and set(rows(quick=True)) < set(rows())
    kinds = [alternative for _, _, alternative, _ in rows()]
    assert set(kinds) == set(ALTERNATIVES) and set(kinds[kinds.index("flex"):]) == {"flex"}


def test_schema(trial):
    data = json.loads(trial.read_text())
    assert set(data) == {"where", "runs", "rows", "ratios"}
    assert data["where"]["device"] == "cpu" and data["where"]["torch"] == torch.__version__
    assert {"commit", "started", "repetitions", "quick", "only", "seconds"} == set(data["runs"][0])
    row = data["rows"]["shapes/2x10x100w3/unfused_dense"]
    assert row["group"] == "shapes" and row["alternative"] == "unfused_dense"
    assert row["point"] == dict(batch=2, queries=10, lidar=[8, 8], camera=[2, 3, 6], window=3, field_of_view=70.0, keys=100,
                                views_per_query=row["point"]["views_per_query"])
    for phase in ("forward", "backward", "forward_backward"):
        assert 0 < row[phase]["p10"] <= row[phase]["median"] <= row[phase]["p90"] and row[phase]["first_call_s"] > 0
    assert set(data["rows"]["shapes/2x10x100w3/flex"]) == {"group", "alternative", "point", "forward", "error"}


def test_what_does_not_run_says_why(trial):
    found = json.loads(trial.read_text())["rows"]
    assert "Triton needs a GPU" in found["shapes/2x10x100w3/fused"]["error"]
    assert "No viable backend" in found["shapes/2x10x100w3/cudnn"]["error"]
    assert "no gradients of q, k and v on cpu" in found["shapes/2x10x100w3/flex"]["error"]


def test_it_goes_on_where_it_stopped(tmp_path, monkeypatch):
    path, name, asked = tmp_path / "out" / "part.json", "shapes/2x10x100w3/unfused_dense", []

    def timing(run, device, repetitions):
        asked.append(repetitions)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return dict(median=1.0, p10=1.0, p90=1.0)

    monkeypatch.setattr(module, "timing", timing)
    few = dict(only=["unfused_dense"], quick=True, device="cpu", repetitions=7)
    with pytest.raises(KeyboardInterrupt):
        benchmark(path, **few)
    assert list(json.loads(path.read_text())["rows"]) == [name]
    assert asked == [7] * 4, "three phases of one row, then the interruption"
    done = benchmark(path, **few)
    assert len(done["rows"]) == 3 and len(done["runs"]) == 2 and len(asked) == 4 + 6, "the first row is not measured again"
    benchmark(path, **few)
    assert len(asked) == 10
    benchmark(path, force=True, **few)
    assert len(asked) == 10 + 9


def made_up(median, queued=None, peak=None, **more):
    """A row with invented figures."""
    phase = dict(median=median, p10=median, p90=median, **(dict(queued=dict(median=queued)) if queued else {}))
    point = dict(batch=2, queries=100, lidar=[10, 10], camera=None, window=3, keys=1000, views_per_query=1.0)
    forward = dict(phase, **({} if peak is None else dict(peak_mib=peak)))
    return dict(group="shapes", alternative="", point=point, forward=forward, **more)


def test_ratios_come_from_medians():
    table = ratios({"p/fused": made_up(0.6, 0.3, 20.0, clock=dict(mhz=2000)), "p/cudnn": made_up(0.5, 0.25),
                    "p/flash": made_up(1.0, peak=16.0), "p/router": made_up(0.06, 0.015), "p/layer": made_up(1.2, 0.6),
                    "q/fused": made_up(9.0)}, multiprocessors=4)
    fused, router = table["p"]["fused"]["forward"], table["p"]["router"]["forward"]
    assert fused["to_cudnn"] == 1.2 and fused["to_cudnn_queued"] == 1.2
    assert fused["mib_above_flash"] == 4.0 and fused["peak_to_flash"] == 1.25
    floor_ms = 1e3 * 2 * 8 * 100 * 1000 / (16 * 4 * 2000e6)
    assert fused["of_floor"] == pytest.approx(floor_ms / 0.3, abs=1e-4) and table["q"]["fused"]["forward"]["to_cudnn"] is None
    assert [router[name] for name in ("of_fused", "of_fused_queued", "of_layer", "of_layer_queued")] == [0.1, 0.05, 0.05, 0.025]
    assert table["p"]["flash"]["forward"]["to_cudnn_queued"] is None
    assert "of_floor" not in ratios({"p/fused": made_up(1.0)})["p"]["fused"]["forward"]


def test_bad_input_is_refused(tmp_path, capsys, trial, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--out", str(tmp_path / "a.json")]) == 1 and "torch sees none (--device cpu" in capsys.readouterr().err
    assert main(["--out", str(tmp_path / "a.json"), "--device", "cpu", "--only", "cudn_"]) == 1
    assert "no row contains 'cudn_'" in capsys.readouterr().err
    (tmp_path / "b.json").write_text("[]")
    assert main(["--out", str(tmp_path / "b.json"), "--device", "cpu"]) == 1
    assert "not a result of this benchmark" in capsys.readouterr().err
    data = json.loads(trial.read_text())
    data["where"]["torch"] = "1.0"
    (tmp_path / "c.json").write_text(json.dumps(data))
    assert main(["--out", str(tmp_path / "c.json"), "--device", "cpu"]) == 1 and "'1.0' there" in capsys.readouterr().err
    assert json.loads((tmp_path / "c.json").read_text()) == data


def test_help():
    command = [sys.executable, "-m", "cmtaqr.attention.benchmark", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert shown.returncode == 0
    assert all(option in shown.stdout for option in ("--out", "--quick", "--only", "--force", "--device"))


def draw(results, folder):
    """The executed notebook's figures and printed text."""
    pytest.importorskip("papermill", reason='needs the extra: pip install "cmtaqr[dev]"')
    from test_engine import call_papermill

    done = call_papermill("benchmark", folder / "drawn.ipynb", "-p", "results", str(results), cwd=folder)
    assert done.returncode == 0, done.stderr
    shown = [o for cell in json.loads((folder / "drawn.ipynb").read_text())["cells"] for o in cell.get("outputs", [])]
    text = "".join(t for o in shown if o["output_type"] == "stream" for t in o["text"])
    return sum("image/png" in o.get("data", {}) for o in shown), text


def test_notebook_without_results_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("would measure: there is a GPU")
    figures, text = draw("none.json", tmp_path)
    assert figures == 0 and "no results yet" in text


def test_notebook_draws_a_trial(tmp_path, trial):
    figures, text = draw(trial, tmp_path)
    assert figures == 1 and "no results yet" not in text, "bars alone: a CPU has no peaks, no clock, and one shape no growth"


def test_notebook_draws_a_made_up_file(tmp_path):
    found = {}
    for name, group, alternative, point in rows():
        ms = point.batch * point.queries * point.layout.num_keys / 2e8
        queued = dict(median=0.8 * ms, p10=0.7 * ms, p90=ms)
        phase = dict(median=ms, p10=0.9 * ms, p90=1.1 * ms, queued=queued, launch_us=50.0, peak_mib=30.0)
        facts = dict(batch=point.batch, queries=point.queries, keys=point.layout.num_keys, window=point.window,
                     views_per_query=1.1)
        found[name] = dict(group=group, alternative=alternative, point=facts, forward=phase, backward=phase,
                           forward_backward=phase)
    next(iter(found.values()))["clock"] = dict(mhz=2000, source="made up")
    content = dict(where=dict(device="made up"), runs=[], rows=found, ratios=ratios(found, 132))
    (tmp_path / "made_up.json").write_text(json.dumps(content))
    figures, text = draw("made_up.json", tmp_path)
    assert figures == 5 and "no results yet" not in text


@pytest.mark.gpu
def test_fused_attention_stays_near_flash_in_memory(cuda, tmp_path):
    place = "shapes/2x900x22384w8"
    result = benchmark(tmp_path / "gpu.json", only=[f"{place}/{name}" for name in ("fused", "cudnn", "flash")])
    assert not any("error" in row for row in result["rows"].values() if row["alternative"] in ("fused", "cudnn", "flash"))
    figures = result["ratios"][place]["fused"]
    assert figures["forward"]["to_cudnn"] > 0 and 0 < figures["forward"]["of_floor"] < 1
    assert figures["forward_backward"]["mib_above_flash"] <= 16


@pytest.mark.parametrize("name, value, words", [("results", "foreign.json", "foreign.json is no result of"),
                                                ("device", "cud", "device is cuda or cpu"), ("quick", "no", "are True or False")])
def test_notebook_refuses_what_it_cannot_draw(tmp_path, name, value, words):
    from test_engine import call_papermill
    (tmp_path / "foreign.json").write_text("[1]")
    done = call_papermill("benchmark", tmp_path / "drawn.ipynb", "-p", name, value, cwd=tmp_path)
    assert done.returncode and "ValueError: " in done.stderr and words in done.stderr
