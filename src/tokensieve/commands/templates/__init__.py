"""Hold what ``tokensieve new-method`` writes; ``my-method``, ``my_method`` and ``MyMethod`` become the user's name."""
