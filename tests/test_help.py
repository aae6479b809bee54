"""Every option of every command line is explained, and the help shows no default that is not one."""
import argparse
import importlib
import re

import pytest

from conftest import ROOT

pytest.importorskip("mmdet3d", reason='needs the extra: pip install "cmtaqr[detector]"')

MODULES = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "cmtaqr").rglob("*.py")
                 if re.search(r"^import argparse", path.read_text(), re.M))


@pytest.fixture
def parser_of(monkeypatch):
    """The parser that a module's `main` builds."""
    def stop(self, *args, **kwargs):
        raise StopIteration(self)

    def build(module):
        for name in ("parse_args", "parse_intermixed_args"):
            monkeypatch.setattr(argparse.ArgumentParser, name, stop)
        with pytest.raises(StopIteration) as found:
            importlib.import_module(module).main([])
        return found.value.args[0]
    return build


def parsers(parser):
    """A parser and those of its commands."""
    commands = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return [parser, *(p for action in commands for p in action.choices.values())]


@pytest.mark.parametrize("module", MODULES)
def test_every_option_is_explained(module, parser_of):
    for parser in parsers(parser_of(module)):
        assert parser.description, parser.prog
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                continue
            assert (action.help or "").strip(), f"{parser.prog}: {action.dest} is not explained"
            shown = parser._get_formatter()._expand_help(action)
            false = action.nargs == 0 and "(default: True)" in shown
            assert not false, f"{parser.prog}: {action.option_strings} is off by default"


def test_parameters_may_be_left_out(capsys):
    from cmtaqr.engine.train import main
    with pytest.raises(SystemExit):
        main([])
    assert "required: config\n" in capsys.readouterr().err
