"""The pinned versions agree everywhere, the wheel holds what it must, and the torch-only part needs torch alone."""
import json
import re
import subprocess
import sys
import sysconfig
import zipfile
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import pytest

from conftest import ROOT

PIN = re.compile(r"^\s*(?:- )?([A-Za-z0-9_.-]+)==([^\s;]+)\s*$", re.M)
OPTIONAL_STACK = ("mmengine mmcv mmdet mmdet3d nuscenes spconv spconv_triton triton fastcore nbdev flash_attn scipy cv2 "
                  "matplotlib").split()


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text):
    return {normal(name): version for name, version in PIN.findall(text)}


LOCK = pins((ROOT / "requirements.lock").read_text())


def test_every_pin_agrees_with_the_lock():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    settings = "\n".join(" ".join(config["DEFAULT"][key] for key in config["DEFAULT"] if key.endswith("requirements")).split())
    setup = "\n".join(re.findall(r'"([a-z0-9]+==[\d.]+)"', (ROOT / "setup.py").read_text()))
    environment = (ROOT / "environment.yml").read_text()
    found = {"settings.ini": pins(settings), "setup.py": pins(setup), "environment.yml": pins(environment)}
    for place, named in found.items():
        assert named, place
        assert {name: version for name, version in named.items() if LOCK.get(name) != version} == {}, place


def test_installed_versions_are_the_tested_ones():
    distributions = metadata.distributions(path=[sysconfig.get_path("purelib")])
    installed = {normal(dist.metadata["Name"]): dist.version.split("+")[0] for dist in distributions}
    checked = installed.keys() & LOCK.keys()
    assert {"torch", "mmcv", "mmdet3d", "mmengine", "nbdev", "nuscenes-devkit"} <= checked
    assert {name: (installed[name], LOCK[name]) for name in checked if installed[name] != LOCK[name]} == {}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", str(ROOT), "--no-deps", "--no-build-isolation", "-w", str(out)]
    subprocess.run(command, check=True, cwd=out)
    return next(out.glob("cmtaqr-*.whl"))


def test_wheel_contains_modules_and_configs(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "cmtaqr").rglob("*.py")}
    assert any(name.startswith("cmtaqr/configs/_base_/") for name in sources)
    assert sources - names == set()
    assert {name for name in names if name.startswith("cmtaqr/")} - sources == set()


def test_readme_figures_come_from_result_files():
    readme = (ROOT / "README.md").read_text()
    demo, overfit = result("demo.json"), result("overfit_real_frame.json")
    for metric in ("mAP", "NDS"):
        values = [demo[run]["metrics"][metric] for run in ("untrained", "trained")]
        assert f"| {metric} | {values[0]:.3f} | {values[1]:.3f} |" in readme
        assert values[1] > values[0] + 0.05
    weights = result("demo_weights.json")["weights"]["all"]
    lidar, camera = (weights[sensor]["mean"] for sensor in ("lidar", "camera"))
    assert f"go to {lidar:.2f} everywhere, the cameras' to {camera:.2f} on average" in readme
    assert f"mAP {overfit['mAP']:.3f}" in readme
    assert f"{overfit['iterations']} iterations and {overfit['seconds']:.0f} s" in readme


def result(name):
    return json.loads((ROOT / "nbs/results" / name).read_text())


