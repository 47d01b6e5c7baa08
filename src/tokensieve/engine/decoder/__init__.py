"""The decoder stage: visual tokens leave between two layers of the LLM.

``hooks.py`` shortens the inputs of each layer. ``evidence.py`` reads what methods request, ``sequence.py`` follows the
columns of the prompt, and ``masks.py`` makes the attention masks.
"""
