"""The Triton kernels of attention: tiles.py (addresses and products), forward.py, backward.py."""
