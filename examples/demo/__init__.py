"""A real model and real data that any machine with Python and PyPI has; what ``make demo`` is made of."""
