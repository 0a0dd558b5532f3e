"""Requests: who may do what, over HTTP."""
