"""Positions in the prompt: the placeholders of its images, and the words of the user."""
