"""Training an OD-VAE."""
