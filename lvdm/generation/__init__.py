"""Videos as files: requests, batches, resume."""
