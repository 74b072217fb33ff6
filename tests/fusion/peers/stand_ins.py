"""The stand-ins under the names by which users import the originals."""

from __future__ import annotations

import importlib.util
import sys
import types

from tests.fusion.peers import edm, edm_preconditioners, guided_diffusion, guided_encoder, improved_diffusion

MODULES = {
    "guided_diffusion.unet": (guided_diffusion, guided_encoder),
    "improved_diffusion.unet": (improved_diffusion,),
    "training.networks": (edm, edm_preconditioners),
}


def make_importable(monkeypatch):
    """Until the test is over, the originals' modules can be imported; where they are installed, these are."""
    for name, sources in MODULES.items():
        package = name.partition(".")[0]
        if importlib.util.find_spec(package) is not None:
            continue
        module = types.ModuleType(name)
        for source in sources:
            defined = {key: value for key, value in vars(source).items() if isinstance(value, type)}
            vars(module).update({key: value for key, value in defined.items() if not key.startswith("_")})
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        monkeypatch.setitem(sys.modules, name, module)
