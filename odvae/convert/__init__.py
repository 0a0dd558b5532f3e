"""Convert weights: inflate an image VAE, import and export checkpoints of Open-Sora-Plan."""
