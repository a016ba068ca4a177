"""End to end on one machine, from a trainer to a page, natively and without containers."""
