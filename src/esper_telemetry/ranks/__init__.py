"""The run beyond this process."""