def test_readme_times_and_errors_come_from_result_files():
    readme = (ROOT / "README.md").read_text()
    parity = result("parity.json")["rows"]
    assert all(row["verdict"] == "ok" for row in parity)
    assert f"{len(parity)} of {len(parity)} within 1e-5" in readme
    assert f"the largest error {max(row['error'] for row in parity if row['tolerance'] == 1e-5):.1e}" in readme
    speed = {(m["config"], m["setting"]): m["frames_per_second"] for m in result("speed.json")["models"]}
    ratio = result("speed.json")["ratio"]
    for model in ("voxel0100_r50_800x320_cbgs", "voxel0075_vov_1600x640_cbgs"):
        for setting in ("plain", "fast"):
            cmt, aqr = speed[f"cmt_{model}", setting], speed[f"cmt_aqr_{model}", setting]
            assert f"| {cmt:.1f} | {aqr:.1f} | {ratio[f'cmt_aqr_{model} {setting}']:.3f} |" in readme
    attention, faster = result("attention.json"), result("attention_faster_host.json")
    ratios, smallest = attention["ratios"], "shapes/2x900x22384w8"
    labels = {"2x900x22384w8": "900 × 22,384, 8", "2x900x56400w15": "900 × 56,400, 15",
              "2x1792x56400w15": "1,792 × 56,400, 15"}
    for name, label in labels.items():
        here = ratios[f"shapes/{name}"]
        own = [here["fused_planned"][phase]["to_cudnn_queued"] for phase in ("forward", "forward_backward")]
        matrix = min(here[way]["forward_backward"]["to_cudnn"] for way in ("efficient_dense", "unfused_dense"))
        flex = here["flex"]["forward_backward"]["to_cudnn"]
        assert f"| {label} | {own[0]:.2f} | {own[1]:.2f} | {matrix:.1f} | {flex:.1f} |" in readme
    above = {phase: [ratios[f"shapes/{name}"]["fused"][phase]["mib_above_flash"] for name in labels]
             for phase in ("forward", "forward_backward")}
    assert f"{min(above['forward_backward']):.0f} to {max(above['forward_backward']):.0f} MiB above" in readme
    assert f"{min(above['forward']):.1f} to {max(above['forward']):.1f} MiB" in readme
    both = [ratios[f"shapes/{name}"][way]["forward_backward"] for name in labels for way in ("fused_planned", "fused")]
    launched, queued = ([figures[basis] for figures in both] for basis in ("to_cudnn", "to_cudnn_queued"))
    assert f"takes {launched[0]:.2f} (forward + backward) with that plan and {launched[1]:.2f} with one of its own" in readme
    assert all(abs(a / b - 1) < 0.01 for a, b in zip(launched[2:], queued[2:]))
    hosts = [file["rows"][f"{smallest}/cudnn"]["forward"]["launch_us"] for file in (attention, faster)]
    there = [faster["ratios"][smallest][way]["forward_backward"]["to_cudnn"] for way in ("fused_planned", "fused")]
    assert f"call takes this host {hosts[0]:.0f} µs. On a host that takes {hosts[1]:.0f} µs it was {there[0]:.2f} and {there[1]:.2f}" in readme
    several = [(figures["fused"]["forward_backward"]["to_cudnn_queued"],
                attention["rows"][f"{name}/fused"]["point"]["views_per_query"])
               for name, figures in ratios.items() if name.startswith("views_per_query")]
    (a, b, c), (x, y, z) = zip(*several)
    assert f"Where {x:.1f}, {y:.1f} and {z:.1f} cameras see a query, the second shape takes {a:.2f}, {b:.2f} and {c:.2f}" in readme
    one_map = ratios["one_map/2x900x22528w8"]["fused"]
    assert f"{one_map['forward']['to_cudnn']:.2f} (forward) and {one_map['forward_backward']['to_cudnn']:.2f} (forward" in readme
    assert f"takes {launched[1]:.2f} of cuDNN's time without one instead of 1.5" in readme
    layers = [ratios[f"shapes/{name}"]["router"]["forward_backward"]["of_layer_queued"] for name in labels]
    assert f"takes {100 * min(layers):.0f} to\n{100 * max(layers):.0f} % of the GPU time" in readme
    slower = [r for name in labels if (r := ratios[f"shapes/{name}"]["fused_planned"]["forward_backward"]["to_cudnn_queued"]) > 1]
    assert len(slower) == 2 and f"{min(slower):.2f} to {max(slower):.2f} of it at two of the three shapes" in readme


def test_readme_training_figures_come_from_result_files():
    readme = (ROOT / "README.md").read_text()
    training = result("training.json")
    rows = {(r["config"], r["batch"], r["model"], r["frozen"], r["attention"]): r for r in training["records"]
            if r["precision"] == "bf16" and r["checkpointing"] and not r["compile"] and not r.get("channels_last")}
    for config, label in (("cmt_aqr_voxel0100_r50_800x320_cbgs", "ResNet-50, 800×320"),
                          ("cmt_aqr_voxel0075_vov_1600x640_cbgs", "VoVNet-99, 1600×640")):
        for batch in (2, 4):
            full, frozen, matrix = (rows[config, batch, "aqr", *rest]
                                    for rest in ((False, "windows"), (True, "windows"), (True, "unfused")))
            pace = full["samples_per_second"] / rows[config, batch, "cmt", False, "windows"]["samples_per_second"]
            paces = [f"{r['samples_per_second']:.1f}" for r in (full, frozen)]
            peaks = [f"{r['memory_mib']['peak'] / 1024:.1f}" for r in (full, frozen, matrix)]
            assert f"| {label}, batch {batch} | {pace:.2f} | {' | '.join(paces + peaks)} |" in readme
    times = {(r["config"], bool(r["compile"])): r["step_ms"]["median"] for r in training["records"]
             if r["precision"] == "bf16" and r["batch"] == 2 and r["frozen"] and r["attention"] == "windows"}
    off = [100 * (1 - times[config, True] / times[config, False]) for config, compiled in times if compiled]
    assert f"takes {off[0]:.0f} % off a step with frozen encoders and batch 2 (ResNet-50), or {off[1]:.0f} % (VoVNet-99)" in readme
    counted = result("training_gpu_time.json")
    slow = [numbers["aqr_over_cmt"] for file in (result("training_slow_host.json"), counted) for numbers in file["summary"].values()]
    assert f"AQR keeps {min(slow):.2f} to {max(slow):.2f} of CMT's pace" in readme
    own = [numbers["gpu_aqr_over_cmt"] for numbers in counted["summary"].values()]
    assert f"CMT takes {min(own):.2f} to {max(own):.2f} of what AQR takes" in readme
    filled = [100 * r["gpu_ms"] / r["step_ms"]["median"] for r in counted["records"]
              if r["precision"] == "bf16" and r["attention"] == "windows"]
    assert f"kernels fill {min(filled):.0f} to {max(filled):.0f} % of a step" in readme
    kept = [numbers["plain"]["4"] for numbers in result("scaling.json")["summary"].values()]
    assert f"{100 * min(kept):.0f} to {100 * max(kept):.0f} % of the pace" in readme
    two = [100 * numbers["plain"]["2"] for numbers in result("scaling_two.json")["summary"].values()]
    assert f"on another {min(two):.0f} to {max(two):.0f} % (`nbs/results/scaling_two.json`" in readme
    drift = result("resume_drift.json")
    apart, continued = drift["from_the_same_weights"], drift["continued_from_a_checkpoint"]
    assert f"by {apart[0]:.1e} of the loss at once and {100 * max(apart):.0f} % within six iterations" in readme
    assert f"continuations by {continued[0]:.1e} and {100 * max(continued):.1f} %" in readme
    loading = result("loading.json")
    *short, longest = sorted(100 * row["idle"] for row in loading["trained"])
    assert f"waited for at most {max(short):.1f} % of the time, but for {longest:.1f} % with ResNet-50 frozen" in readme
    cores = [row["cores_per_node"] for row in loading["needs"]]
    assert f"so 8 GPUs want {min(cores)} to {max(cores)} cores" in readme
    assert f"({100 * result('instruments.json')['share_with_file']:.1f} % of a step" in readme
    launches = [r["graph_ms"] for r in result("windows.json")["records"] if r["way"] == "fused"]
    assert f"four launches and take {max(launches):.3f} ms" in readme


