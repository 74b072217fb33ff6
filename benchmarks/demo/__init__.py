"""The demo: a small class-conditional U-Net learns the handwritten digits on a CPU, in minutes."""
