"""The web app: a job queue, worker processes that run the jobs, and a page that shows them.

Nothing outside `app.ui` and `app.server` imports gradio; nothing here imports torch before a model is needed.
"""

from odvae import __version__

__all__ = ["__version__"]
