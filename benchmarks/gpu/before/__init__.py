"""The scanner as it was before any GPU was at hand: what the variants are compared with."""
