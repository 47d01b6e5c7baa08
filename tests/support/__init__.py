"""What the tests share: tiny models, prompts, the hand reference, and lists of methods from the registry."""
