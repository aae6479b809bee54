"""Shared fixtures: reference material that lies beside the repository on some machines, and skips that say why."""
import os
import signal
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# For the processes that tests start: the package, where it is not installed, and modules of the tests.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
# A shell's background jobs ignore Ctrl-C, and so would the processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared():
    """Folder with the golden files and the real nuScenes frame; the test skips where it is absent."""
    folder = Path(os.environ.get("CMTAQR_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"reference material not found at {folder}: set CMTAQR_SHARED to its folder to run this test")
    return folder


@pytest.fixture
def cuda():
    """A CUDA device; the test skips on a machine without one."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: run `make test-gpu` on a machine that has one")
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def mmdet3d_scope():
    """Look names up in mmdet3d's registries, whatever scope a run of an earlier test has left."""
    try:
        from mmengine.registry import init_default_scope
    except ImportError:
        return
    init_default_scope("mmdet3d")


@pytest.fixture
def one_thread():
    """As many threads as the processes that a test starts: sums are added up in another order with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
