"""The only package that hooks a live model.

One fact explains its shape: ``generate()`` encodes all images before the first forward, and requires the usual
number of features. Tokens can therefore not be dropped where the evidence about them is read. The stages hand over:

1. ``encoder``: records each encode call. The record (``handoff.EncoderOutputs``) travels on the call's output.
2. ``connector``: at the first forward, decides from that record and shortens every argument (``handoff.Prefill``).
3. ``decoder``: drops further tokens between the layers of the LLM.
4. ``cache.py``: keeps the bookkeeping that decode steps need on the KV cache.

``fusion`` is the stage of cross-modal encoders, which have no LLM. No stage imports another. ``api.py`` is ``attach``,
``handle.py`` its handle, ``llm.py`` runs stages 1 to 4 in step, and ``inflight.py`` is the state of the running call.
"""

from tokensieve.engine.api import attach
from tokensieve.engine.handle import Sieve

__all__ = ["Sieve", "attach"]
