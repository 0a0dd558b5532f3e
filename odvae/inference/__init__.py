"""Encoding and decoding: streams, memory plans, latent files, other autoencoders."""
