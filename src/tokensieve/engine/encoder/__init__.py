"""The encoder stage: evidence is read in the vision encoder, and encoder methods drop, merge or resize in it.

``hooks.py`` records each encode call. ``before.py`` changes the encoder's inputs. ``tower.py`` shortens the rows
between layers. ``steps.py`` keeps the books of that.
"""
