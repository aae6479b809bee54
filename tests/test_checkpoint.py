"""Loading checkpoints of released detectors and of other configs, and files that are not checkpoints."""
import json
import os
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet3d", reason='needs the detector part: pip install "cmtaqr[detector]"')
import cmtaqr.configs  # noqa: E402
import cmtaqr.detector  # noqa: E402, F401
from cmtaqr.detector.checkpoint import CheckpointMismatch, load_checkpoint, read_state_dict  # noqa: E402
from mmdet3d.registry import MODELS  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402
from torch import nn  # noqa: E402

CONFIGS = Path(list(cmtaqr.configs.__path__)[0])


def build(name):
    """Detector of a config, untrained and without its backbone's download."""
    init_default_scope("mmdet3d")
    cfg = Config.fromfile(CONFIGS / f"{name}.py")
    if cfg.model.get("img_backbone"):
        cfg.model.img_backbone.pop("init_cfg", None)
    return MODELS.build(cfg.model)


@pytest.fixture(scope="module")
def released(shared, tmp_path_factory):
    """A file with the keys, shapes and nesting of the released r50 checkpoint (expanded scalars: small on disk)."""
    entries = json.loads((shared / "golden" / "keys_r50.json").read_text())["entries"]
    state = OrderedDict()
    for index, (key, (shape, dtype, _)) in enumerate(entries.items()):
        state[key] = torch.full((1,) * len(shape), index % 97, dtype=getattr(torch, dtype)).expand(shape)
    file = tmp_path_factory.mktemp("released") / "cmt_r50.pth"
    torch.save(dict(meta=dict(epoch=20), state_dict=state, optimizer={}), file)
    return file


@pytest.fixture(scope="module")
def aqr_model():
    return build("cmt_aqr_voxel0100_r50_800x320_cbgs")


def test_released_file_fits_the_cmt_config(released):
    model = build("cmt_voxel0100_r50_800x320_cbgs")
    assert load_checkpoint(model, released) == []
    for index, (key, value) in enumerate(read_state_dict(released).items()):
        assert torch.equal(model.state_dict()[key], value), key


def test_released_file_starts_an_aqr_model(released, aqr_model):
    before = {k: v.clone() for k, v in aqr_model.state_dict().items() if ".aqr_" in k}
    fresh = load_checkpoint(aqr_model, released)
    assert sorted(fresh) == sorted(before) and "pts_bbox_head.aqr_bias.bias_scale" in fresh
    state = aqr_model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in before.items())
    assert all(torch.equal(state[k], v) for k, v in read_state_dict(released).items())


@pytest.mark.parametrize("with_metadata", [True, False])
def test_old_layout_of_sparse_weights(released, aqr_model, tmp_path, with_metadata):
    """(z, y, x, in, out) of spconv 1 arrives as (out, z, y, x, in), whatever the metadata say."""
    content = torch.load(released, weights_only=True)
    generator = torch.Generator().manual_seed(0)
    key = "pts_middle_encoder.encoder_layers.encoder_layer2.2.0.weight"
    weight = torch.randn(content["state_dict"][key].shape, generator=generator)
    content["state_dict"] = OrderedDict(
        (k, v.permute(1, 2, 3, 4, 0) if v.ndim == 5 else v) for k, v in {**content["state_dict"], key: weight}.items())
    if with_metadata:
        content["state_dict"]._metadata = OrderedDict(aqr_model.state_dict()._metadata)
    torch.save(content, tmp_path / "old.pth")
    load_checkpoint(aqr_model, tmp_path / "old.pth")
    assert torch.equal(aqr_model.state_dict()[key], weight)


def test_own_file_returns_unchanged(aqr_model, tmp_path):
    with torch.no_grad():
        aqr_model.pts_bbox_head.aqr_bias.bias_scale.fill_(1.25)
    torch.save(dict(state_dict=aqr_model.state_dict()), tmp_path / "aqr.pth")
    before = {k: v.clone() for k, v in aqr_model.state_dict().items()}
    with torch.no_grad():
        aqr_model.pts_bbox_head.aqr_bias.bias_scale.fill_(3)
    assert load_checkpoint(aqr_model, tmp_path / "aqr.pth") == []
    assert all(torch.equal(v, before[k]) for k, v in aqr_model.state_dict().items())


def test_checkpoint_of_another_config_names_what_differs(released):
    tiny = build("cmt_aqr_tiny")
    before = {k: v.clone() for k, v in tiny.state_dict().items()}
    with pytest.raises(CheckpointMismatch, match="does not fit this model.*Use the config") as error:
        load_checkpoint(tiny, released)
    assert error.value.shapes and str(released) in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in tiny.state_dict().items()), "a refused checkpoint changed the model"


def test_aqr_file_for_a_plain_cmt_says_so(released, tmp_path):
    content = torch.load(released, weights_only=True)
    content["state_dict"]["pts_bbox_head.aqr_bias.bias_scale"] = torch.tensor(2.5)
    torch.save(content, tmp_path / "aqr.pth")
    with pytest.raises(CheckpointMismatch, match="the model has no AQR"):
        load_checkpoint(build("cmt_voxel0100_r50_800x320_cbgs"), tmp_path / "aqr.pth")


def test_another_version_of_aqr_is_not_called_none():
    own, others = "pts_bbox_head.aqr_modulator.trained_with", "pts_bbox_head.aqr_bias.bias_scale"
    said = str(CheckpointMismatch("a b/iter_2.pth", [own], [others], []))
    assert "the model has another version of AQR." in said and "inspect 'a b/iter_2.pth'`" in said


class Touch:
    """Creates a file when unpickled without restrictions."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save(dict(state_dict=Touch(tmp_path / "ran")), tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="bad.pth.*was not opened"):
        read_state_dict(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content, error, message", [
    (None, FileNotFoundError, "does not exist"), (b"", ValueError, "damaged"), (b"<html>404</html>", ValueError, "damaged"),
    ("cut", ValueError, "damaged"), (dict(meta=1), ValueError, "no weights"), ([1, 2], ValueError, "no weights")])
def test_files_that_are_no_checkpoints(tmp_path, content, error, message):
    file = tmp_path / "weights.pth"
    if content == "cut":
        torch.save(nn.Linear(50, 50).state_dict(), file)
        file.write_bytes(file.read_bytes()[:5000])
    elif isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(error, match=f"weights.pth.*{message}"):
        load_checkpoint(nn.Linear(50, 50), file)
