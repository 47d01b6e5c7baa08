"""Shared by the tests: tiny models, prompts, the hand reference, and lists of methods from the registry."""
