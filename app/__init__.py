"""The web app: a queue of videos to make, one worker that makes them, and a page that shows them grow.

Nothing outside `app.ui` and `app.server` imports gradio; nothing here imports torch before a model is needed.
"""

from odvae import __version__

__all__ = ["__version__"]
