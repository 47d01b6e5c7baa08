"""The only place that hooks a live model.

A token's way: ``encoder.py`` (the tower, probed by ``probe.py``; ``tower.py``: decisions inside it) → ``connector.py``
(the decision, and the shortened inputs of the top-level forward) → ``decoder.py`` (decisions inside the LLM;
``stream.py``: the sequence there, ``decoder_evidence.py``: what methods see of it) → ``cache.py`` (what later steps
must know). ``sieve.py`` installs and removes.
"""

from tokensieve.attach.sieve import Sieve, attach

__all__ = ["Sieve", "attach"]
