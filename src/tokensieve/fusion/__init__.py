"""Cross-modal encoders with reducers inside: ViLT (one stream), METER and BridgeTower (two streams with co-attention).

``host.py`` is what they share, ``vilt.py`` and ``co_attention.py`` say where each is hooked, ``progress.py`` follows a
pass. ``meter`` is a METER for transformers; ``convert`` reads the authors' checkpoints.
"""

from tokensieve.fusion.host import Host, host_of
from tokensieve.fusion.progress import Pass

__all__ = ["Host", "Pass", "host_of"]
