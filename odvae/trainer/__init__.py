"""The trainer that both models share."""
