#!/usr/bin/env python3
"""Create .venv and install CMT-AQR with everything it needs, one resumable step at a time.

Each step that succeeds leaves a stamp in the environment, named after its content, so a second run skips
what is done and a changed requirement reruns what depends on it. Standard library only: this runs
before anything is installed.
"""
import argparse
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# --here installs into the environment that runs this script (conda); otherwise into .venv beside the sources.
HERE = "--here" in sys.argv
PREFIX = Path(sys.prefix) if HERE else ROOT / ".venv"
PYTHON = PREFIX / "bin" / "python"
LOCK = ROOT / "requirements.lock"
STAMPS = PREFIX / "cmtaqr-stamps"
LOG = PREFIX / "cmtaqr-install.log"
PIP = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "-c", str(LOCK)]
# mmdet3d names open3d, black and a matplotlib that no longer builds; nothing here imports them.
NO_DEPS = ["mmdet3d", "lyft-dataset-sdk"]
TRITON = "triton==3.6.0"


class StepFailed(Exception):
    """A step failed; the message says what to do about it."""


def pinned(name):
    """Return `name==version` from the lock file."""
    found = re.search(rf"^{re.escape(name)}==(\S+)$", LOCK.read_text(), re.M | re.I)
    if not found:
        raise StepFailed(f"{name} is not pinned in {LOCK.name}: add a line `{name}==VERSION`.")
    return f"{name}=={found[1]}"


def requirements(*sections):
    """Return the requirement strings that settings.ini lists under the given keys."""
    from configparser import ConfigParser

    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    return [item for key in sections for item in config["DEFAULT"][key].split()]


def has_gpu():
    """True where the NVIDIA driver lists a GPU."""
    return bool(shutil.which("nvidia-smi")) and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0


def has_cuda():
    """True where there is a GPU and a CUDA compiler, so that CUDA extensions can be built."""
    return bool(shutil.which("nvcc")) and has_gpu()


def imports(code):
    """Run an import in the environment; return its error text, empty where it works."""
    done = subprocess.run([str(PYTHON), "-c", code], cwd=ROOT, capture_output=True, text=True)
    return done.stderr[-1500:] if done.returncode else ""


def stream(command, env=None):
    """Run a command, append its output to the log, and show ninja's and pip's progress on one line."""
    started, last = time.time(), ""
    with LOG.open("a") as log:
        log.write(f"\n$ {' '.join(command)}\n")
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **(env or {})}, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace")
        for line in process.stdout:
            log.write(line)
            step = re.search(r"\[(\d+)/(\d+)\]", line)
            collected = re.match(r"\s*(Collecting|Downloading|Building|Installing) (\S+)", line)
            note = f"compiled {step[1]} of {step[2]} files" if step else " ".join(collected.groups()) if collected else last
            if note != last:
                last = note
                clock = f"{time.time() - started:4.0f} s"
                if sys.stdout.isatty():
                    print(f"\r    {clock}  {note[:90]:<90}", end="", flush=True)
                elif step and int(step[1]) % 10 == 0:
                    print(f"    {clock}  {note}", flush=True)
        code = process.wait()
    if sys.stdout.isatty() and last:
        print()
    if code:
        tail = "\n".join(LOG.read_text(errors="replace").splitlines()[-25:])
        raise StepFailed(f"`{' '.join(command[:6])} ...` ended with status {code}. Last lines of {LOG}:\n{tail}")


def create_environment():
    if sys.version_info[:2] not in {(3, 10), (3, 11), (3, 12)}:
        raise StepFailed(f"Python {sys.version.split()[0]} has no wheels for every dependency. Use Python 3.11 (tested), for "
                         "example `make PYTHON=python3.11 demo`, or `conda env create -f environment.yml`.")
    if importlib.util.find_spec("ensurepip") is None:
        raise StepFailed("This Python cannot create environments. On Debian or Ubuntu: apt-get install python3-venv python3-dev.")
    free = shutil.disk_usage(ROOT).free / 2**30
    if free < 6:
        raise StepFailed(f"{free:.1f} GiB are free here; the environment needs about 6 GiB. Free some space and rerun.")
    if not HERE and not PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", str(PREFIX)], check=True)


def install_torch():
    stream(PIP + [pinned(name) for name in ("torch", "numpy", "setuptools", "wheel", "ninja", "psutil")])
    # torch's CUDA builds bring the Triton they need; its CPU builds bring none, and tests run the kernels in Triton's interpreter
    if imports("import triton"):
        stream(PIP + [TRITON])


