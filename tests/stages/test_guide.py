"""README and guide: short, with links that lead somewhere, code that is in the source, and commands that have the options shown."""

import contextlib
import os
import pty
import re
import shlex
import subprocess

import click
import pytest

from prefcache.cli import main
from prefcache.guide import CHAPTERS, chapter, render, summaries
from prefcache.pipeline import config_file
from prefcache.pipeline.foreign_programs import recognise
from prefcache.pipeline.training.foreign_configs import convert
from tests.helpers.documents import DOCUMENTS, EXCERPTS, README, blocks, commands
from tests.helpers.project import PREFCACHE, ROOT


def test_the_readme_has_at_most_150_lines():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.stem)
def test_every_file_that_is_linked_to_exists(file):
    links = re.findall(r"\]\(([^)]+)\)", file.read_text(encoding="utf-8"))
    assert [link for link in links if not (file.parent / link).exists()] == []


def test_the_readme_links_to_every_chapter():
    links = set(re.findall(r"\]\(stages/guide/([\w-]+)\.md\)", README.read_text(encoding="utf-8")))
    assert links == set(CHAPTERS) == {file.stem for file in (ROOT / "stages/guide").glob("*.md")}


def test_the_test_command_of_the_readme_is_what_ci_runs():
    assert "make prepare score train\nmake test\n" in blocks("sh", README)
    assert "\nmake test\n" in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize("text", blocks("yaml"), ids=lambda text: text.splitlines()[0].lstrip("# "))
def test_the_configs_shown_are_configs(tmp_path, text):
    """Those of other trainers become configs."""
    named = "" if "model" in text else "model: m\nout: o\n"
    (tmp_path / "config.yaml").write_text(named + text)
    tree = config_file.read_yaml(tmp_path / "config.yaml")
    if (program := recognise(tree)) is not None:
        converted = convert(program, tree, tmp_path / "config.yaml")
        converted.check()
        assert not converted.unknown_keys
    else:
        assert config_file.load(tmp_path / "config.yaml").prepare.data


def test_the_first_config_shown_is_trls():
    assert blocks("yaml", README)[0].startswith("# dpo.yaml\nmodel_name_or_path:")


@pytest.mark.parametrize("code", blocks("python", *EXCERPTS), ids=lambda code: re.search(r"def (\w+)", code)[1])
def test_the_code_shown_is_in_the_source(code):
    docstring = re.compile(r'    """.*?"""\n', re.DOTALL)
    sources = [file.read_text(encoding="utf-8") for file in sorted((ROOT / "pipeline").rglob("*.py"))]
    sources = [docstring.sub("", source) for source in sources]
    pieces = docstring.sub("", code).strip().split("\n\n\n")
    assert any(all(piece in source for piece in pieces) for source in sources)


# -- commands --------------------------------------------------------------------------------------------------------


def examples_in_help() -> list[str]:
    """The indented examples of every command's help."""
    return [
        line.strip()
        for command in main.commands.values()
        for line in (command.help or "").splitlines()
        if line.startswith("    prefcache ")
    ]


def in_documents() -> list[str]:
    return [command for block in blocks("sh") for command in commands(block) if command.startswith("prefcache ")]


@pytest.mark.parametrize("command", dict.fromkeys([*in_documents(), *examples_in_help()]))
def test_a_command_shown_has_the_options_and_settings_that_it_is_shown_with(command):
    for each in re.split(r" && (?=prefcache)", command):
        _, name, *arguments = shlex.split(each.partition(" > ")[0])
        context = main.commands[name].make_context(name, arguments, parent=click.Context(main))
        if settings := context.params.get("overrides"):
            config_file.load(None, ["model=m", "out=o", "prepare.data=d", *settings])


@pytest.mark.parametrize("name", main.commands)
def test_help_begins_with_a_verb_phrase_and_shows_an_example(name):
    first, *rest = main.commands[name].help.splitlines()
    assert first.endswith(".") and re.match(r"[A-Z][a-z]+ ", first)
    assert any(line.strip().startswith(f"prefcache {name}") for line in rest)


# -- prefcache guide -------------------------------------------------------------------------------------------------


def test_without_a_topic_each_chapter_has_its_line(prefcache):
    text = " ".join(prefcache("guide").stdout.split())
    assert all(f"{name} {summary}" in text for name, summary in summaries().items())
    assert all("\n" not in summary and len(summary) < 100 for summary in summaries().values())


def test_a_chapter_that_is_redirected_is_its_markdown(prefcache):
    assert prefcache("guide", "trust").stdout == (ROOT / "stages/guide/trust.md").read_text(encoding="utf-8")
    assert prefcache("guide", "many", "machines").stdout == chapter("many-machines")


def test_a_misspelt_topic_gets_the_nearest(prefcache):
    assert "There is no chapter 'loses'. The nearest is losses." in prefcache("guide", "loses", code=2).stderr


@pytest.mark.parametrize("name", CHAPTERS)
def test_in_a_terminal_a_chapter_fits_its_width_and_shows_no_markup(name):
    text = render(chapter(name), 80, color=False)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "```" not in text and "](" not in text and "\n#" not in text


def test_commands_shown_in_a_chapter_fit_a_terminal_of_80_columns():
    lines = [line for file in CHAPTERS.values() for block in blocks("sh", file) for line in block.splitlines()]
    assert [line for line in lines if len(line) > 78] == []


def test_in_a_terminal_a_long_chapter_goes_through_the_pager():
    ours, its = pty.openpty()
    command = [PREFCACHE, "guide", "trust"]
    environment = os.environ | {"PAGER": "sed s/Trust/paged/", "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    shown = b""
    with subprocess.Popen(command, stdin=its, stdout=its, env=environment) as process:
        os.close(its)
        with contextlib.suppress(OSError):  # the other end is closed
            while part := os.read(ours, 1 << 16):
                shown += part
    os.close(ours)
    assert process.returncode == 0 and b"paged: why the cached values" in shown
