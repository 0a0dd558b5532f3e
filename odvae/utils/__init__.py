"""Shared by all packages: configs, files, errors, progress."""
