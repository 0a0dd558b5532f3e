"""The trainer shared by both models."""
