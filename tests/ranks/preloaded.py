"""Imported once by the server that forks the ranks: each of them begins with it."""
