"""The fusion stage: methods act on text and image together, inside a cross-modal encoder.

``host.py`` holds what the hooks of all such encoders share. ``vilt.py`` and ``co_attention.py`` hook one kind each.
``passes.py`` follows one forward pass. ``families.py`` lists the encoders. ``handle.py`` is what ``attach`` returns.
"""
