"""The tests of Tokensieve: laws, methods, engine, families, golden vectors; what they share is in ``tests.support``."""
