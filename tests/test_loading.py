"""The training pipeline, timed stage by stage by one command, and what a node needs for it."""
import json
import time

import pytest
import torch

pytest.importorskip("mmdet3d", reason='needs the extra: pip install "cmtaqr[detector]"')

from cmtaqr.engine.configure import load_config  # noqa: E402
from cmtaqr.engine.feeding import steady_steps, trained  # noqa: E402
from cmtaqr.engine.loading import main, make_data, training_frames  # noqa: E402
from cmtaqr.engine.parameters import package_root  # noqa: E402


def test_stages_workers_and_needs_of_a_small_world(tmp_path, capsys):
    make_data(tmp_path / "world", frames=1, image_size=(320, 180), sweeps=2)
    child = tmp_path / "small.py"
    child.write_text(f'_base_ = [r"{package_root() / "cmtaqr/configs/cmt_aqr_tiny.py"}"]\npaste = dict()\nsweeps_num = 2\n')
    pace = dict(config=str(child), batch=2, model="aqr", frozen=True, precision="bf16", attention="windows", checkpointing=True,
                compile=[], samples_per_second=100.0)
    (tmp_path / "training.json").write_text(json.dumps(dict(records=[pace])))
    call = ["--json", str(tmp_path / "loading.json"), "--data", str(tmp_path / "world"),
            "--training", str(tmp_path / "training.json"), "--configs", str(child), "--workers", "1", "--samples", "2",
            "--train", "yes", "--steps", "2"]
    assert main(call) == 0
    result = json.loads((tmp_path / "loading.json").read_text())
    found, (row,) = result["configs"][str(child)], result["needs"]
    transforms = [t["type"] for t in load_config(child).train_dataloader.dataset.pipeline]
    assert list(found["cpu_ms"]) == ["read the list", *transforms] and "PasteObjects" in transforms
    assert found["paces"][0]["samples_per_second"] > 0 and found["packed_mib"] > 0.7
    assert row["cores_per_gpu"] == pytest.approx(100 * row["ms_per_sample"] / 1e3, rel=1e-2)
    assert row["workers_per_gpu"] >= 0.95 * row["cores_per_gpu"] and row["cores_per_node"] == 8 * (row["workers_per_gpu"] + 1)
    assert [(r["config"], r["frozen"], r["batch"], r["workers"], r["steps"]) for r in result["trained"]] == \
        [(str(child), frozen, 2, 1, 2) for frozen in (False, True)]
    for r in result["trained"]:
        assert 0 <= r["waiting"] <= r["idle"] < 1
        assert 2e3 * (1 - r["idle"]) / r["samples_per_second"] == pytest.approx(r["step_ms"]["mean"], rel=1e-2)
        assert r["waiting"] == pytest.approx(r["wait_ms"]["mean"] / (r["wait_ms"]["mean"] + r["step_ms"]["mean"]), abs=1e-3)
    told = capsys.readouterr().out
    assert result["verdict"] in told and "with 1 loader process" in result["verdict"]
    assert "ms of a core per sample" in told and result["sentence"] in told and "database infos" not in told


def test_missing_data_is_named(tmp_path, capsys):
    assert main(["--json", str(tmp_path / "loading.json"), "--data", str(tmp_path / "absent")]) == 1
    assert "absent" in capsys.readouterr().err


class Sleepy(torch.utils.data.Dataset):
    """Samples that take a tenth of a second to load."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        time.sleep(0.1)
        return dict(value=torch.tensor(index))


def test_a_slow_loader_is_seen_however_long_it_had_before():
    given, pause = [], iter([1.0] * 2)

    def step(batch):
        given.append([int(v) for v in batch["value"]])
        time.sleep(next(pause, 0.0))  # kernels are compiled: the queue becomes full
        return 10.0

    found = steady_steps(step, Sleepy(), workers=1, batch=2, steps=8, warmup=1)
    # a worker has no more than two batches ready: at least six of eight were begun after the measurement, 200 ms of sleep each
    assert found["idle"] >= 1 - 8 * 10 / (6 * 200) and found["waiting"] > 0.8
    assert found["step_ms"] == found["alone_ms"] == dict(median=10.0, mean=10.0)
    order = [[(2 * i) % 3, (2 * i + 1) % 3] for i in range(2 + 2 + 1 + 8 + 2)]
    assert given == order[:2] + order[4:]  # two batches were taken from the queue without a step


@pytest.mark.parametrize("workers, steps", [(2, 4), (0, 3)])
def test_workers_take_turns_and_waiting_is_part_of_idling(workers, steps):
    found = steady_steps(lambda batch: 1e-6, Sleepy(), workers, batch=1, steps=3, warmup=1)
    assert found["steps"] == steps and 0 <= found["waiting"] <= 1 and 0.5 < found["idle"] <= 1
    assert found["wait_ms"]["mean"] * found["steps_per_second"] <= 1e3 * (1 + 1e-2)


@pytest.mark.gpu
def test_batches_of_a_loader_train_on_a_gpu(cuda, tmp_path):
    make_data(tmp_path / "world", frames=1, image_size=(320, 180), sweeps=2)
    child = tmp_path / "small.py"
    child.write_text(f'_base_ = [r"{package_root() / "cmtaqr/configs/cmt_aqr_tiny.py"}"]\npaste = dict()\nsweeps_num = 2\n')
    rows = trained(training_frames(child, tmp_path / "world"), str(child), True, [2], steps=4)
    assert [(r["device"], r["workers"], r["steps"]) for r in rows] == [("cuda", 2, 4)]
    assert rows[0]["samples_per_second"] > 0 and 0 <= rows[0]["waiting"] <= rows[0]["idle"] < 1
