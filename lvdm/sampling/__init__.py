"""Videos in memory: the pipeline, the autoregressive rollout, schedulers, prompts."""
