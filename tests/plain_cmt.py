"""CMT's head from its formulas in float64, and reference files of any size made with it."""
import json
import math

import numpy as np
import torch
import torch.nn.functional as F

SIZES = dict(center=2, height=1, dim=3, rot=2, vel=2)


def mlp(state, name, x):
    hidden = (x @ state[f"{name}.0.weight"].T + state[f"{name}.0.bias"]).clamp(min=0)
    return hidden @ state[f"{name}.2.weight"].T + state[f"{name}.2.bias"]


def sine(points, n):
    """[..., 2 n], y first."""
    parts = []
    for t in (points[..., 1], points[..., 0]):
        for i in range(n):
            angle = 2 * math.pi * t / (1 + 2 * (i // 2) / n)
            parts.append(angle.cos() if i % 2 else angle.sin())
    return torch.stack(parts, -1)


def logit(t):
    t = t.clamp(0, 1)
    return (t.clamp(min=1e-5) / (1 - t).clamp(min=1e-5)).log()


def layer_norm(x, weight, bias, eps=1e-5):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def bev_coords(grid, stride):
    cols, rows = grid[0] // stride, grid[1] // stride
    return torch.tensor([[(c + 0.5) / rows, (r + 0.5) / cols] for r in range(rows) for c in range(cols)], dtype=torch.float64)


def depths(config):
    return torch.tensor([1 + k * (config["pc_range"][3] - 1) / config["depth_num"] for k in range(config["depth_num"])],
                        dtype=torch.float64)


def bounds(config):
    low, high = torch.tensor(config["pc_range"], dtype=torch.float64).view(2, 3)
    return low, high - low


def lift(matrix, uvw, config):
    """Points [N, D, 3], normalised, of homogeneous pixels [N, 3] at all depths."""
    d = depths(config)[None, :, None]
    homogeneous = torch.cat([uvw[:, None] * d, torch.ones(len(uvw), d.shape[1], 1, dtype=torch.float64)], -1)
    points = homogeneous @ torch.linalg.inv(matrix).T
    low, size = bounds(config)
    return (points[..., :3] - low) / size


def project(matrix, metric):
    """Homogeneous [N, 3] and pixels with w [N, 3]."""
    image = (torch.cat([metric, torch.ones(len(metric), 1, dtype=torch.float64)], -1) @ matrix.T)[:, :3]
    z = image[:, 2:]
    return image, image / torch.where(z > 0, z + 1e-6, z - 1e-6)


def in_view(image, pixels, pad):
    return (image[:, 2] > 0) & (pixels[:, :2] >= 0).all(1) & (pixels[:, 0] < pad[1]) & (pixels[:, 1] < pad[0])


def cell_rays(matrix, shape, pad, config):
    uvw = torch.tensor([[c * pad[1] / shape[1], r * pad[0] / shape[0], 1] for r in range(shape[0]) for c in range(shape[1])],
                       dtype=torch.float64)
    return lift(matrix, uvw, config).flatten(1)


def query_parts(state, config, anchors, lidar2img, pad):
    """BEV part and camera part of the query embedding, [B, Q, C] each."""
    inside = logit(anchors).sigmoid()
    low, size = bounds(config)
    bev, camera = mlp(state, "bev_embedding", sine(inside, config["hidden_dim"])), None
    if lidar2img is not None:
        camera = torch.zeros_like(bev)
        for b, matrices in enumerate(lidar2img):
            for matrix in matrices:
                image, pixels = project(matrix, inside[b] * size + low)
                rays = mlp(state, "rv_embedding", lift(matrix, pixels, config).flatten(1))
                camera[b] += rays * in_view(image, pixels, pad)[:, None]
    return bev, camera


def attention(state, name, q, k, v, heads, mask=None):
    weight, bias = state[f"{name}.in_proj_weight"].chunk(3), state[f"{name}.in_proj_bias"].chunk(3)
    q, k, v = ((x @ w.T + b).unflatten(-1, (heads, -1)).transpose(1, 2) for x, w, b in zip((q, k, v), weight, bias))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(mask, -math.inf)
    out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return out @ state[f"{name}.out_proj.weight"].T + state[f"{name}.out_proj.bias"]


def branch(state, name, x, layers):
    """[L, B, Q, C] -> [L, B, Q, c] with one small network per layer."""
    w0, w3, out = state[f"{name}.0.weight"].chunk(layers), state[f"{name}.3.weight"].chunk(layers), []
    norm, shift, bias = (state[f"{name}.{k}"].chunk(layers) for k in ("1.weight", "1.bias", "3.bias"))
    for i in range(layers):
        y = F.conv1d(x[i].transpose(1, 2), w0[i], padding=w0[i].shape[2] // 2).transpose(1, 2)
        y = layer_norm(y, norm[i], shift[i], 1e-6).clamp(min=0)
        out.append(F.conv1d(y.transpose(1, 2), w3[i], bias[i], padding=w3[i].shape[2] // 2).transpose(1, 2))
    return torch.stack(out)


def head(state, config, pts, img, lidar2img, pad, anchors=None, mask=None):
    """Branches of all tasks [L, B, Q, c], and what is on the way."""
    state = {k: v.double() for k, v in state.items()}
    memory, pos, mid = [], [], {}
    if pts is not None:
        conv = F.conv2d(pts.double(), state["shared_conv.conv.weight"], padding=1)
        mean, var, w, b = (state[f"shared_conv.bn.{k}"][:, None, None] for k in ("running_mean", "running_var", "weight", "bias"))
        mid["shared_conv"] = ((conv - mean) / (var + 1e-5).sqrt() * w + b).clamp(min=0)
        memory.append(mid["shared_conv"].flatten(2).transpose(1, 2))
        coords = mlp(state, "bev_embedding",
                     sine(bev_coords(config["grid_size"], config["downsample_scale"]), config["hidden_dim"]))
        pos.append(coords.expand(len(pts), -1, -1))
    if img is not None:
        views, shape = lidar2img.shape[1], img.shape[-2:]
        memory.append(img.double().unflatten(0, (-1, views)).permute(0, 1, 3, 4, 2).flatten(1, 3))
        rays = [torch.cat([cell_rays(m, shape, pad, config) for m in ms]) for ms in lidar2img]
        pos.append(mlp(state, "rv_embedding", torch.stack(rays)))
    memory, pos = torch.cat(memory, 1), torch.cat(pos, 1)
    if anchors is None:
        anchors = state["reference_points.weight"].expand(len(memory), -1, -1)
    anchors = anchors.double()
    bev, camera = query_parts(state, config, anchors, lidar2img if img is not None else None, pad)
    query = mid["query_embed"] = bev if camera is None else bev + camera
    x, layers, heads, outputs = torch.zeros_like(query), config["num_decoder_layers"], config["num_heads"], []
    for i in range(layers):
        p = f"transformer.decoder.layers.{i}"
        norm = [(state[f"{p}.norms.{j}.weight"], state[f"{p}.norms.{j}.bias"]) for j in range(3)]
        x = layer_norm(x + attention(state, f"{p}.attentions.0.attn", x + query, x + query, x, heads, mask), *norm[0])
        x = layer_norm(x + attention(state, f"{p}.attentions.1.attn", x + query, memory + pos, memory, heads), *norm[1])
        hidden = (x @ state[f"{p}.ffns.0.layers.0.0.weight"].T + state[f"{p}.ffns.0.layers.0.0.bias"]).clamp(min=0)
        x = layer_norm(x + hidden @ state[f"{p}.ffns.0.layers.1.weight"].T + state[f"{p}.ffns.0.layers.1.bias"], *norm[2])
        outputs.append(layer_norm(x, state["transformer.decoder.post_norm.weight"], state["transformer.decoder.post_norm.bias"]))
    mid["decoder"] = torch.stack(outputs)
    low, size = bounds(config)
    tasks = []
    for t in range(1 + max(int(k.split(".")[1]) for k in state if k.startswith("task_heads."))):
        out = {name: branch(state, f"task_heads.{t}.{name}", mid["decoder"], layers) for name in (*SIZES, "cls_logits")}
        out["center"] = (out["center"] + logit(anchors)[..., :2]).sigmoid() * size[:2] + low[:2]
        out["height"] = (out["height"] + logit(anchors)[..., 2:]).sigmoid() * size[2:] + low[2:]
        tasks.append(out)
    return tasks, mid


def cameras(batch, views, pad, rng):
    """[B, V, 4, 4] of cameras that look around, each a little different."""
    out = np.zeros((batch, views, 4, 4))
    for b in range(batch):
        for v in range(views):
            yaw, focal = 2 * math.pi * (v + rng.uniform(-0.2, 0.2)) / views, pad[1] * rng.uniform(0.6, 0.9)
            forward, left = np.array([math.cos(yaw), math.sin(yaw), 0]), np.array([-math.sin(yaw), math.cos(yaw), 0])
            rotation = np.stack([-left, [0, 0, -1], forward])
            extrinsic = np.eye(4)
            extrinsic[:3] = np.c_[rotation, -rotation @ rng.uniform(-1, 1, 3)]
            intrinsic = np.eye(4)
            intrinsic[:2, :3] = [[focal, 0, pad[1] / 2], [0, focal, pad[0] / 2]]
            out[b, v] = intrinsic @ extrinsic
    return out


def random_state(module, generator):
    """Weights of moderate size, float32."""
    state = {}
    for name, value in module.state_dict().items():
        if not value.is_floating_point():
            state[name] = value
            continue
        noise = torch.rand(value.shape, generator=generator)
        fan = value[0].numel() if value.dim() > 1 else 1
        is_scale = name.endswith(("running_var",)) or (value.dim() == 1 and name.endswith("weight"))
        state[name] = noise if name == "reference_points.weight" else noise + 0.5 if is_scale else (noise - 0.5) * (3 / fan)**0.5
    return state


def objects(n, classes, config, rng):
    """Boxes with bottom centre inside the range, and labels."""
    low, size = (x.numpy() for x in bounds(config))
    centres = low + rng.uniform(0.1, 0.9, (n, 3)) * size
    boxes = np.c_[centres, rng.uniform(0.5, 5, (n, 3)), rng.uniform(-3, 3, n), rng.normal(size=(n, 2))]
    return boxes.astype(np.float32), rng.integers(0, classes, n)


def save(path, config=None, **groups):
    """Write an .npz file of arrays below prefixes; floats become float32 but for matrices of cameras."""
    arrays = {}
    for prefix, content in groups.items():
        for name, value in content.items():
            value = value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
            name = f"{prefix}/{name}"
            arrays[name] = value.astype(np.float32) if value.dtype.kind == "f" and "lidar2img" not in name else value
    np.savez(path, **arrays, **({} if config is None else dict(config_json=json.dumps(config))))


WEIGHTS = torch.tensor([2.0, 2, 1, 1, 1, 1, 1, 1, 0.2, 0.2], dtype=torch.float64)


def encode(boxes):
    """Boxes with gravity centre to codes."""
    b = boxes.double()
    columns = [b[:, 0], b[:, 1], b[:, 3].log(), b[:, 4].log(), b[:, 2], b[:, 5].log(), b[:, 6].sin(), b[:, 6].cos(), *b[:, 7:].T]
    return torch.stack(columns, 1)


def gravity(boxes):
    boxes = torch.as_tensor(boxes).double().clone()
    boxes[:, 2] += boxes[:, 5] / 2
    return boxes


def costs(logits, codes, labels, gt):
    """Class and box cost [Q, G]."""
    p = logits.double().sigmoid()[:, labels]
    cls = 2 * (-0.25 * (1 - p) ** 2 * (p + 1e-12).log() + 0.75 * p**2 * (1 - p + 1e-12).log())
    box = 0.25 * ((codes.double()[:, None, :8] - gt[None, :, :8]).abs() * WEIGHTS[:8]).sum(-1)
    return cls, box


def assign(cost):
    """[Q], 0 for background, k for object k - 1."""
    from scipy.optimize import linear_sum_assignment
    out = torch.zeros(len(cost), dtype=torch.long)
    rows, columns = linear_sum_assignment(cost.numpy())
    out[rows] = torch.from_numpy(columns) + 1
    return out


def focal(logits, labels):
    target = F.one_hot(labels, logits.shape[-1] + 1)[:, :-1].bool()
    p = logits.double().sigmoid()
    return torch.where(target, -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log()).sum()


def layer_losses(logits, codes, labels, gt):
    """Class loss, box loss and target labels [B, Q] of one layer; lists over the batch."""
    classes, cls, box, positives, targets = logits.shape[-1], 0.0, 0.0, 0, []
    for b in range(len(logits)):
        taken = assign(sum(costs(logits[b], codes[b], labels[b], gt[b])))
        target = torch.cat([torch.tensor([classes]), labels[b]])[taken]
        on = taken > 0
        cls = cls + focal(logits[b], target)
        box = box + ((codes[b].double()[on] - gt[b][taken[on] - 1]).abs() * WEIGHTS).sum()
        positives += int(on.sum())
        targets.append(target)
    queries = logits.shape[0] * logits.shape[1]
    cls = 2 * cls / max(1, positives + 0.1 * (queries - positives))
    return cls, 0.25 * box / positives if positives else torch.tensor(0.0), torch.stack(targets)


def denoising(boxes, labels, queries, classes, config, uniform):
    """Slots of a training step by loops: groups, anchors, mask, slot, sample, noised labels, raw labels, boxes."""
    low, size = bounds(config)
    single = max(len(b) for b in boxes)
    groups = min(10, queries // single)
    anchors, rows, e = torch.zeros(len(boxes), groups * single, 3, dtype=torch.float64), [], iter(uniform.double() * 2 - 1)
    for g in range(groups):
        for b in range(len(boxes)):
            for j, box in enumerate(boxes[b].double()):
                noise = next(e)
                anchors[b, g * single + j] = ((box[:3] + noise * box[3:6] / 2 - low) / size).clamp(0, 1)
                raw = int(labels[b][j])
                rows.append((g * single + j, b, classes if noise.norm() > 0.75 else raw, raw, box))
    pad, total = groups * single, groups * single + queries
    group = [i // single if i < pad else -1 for i in range(total)]
    mask = torch.tensor([[group[j] >= 0 and group[i] != group[j] for j in range(total)] for i in range(total)])
    slot, sample, noised, raw, known = zip(*rows)
    return groups, anchors, mask, *(torch.tensor(x) for x in (slot, sample, noised, raw)), torch.stack(known)
