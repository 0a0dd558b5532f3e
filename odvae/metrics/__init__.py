"""Quality metrics, one module each. Videos are uint8 (T, H, W, 3) or float tensors in [-1, 1], as each one says."""
