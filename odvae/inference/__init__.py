"""Encoding and decoding: streams, memory, files of latents, other autoencoders."""
