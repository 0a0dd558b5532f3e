"""Public weights as pipelines of this package."""
