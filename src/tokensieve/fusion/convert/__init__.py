"""The authors' ViLT and METER checkpoints, in ours: ``read.py`` finds the weights, ``names.py`` renames them, and
``build.py`` makes the model and checks that every weight has its place."""

from tokensieve.fusion.convert.build import build, convert

__all__ = ["build", "convert"]
