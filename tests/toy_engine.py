"""A linear model and points for it, with the interface that the engine needs: what `test_engine.py` trains in seconds."""
import torch
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS
from torch import nn

from cmtaqr.bias import AttentionBiasGenerator


@MODELS.register_module(force=True)
class ToyDetector(BaseModel):
    """y = 3x by a line times the bias generator's scale."""

    def __init__(self, aqr=None, fail_at=None):
        super().__init__()
        self.line, self.calls, self.fail_at = nn.Linear(1, 1), 0, fail_at
        bias = {k: v for k, v in aqr["bias"].items() if k != "type"} if aqr else None
        self.aqr_bias = AttentionBiasGenerator(**bias) if aqr else None

    def forward(self, inputs, mode="tensor"):
        x = torch.stack(list(inputs))
        y = self.line(x) * (self.aqr_bias.scale() if self.aqr_bias is not None else 1.0)
        self.calls += 1
        loss = (y - 3 * x).square().mean() * (float("nan") if self.calls == self.fail_at else 1.0)
        return dict(loss_fit=loss) if mode == "loss" else y


@DATASETS.register_module(force=True)
class ToyPoints(torch.utils.data.Dataset):
    """Sixteen points."""

    metainfo = dict(classes=("point",))

    def __init__(self, data_root=None, ann_file=None):
        self.x = torch.linspace(0.1, 1.0, 16).reshape(16, 1)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return dict(inputs=self.x[i])


CONFIG = """
_base_ = [r"{bases}/runtime.py", r"{bases}/schedule.py"]
default_scope = "mmengine"
custom_imports = dict(imports=["cmtaqr.engine", "toy_engine"], allow_failed_imports=False)
data_root = "data/toy"
bias = dict(type="AttentionBiasGenerator", preset="conservative")
model = dict(type="ToyDetector", aqr=dict(router=dict(type="none"), bias=bias))
train_dataloader = dict(batch_size=4, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=True),
                        dataset=dict(type="ToyPoints", data_root=data_root, ann_file="train.pkl"))
val_cfg = None
test_cfg = None
optim_wrapper = dict(optimizer=dict(lr=0.01))
"""
