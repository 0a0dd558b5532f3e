"""Building a latent cache: probe files, plan clips and shards, decode, encode, commit."""
