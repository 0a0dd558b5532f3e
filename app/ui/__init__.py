"""The Gradio page: layout, thin handlers, and pure functions that write its HTML."""

from app.ui.layout import mount

__all__ = ["mount"]
