"""Train an OD-VAE."""
