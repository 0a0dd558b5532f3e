"""Weights from elsewhere: an inflated image VAE, the checkpoints of Open-Sora-Plan."""
