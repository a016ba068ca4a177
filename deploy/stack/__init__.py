"""The whole road from a trainer to a page on one machine, natively and without containers."""
