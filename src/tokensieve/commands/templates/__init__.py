"""What ``tokensieve new-method`` writes, with ``my-method``, ``my_method`` and ``MyMethod`` for the user's name."""
