"""The documentation's examples run, and its signatures are those of the code."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch

from diffkern import ops
from tests.conftest import ROOT
from tests.fusion.peers import k_diffusion, lucidrains, stand_ins

DOCS = ROOT / "docs"
# Of what an example may import, what is installed here without some of its own dependencies.
PEERS = {
    "denoising_diffusion_pytorch": lucidrains.denoising_diffusion_pytorch,
    "k_diffusion": k_diffusion.image_v1,
}
PUBLIC_OPS = sorted(name for name in dir(ops) if inspect.isfunction(getattr(ops, name)))


def examples() -> list[tuple[str, str]]:
    """(page and line, code) of every Python block of the documentation."""
    found = []
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for block in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            line = text.count("\n", 0, block.start()) + 1
            found.append((f"{page.name}:{line}", block[1]))
    return found


def section(name: str) -> str:
    """What docs/ops.md says under the heading `name`."""
    text = (DOCS / "ops.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found, f"docs/ops.md has no section {name}"
    return found[1]


@pytest.mark.parametrize(("place", "code"), examples(), ids=[place for place, _ in examples()])
def test_example(place, code, monkeypatch):
    for package, imported in PEERS.items():
        if package in code:
            imported()
    stand_ins.make_importable(monkeypatch)
    torch.manual_seed(0)
    exec(compile(code, place, "exec"), {"__name__": Path(place).stem})


@pytest.mark.parametrize("name", PUBLIC_OPS)
def test_every_public_op_is_explained(name):
    """Under a heading of its own, with its true signature and an example that calls it."""
    text = section(name)
    written = re.search(rf"^    {name}\(.*?\)$", text, re.DOTALL | re.MULTILINE)
    assert written, f"docs/ops.md gives no signature of {name}"
    parsed = ast.parse(f"def {written[0].strip()}: ...").body[0]
    assert isinstance(parsed, ast.FunctionDef)
    exec(compile(ast.Module([parsed], []), "docs/ops.md", "exec"), namespace := {"torch": torch})
    told, true = (inspect.signature(f).parameters.values() for f in (namespace[name], getattr(ops, name)))
    assert [(p.name, p.kind, p.default) for p in told] == [(p.name, p.kind, p.default) for p in true]
    assert f"{name}(" in text.split("```python\n")[1].split("```")[0]
