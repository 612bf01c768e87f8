"""One folder per op: `op.py` (schema, fake, autograd), `reference.py` (the mathematics), `triton.py`."""
