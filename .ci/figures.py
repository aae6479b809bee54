#!/usr/bin/env python3
"""Redraw the README's figures: the demo's from outputs/demo, the real frame's from nbs/results."""
import json
import shutil
from pathlib import Path

import cv2

from cmtaqr.engine.overfit import plot_overfit

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "nbs" / "figures"


def overfit():
    result = json.loads((ROOT / "nbs/results/overfit_real_frame.json").read_text())
    plot_overfit(result).savefig(FIGURES / "overfit.png", dpi=80)


def demo():
    """The demo's drawings, small enough to be kept."""
    source = ROOT / "outputs/demo/eval/figures"
    for name in ("bev", "cameras"):
        image = cv2.imread(str(source / f"{name}.png"))
        if image is None:
            raise SystemExit(f"{source / name}.png is missing: run `make demo` first")
        width = 700 if name == "bev" else 1100
        image = cv2.resize(image, (width, round(image.shape[0] * width / image.shape[1])), interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(FIGURES / f"demo_{name}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 85])
    shutil.copy(ROOT / "outputs/demo/result.json", ROOT / "nbs/results/demo.json")


if __name__ == "__main__":
    FIGURES.mkdir(exist_ok=True)
    overfit()
    demo()
