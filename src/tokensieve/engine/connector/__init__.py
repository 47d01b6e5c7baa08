"""The connector stage: visual tokens are chosen or merged between vision encoder and LLM.

``prefill.py`` is the way through. ``images.py`` lists the images of the prompt, ``decide.py`` calls the method, and
``shorten.py`` shortens the arguments of the forward.
"""
