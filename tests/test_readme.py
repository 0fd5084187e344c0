"""Every command in the README runs, in its order, in a fresh clone; what it prints is what the README shows."""

import re

import pytest
from conftest import ROOT

pytestmark = pytest.mark.xdist_group("demo")

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_every_command_of_the_readme_runs(demo):
    ran = []
    for language, text in BLOCKS:
        if language != "sh":
            continue
        for command in text.strip().splitlines():
            if command not in ("make prepare score train", "make test"):  # the fixture's; and the one that runs this
                demo.run(command)
            ran.append(command)
    assert ran[:2] == ["make prepare score train", "make test"] and len(ran) >= 8


def test_what_the_readme_shows_of_sql_is_what_it_prints(demo):
    shown = [text for language, text in BLOCKS if language == "console"]
    assert shown
    for text in shown:
        command, _, expected = text.partition("\n")
        assert words(demo.run(command.removeprefix("$ ")).stdout) == words(expected)


def words(text: str) -> list[object]:
    """Words as they stand; fractions within 0.1, for they come from training, and processors round differently."""
    return [pytest.approx(float(word), abs=0.1) if re.fullmatch(r"\d\.\d+", word) else word for word in text.split()]


def test_the_test_command_of_the_readme_is_what_ci_runs():
    assert "\nmake test\n" in (ROOT / ".ci/run").read_text()


def test_every_file_that_the_readme_links_to_exists():
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links and all((ROOT / link).exists() for link in links)


def test_the_loss_in_the_readme_is_the_one_in_the_registry():
    (code,) = [text for language, text in BLOCKS if language == "python"]
    source = (ROOT / "pipeline/losses.py").read_text(encoding="utf-8")
    without_docstring = re.sub(r'    """.*?"""\n', "", source, flags=re.DOTALL)
    assert code.strip() in without_docstring
