"""Convert the authors' ViLT and METER checkpoints: ``read.py`` reads the weights, ``names.py`` renames them, and
``build.py`` builds the model and checks that each weight fits."""

from tokensieve.fusion.convert.build import build, convert

__all__ = ["build", "convert"]
