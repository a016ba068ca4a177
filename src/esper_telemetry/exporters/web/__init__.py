"""A web server and who may ask it; it knows nothing of gradients and imports nothing else of the package."""