def build_mmcv():
    if not shutil.which("g++"):
        raise StepFailed("mmcv's operators are compiled and no g++ was found. On Debian or Ubuntu: apt-get install g++ python3-dev.")
    env = {"MMCV_WITH_OPS": "1", "CFLAGS": "-g0", "CXXFLAGS": "-g0", "MAX_JOBS": str(os.cpu_count()),
           "PATH": f"{PREFIX / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    if has_cuda():
        env["FORCE_CUDA"] = "1"
    try:
        stream(PIP + ["-v", "--no-build-isolation", pinned("mmcv")], env)
    except StepFailed:
        if "FORCE_CUDA" not in env:
            raise
        print("    the CUDA operators did not build; building the CPU operators (CMT-AQR itself needs no CUDA operator of mmcv)")
        stream(PIP + ["-v", "--no-build-isolation", pinned("mmcv")], {**env, "FORCE_CUDA": "0", "CUDA_VISIBLE_DEVICES": ""})


def install_sparse_convolution():
    candidates = ["spconv-cu126==2.3.8", "spconv-triton==1.0.0"] if has_gpu() else [pinned("spconv")]
    for candidate in candidates:
        module = "spconv_triton" if "triton" in candidate else "spconv.pytorch"
        try:
            stream(PIP + [candidate])
            reason = imports(f"import {module}")
        except StepFailed as error:
            reason = str(error)
        if not reason:
            return
        print(f"    {candidate} cannot be used here: {reason.strip().splitlines()[-1]}")
    raise StepFailed(f"No sparse convolution could be installed; tried {', '.join(candidates)}. See {LOG}.")


def install_packages():
    stream(PIP + requirements("requirements", "detector_requirements", "dev_requirements"))
    stream(PIP + ["--no-deps"] + [pinned(name) for name in NO_DEPS])


def install_flash_attention():
    if has_cuda():
        try:
            stream(PIP + ["--no-build-isolation", "flash-attn"], {"MAX_JOBS": str(os.cpu_count())})
        except StepFailed:
            print("    flash-attn did not install; it is optional and the other attention backends are used")


def install_project():
    stream(PIP + ["--no-deps", "--no-build-isolation", "-e", str(ROOT)])
    check = "import cv2, torch, mmcv.ops, mmdet3d, cmtaqr"
    if imports(check):
        # opencv-python needs libGL; the headless build of the same version does not.
        stream(PIP + ["--no-deps", "--force-reinstall", pinned("opencv-python-headless")])
    if error := imports(check):
        raise StepFailed(f"The installed packages do not import:\n{error}\nDelete {PREFIX} and rerun; if it persists, report this.")
    stream([str(PYTHON), "-m", "ipykernel", "install", "--sys-prefix", "--name", "python3", "--display-name", "python3"])


STEPS = [("virtual environment", create_environment, ""),
         ("torch, Triton and build tools", install_torch, "lock"),
         ("mmcv with its operators (5 to 10 minutes the first time, then from pip's cache)", build_mmcv, "lock"),
         ("sparse convolution", install_sparse_convolution, "lock"),
         ("packages", install_packages, "lock settings"),
         ("flash-attn (GPU machines only)", install_flash_attention, ""),
         ("cmtaqr itself", install_project, "lock settings setup")]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--here", action="store_true", help="install into this Python's environment instead of .venv")
    parser.add_argument("--force", action="store_true", help="run every step again")
    options = parser.parse_args()
    files = {"lock": LOCK, "settings": ROOT / "settings.ini", "setup": ROOT / "setup.py"}
    for number, (name, step, inputs) in enumerate(STEPS, 1):
        content = name + step.__name__ + "".join(files[key].read_text() for key in inputs.split())
        stamp = STAMPS / f"{step.__name__}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
        if stamp.exists() and not options.force:
            continue
        print(f"[{number}/{len(STEPS)}] {name}", flush=True)
        try:
            step()
        except (StepFailed, OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"\nSet-up stopped at step {number} ({name}).\n{error}\nWhat was done is kept: rerun the same command to go on.")
        STAMPS.mkdir(parents=True, exist_ok=True)
        stamp.touch()
    print(f"environment ready: {PREFIX}", flush=True)


if __name__ == "__main__":
    main()
