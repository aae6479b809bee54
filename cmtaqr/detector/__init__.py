"""CMT with AQR as mmengine-registered modules; importing this package registers all of them."""

try:
    from mmdet3d.registry import MODELS
except ImportError as error:
    raise ImportError('cmtaqr.detector needs mmdet3d and what it builds on: pip install "cmtaqr[detector]"') from error

from cmtaqr.detector import sparse  # before mmdet3d's own modules, which take the sparse library that they find

# isort: split
from cmtaqr.bias import AttentionBiasGenerator
from cmtaqr.detector import branches, decoder, detector, head, image, vovnet  # noqa: F401
from cmtaqr.modulation import FeatureModulator, WeightRenderer
from cmtaqr.router import AQRWeightGenerator

for _module in (AQRWeightGenerator, AttentionBiasGenerator, WeightRenderer, FeatureModulator, sparse.LidarVoxelizer):
    MODELS.register_module(module=_module, force=True)
