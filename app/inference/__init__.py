"""The models in the worker, and the video as it grows."""
