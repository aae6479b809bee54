"""Training and evaluation: importing registers the hooks with mmengine."""
try:
    import mmengine  # noqa: F401
except ImportError as error:
    raise ImportError('cmtaqr.engine needs mmengine: pip install "cmtaqr[detector]"') from error

from cmtaqr.engine.fade import PasteFadeHook
from cmtaqr.engine.faults import FaultHook, GuardedWrapper
from cmtaqr.engine.frozen import FreezeHook
from cmtaqr.engine.groups import GroupedOptimWrapperConstructor
from cmtaqr.engine.hooks import HistoryHook, ProgressHook, ScaleHook
from cmtaqr.engine.instruments import InstrumentsHook
from cmtaqr.engine.samples import EpochLoop, IterationLoop, PlacedSampler, SteadySamples
from cmtaqr.engine.state import SafeCheckpointHook, StateHook

__all__ = ["EpochLoop", "FaultHook", "FreezeHook", "GroupedOptimWrapperConstructor", "GuardedWrapper", "HistoryHook", "InstrumentsHook",
           "IterationLoop", "PasteFadeHook", "PlacedSampler", "ProgressHook", "SafeCheckpointHook", "ScaleHook", "StateHook", "SteadySamples"]
