#!/usr/bin/env python3
"""Check that the package equals its notebooks, that the notebooks are clean and that README.md equals nbs/index.ipynb."""
import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
NOT_SOURCES = {".venv", ".git", "data", "outputs", "build", "dist", "cmtaqr.egg-info"}


def readme_text():
    """Return README.md as made from nbs/index.ipynb: links that start in nbs/ are rewritten to start at the root."""
    from nbconvert import MarkdownExporter

    text, _ = MarkdownExporter().from_filename(str(ROOT / "nbs" / "index.ipynb"))
    text = re.sub(r"\]\((?!https?:|#|\.\./)([^)]+)\)", r"](nbs/\1)", text).replace("](../", "](")
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def snapshot(folder, pattern):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob(pattern) if ".ipynb_checkpoints" not in path.parts}


def changed_by(command, folder, pattern):
    """Run a command in a copy of the repository and return the files of `folder` that it would change."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / ROOT.name
        shutil.copytree(ROOT, copy, ignore=lambda folder, names: NOT_SOURCES & set(names) if Path(folder) == ROOT else {"__pycache__"})
        subprocess.run(["git", "init", "-q", str(copy)], check=True)
        done = subprocess.run([str(BIN / command)], cwd=copy, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{command} failed:\n{done.stderr[-2000:]}")
        before, after = snapshot(ROOT / folder, pattern), snapshot(copy / folder, pattern)
    return sorted(str(Path(folder) / name) for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write-readme", action="store_true", help="write README.md instead of checking it")
    options = parser.parse_args()
    if options.write_readme:
        (ROOT / "README.md").write_text(readme_text(), encoding="utf-8")
    problems = []
    if differing := changed_by("nbdev_export", "cmtaqr", "*.py"):
        problems.append(f"the package differs from its notebooks ({', '.join(differing)}): run `make export` and commit")
    if unclean := changed_by("nbdev_clean", "nbs", "*.ipynb"):
        problems.append(f"notebooks with outputs or stray metadata ({', '.join(unclean)}): run `make export` and commit")
    if (ROOT / "README.md").read_text(encoding="utf-8") != readme_text():
        problems.append("README.md differs from nbs/index.ipynb: run `make export` and commit")
    if problems:
        sys.exit("\n".join(problems))
    print("the package equals its notebooks, the notebooks are clean, README.md equals nbs/index.ipynb")


if __name__ == "__main__":
    main()