def run_with_torch_alone(code, folder):
    """Run code where nothing of the optional stack can be imported, against the package in `folder`."""
    blocker = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {OPTIONAL_STACK!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block()); sys.path.insert(0, {str(folder)!r})
"""
    return subprocess.run([sys.executable, "-c", blocker + code], capture_output=True, text=True, cwd=folder)


def test_torch_alone_is_enough_for_the_attention_part(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    done = run_with_torch_alone("""
import cmtaqr, torch
from cmtaqr import sensitivity, projection, geometry, scale, bias, router, modulation
from cmtaqr.attention import biased_attention
assert cmtaqr.__file__.startswith(sys.path[0]), cmtaqr.__file__
layout = geometry.TokenLayout(lidar=(8, 8), camera=None)
points = torch.tensor([[[0.5, 0.5, 0.0], [-3.5, 3.5, 0.0]]])
windows = geometry.query_windows(points, None, None, layout, (-4, -4, -1, 4, 4, 1), (1.0, 1.0), 3)
local = bias.AttentionBiasGenerator(window_size=3)(torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]), windows)
q = k = torch.zeros(1, 2, 64, 16); v = torch.eye(64)[None, None, :, :16].expand(1, 2, 64, 16)
out = biased_attention(q[:, :, :2], k, v, bias=local)
plain = biased_attention(q[:, :, :2], k, v)
# Equal scores: the window's nine cells hold 9 e^b / (55 + 9 e^b) of the attention; row 4, column 4 is its centre.
b = torch.tensor(2.5)
expected = torch.exp(b) / (55 + 9 * torch.exp(b))
assert torch.allclose(local.dense()[0, 0].softmax(0)[4 * 8 + 4], expected, atol=1e-6)
assert torch.allclose(out[0, 0, 1], plain[0, 0, 1], atol=1e-6)
print('ok')
""", tmp_path)
    assert done.returncode == 0 and done.stdout.strip() == "ok", done.stderr


@pytest.mark.parametrize("module", ["cmtaqr.detector", "cmtaqr.engine"])
def test_the_detector_part_names_its_extra(module, tmp_path):
    done = run_with_torch_alone(f"import {module}", ROOT)
    assert done.returncode != 0
    assert "ImportError" in done.stderr and 'pip install "cmtaqr[detector]"' in done.stderr


def test_installer_says_what_to_do_when_a_pin_is_missing(tmp_path, monkeypatch):
    import importlib.util
    spec = importlib.util.spec_from_file_location("install", ROOT / ".ci" / "install.py")
    install = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(install)
    with pytest.raises(install.StepFailed, match="no-such-package is not pinned .* add a line"):
        install.pinned("no-such-package")
    monkeypatch.setattr(install, "LOG", Path(tmp_path / "log"))
    with pytest.raises(install.StepFailed, match="ended with status 3"):
        install.stream([sys.executable, "-c", "print('about to fail'); raise SystemExit(3)"])
