"""The page of ``tokensieve demo``: methods side by side on one question, a conversation, and comparisons."""
