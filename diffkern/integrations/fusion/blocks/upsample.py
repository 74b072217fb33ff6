"""Nearest-neighbour ×2 and the 3×3 convolution after it, as one transposed convolution on the small image."""

METHODS = ()
