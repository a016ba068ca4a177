"""Ways out of the process; each reads anything that has a `.snapshot`."""
