"""One file per framework, each one line for its user."""
