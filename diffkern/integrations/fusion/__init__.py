"""`fuse` puts the kernels into a model of somebody else's, in place; `unfuse` takes them out again."""

from diffkern.integrations.fusion.api import fuse, unfuse
from diffkern.integrations.fusion.report import FuseReport, Replaced, Skipped

__all__ = ["FuseReport", "Replaced", "Skipped", "fuse", "unfuse"]
