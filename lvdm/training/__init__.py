"""Training an LVDM on latent caches."""
