"""What the project says about itself in more than one place, and what its pages point to."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import diffkern
from tests.conftest import ROOT

PAGES = sorted((ROOT / "docs").glob("**/*.md"))
TEXTS = [*sorted(ROOT.glob("*.md")), *PAGES]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def pins(text: str) -> dict[str, set[str]]:
    """Every `name==version` of a text."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"\"([\w-]+)==([\w.]+)\"", text):
        found.setdefault(name, set()).add(version)
    return found


def test_the_citation_is_of_this_version():
    assert re.findall(r"^version: (.+)$", read("CITATION.cff"), re.MULTILINE) == [diffkern.__version__]


def test_the_changelog_has_this_version():
    assert f"\n## [{diffkern.__version__}]" in read("CHANGELOG.md")


def test_the_hooks_run_the_pinned_tools():
    """Two versions of a formatter undo each other's work."""
    extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    hooks = pins(read(".pre-commit-config.yaml"))
    assert set(hooks) == {"ruff", "clang-format"}
    for name, versions in hooks.items():
        (version,) = versions
        assert f"{name}=={version}" in extras["dev"]


def test_wheels_are_built_for_every_supported_python():
    project = tomllib.loads(read("pyproject.toml"))
    versions = re.findall(r"Python :: 3\.(\d+)", " ".join(project["project"]["classifiers"]))
    assert project["tool"]["cibuildwheel"]["build"] == f"cp3{{{','.join(versions)}}}-manylinux_x86_64"


def test_every_page_is_in_the_navigation():
    navigation = re.findall(r"[\w/-]+\.md", read("mkdocs.yml"))
    for page in PAGES:
        assert navigation.count(page.relative_to(ROOT / "docs").as_posix()) == 1, page.name


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    """Relative links, and files of the repository that are named in backticks."""
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:|#", link):
            assert (page.parent / link.split("#")[0]).exists(), f"{page.name} links to {link}"
    for name in re.findall(r"`((?:benchmarks|csrc|diffkern|docs|tests)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), f"{page.name} names {name}"
