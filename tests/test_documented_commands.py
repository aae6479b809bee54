"""Commands shown in the notebooks can be pasted: every line begins one, and papermill finds the folder that it writes to."""
import json
import re
import shlex
from pathlib import Path

import pytest

from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))


def blocks(path):
    """Code blocks of a notebook's text that hold shell commands."""
    cells = json.loads(path.read_text())["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    found = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    return [block for block in found if re.search(r"^(papermill|python -m) ", block, re.M)]


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if blocks(path)], ids=lambda path: path.stem)
def test_commands_can_be_pasted(path):
    for block in blocks(path):
        made = {"outputs"}
        for line in block.replace("\\\n", " ").splitlines():
            program, *words = shlex.split(line, comments=True)
            assert program in ("papermill", "python", "mkdir"), f"{line!r} begins no command"
            if program == "mkdir":
                made.update(words)
            if program == "papermill":
                assert str(Path(words[1]).parent) in made, f"papermill does not make the folder of {words[1]}"
