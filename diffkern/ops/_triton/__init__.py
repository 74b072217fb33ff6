"""What the Triton kernels of several ops share. Imported with the first kernel: `import diffkern` knows no Triton.

On the device: philox.py (the integers), normal.py (what they become), tile.py (which elements a program has),
arithmetic.py. On the host: launch.py. Written so that Triton's interpreter gives the same results on a CPU: what is
loaded becomes float32 at once, and what the interpreter cannot run stands in one-line functions with a twin.
"""
