"""The decoder against numbers and names of the released detector."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("mmdet3d", reason='needs the detector part: pip install "cmtaqr[detector]"')
from cmtaqr.bias import LocalBias  # noqa: E402
from cmtaqr.detector.decoder import CmtTransformer  # noqa: E402
from cmtaqr.detector.tokens import bev_coords, camera_rays, sine_embedding  # noqa: E402
from cmtaqr.geometry import TokenLayout, Windows  # noqa: E402

RANGE = (-54.0, -54.0, -5.0, 54.0, 54.0, 3.0)


@pytest.fixture(scope="module")
def golden(shared):
    file = np.load(shared / "golden" / "head_eval.npz")
    return {name: torch.from_numpy(file[name]) for name in file.files if file[name].dtype.kind in "fi"}


@pytest.fixture(scope="module")
def released(golden):
    """Decoder with the golden weights."""
    decoder = CmtTransformer(dict(num_layers=2, layer=dict(feedforward_channels=256))).eval()
    prefix = "state/transformer."
    decoder.load_state_dict({k[len(prefix):]: v for k, v in golden.items() if k.startswith(prefix)})
    return decoder


@pytest.fixture(scope="module")
def tokens(golden):
    """Memory and its positions, put together from the golden features and weights."""
    def mlp(name, x):
        w0, b0, w1, b1 = (golden[f"state/{name}.{key}"] for key in ("0.weight", "0.bias", "2.weight", "2.bias"))
        return F.linear(F.linear(x, w0, b0).relu(), w1, b1)
    bev, image = golden["mid/shared_conv"], golden["in/img_feat"].unflatten(0, (2, 6))
    rays = camera_rays(golden["in/lidar2img"], image.shape[-2:], golden["in/pad_shape"][:2].tolist(), RANGE)
    bev_pos = mlp("bev_embedding", sine_embedding(bev_coords((128, 128, 40))))
    memory = torch.cat((bev.flatten(2).transpose(1, 2), image.permute(0, 1, 3, 4, 2).flatten(1, 3)), 1)
    memory_pos = torch.cat((bev_pos.expand(2, -1, -1), mlp("rv_embedding", rays).flatten(1, 3)), 1)
    return memory, memory_pos


def some_bias(batch, queries, fill, layout):
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor(layout.maps)
    cells = (torch.rand(batch, queries, len(sizes), 2, generator=generator) * sizes).long()
    windows = Windows(layout, cells, torch.ones(cells.shape[:3], dtype=torch.bool), (5,) + (8,) * (len(sizes) - 1))
    return LocalBias(windows, torch.full((batch, queries, 2), fill), None)


def test_matches_the_released_decoder(released, tokens, golden):
    with torch.no_grad():
        out = released(*tokens, golden["mid/query_embed"])
    torch.testing.assert_close(out, golden["mid/decoder"], rtol=0, atol=3e-5)


def test_zero_bias_is_the_released_decoder(released, tokens, golden):
    bias = some_bias(2, 60, 0.0, TokenLayout((16, 16), (6, 4, 10)))
    with torch.no_grad():
        out = released(*tokens, golden["mid/query_embed"], bias=bias)
    torch.testing.assert_close(out, golden["mid/decoder"], rtol=0, atol=3e-5)


def test_bias_moves_the_output_and_order_of_tokens_does_not(released, tokens, golden):
    memory, memory_pos = tokens
    order = torch.randperm(memory.shape[1], generator=torch.Generator().manual_seed(0))
    bias = some_bias(2, 60, 2.0, TokenLayout((16, 16), (6, 4, 10)))
    with torch.no_grad():
        biased = released(memory, memory_pos, golden["mid/query_embed"], bias=bias)
        shuffled = released(memory[:, order], memory_pos[:, order], golden["mid/query_embed"])
    assert (biased - golden["mid/decoder"]).abs().max() > 1e-2
    torch.testing.assert_close(shuffled, golden["mid/decoder"], rtol=0, atol=3e-5)


def test_names_of_the_full_decoder(shared):
    keys = json.loads((shared / "golden" / "keys_r50.json").read_text())["entries"]
    prefix = "pts_bbox_head.transformer."
    want = {k[len(prefix):]: list(v[0]) for k, v in keys.items() if k.startswith(prefix)}
    with torch.device("meta"):
        got = {k: list(v.shape) for k, v in CmtTransformer().state_dict().items()}
    assert got == want


def test_no_dropout_of_cross_attention_probabilities(released, tokens, golden):
    memory, memory_pos = tokens
    cross = released.decoder.layers[0].attentions[1]
    cross.train()
    cross.dropout.eval()
    with torch.no_grad():
        trained = cross(golden["mid/query_embed"], memory + memory_pos, memory)
        cross.eval()
        torch.testing.assert_close(trained, cross(golden["mid/query_embed"], memory + memory_pos, memory))


def test_bias_of_another_size_is_named(released, tokens, golden):
    bias = some_bias(2, 60, 1.0, TokenLayout((8, 8), (6, 4, 10)))
    with pytest.raises(ValueError, match=r"\(2, 60, 304\).*\(2, 60, 496\)"):
        released(*tokens, golden["mid/query_embed"], bias=bias)


def test_a_plan_goes_with_its_windows_into_a_recording():
    """The copies that a recorded CUDA graph reads from are the windows of the copied plan, as the originals were."""
    pytest.importorskip("triton")
    from cmtaqr.attention.plan import Plan
    from cmtaqr.detector.inference import _leaves, _rebuilt, _twins
    bias = some_bias(2, 9, 1.0, TokenLayout((4, 4), (1, 2, 3)))
    cells, seen = bias.windows.cells, bias.windows.seen
    bias = replace(bias, plan=Plan(*torch.zeros(3, 2), cells, seen, (1, 2)))
    tensors = [x for x in _leaves(bias) if isinstance(x, torch.Tensor)]
    twins = _twins(tensors)
    places = {i: tensors[i].clone() for i in set(twins)}
    copied = _rebuilt(bias, (places[i] for i in twins))
    assert copied.plan.fits(copied.windows, (1, 2)) and not copied.plan.fits(bias.windows, (1, 2))


def test_gradients_of_a_training_step_are_finite():
    torch.manual_seed(0)
    layer = dict(embed_dims=32, num_heads=4, feedforward_channels=64)
    decoder = CmtTransformer(dict(num_layers=2, layer=layer)).train()
    decoder.init_weights()
    layout = TokenLayout((4, 4), (1, 2, 3))
    memory, memory_pos, query_pos = torch.randn(2, 22, 32), torch.randn(1, 22, 32), torch.randn(2, 9, 32)
    mask = torch.zeros(9, 9, dtype=torch.bool)
    mask[4:, :4] = True
    bias = some_bias(2, 9, 1.0, layout)
    bias.value.requires_grad_()
    (decoder(memory, memory_pos, query_pos, mask, bias) * torch.randn(32)).sum().backward()
    gradients = [bias.value.grad, *(p.grad for p in decoder.parameters())]
    assert all(g is not None and g.isfinite().all() for g in gradients) and bias.value.grad.abs().sum() > 0
