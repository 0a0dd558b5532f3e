"""`lvdm-app`: start the web app."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from app.config import AppConfig
from odvae import __version__
from odvae.utils.config import load_config
from odvae.utils.errors import cli_main
from odvae.utils.progress import setup_logging


def parse(argv: list[str] | None) -> AppConfig:
    """Return the settings from the YAML file, key=value arguments and options; later ones win."""
    defaults = AppConfig()
    parser = argparse.ArgumentParser(prog="lvdm-app", description="Start the web app.")
    parser.add_argument("--version", action="version", version=f"lvdm-app {__version__}")
    parser.add_argument("--host", help=f"address to listen on ({defaults.host}); any other address needs --auth")
    parser.add_argument("--port", type=int, help=f"port ({defaults.port}; 0: any free one)")
    parser.add_argument("--auth", metavar="USER:PASSWORD", action="append", help="require a password; repeat for "
                        "more users, each with their own history (or set LVDM_APP_AUTH, one line a user)")
    parser.add_argument("--data-dir", help=f"history, videos and uploads ({defaults.data_dir})")
    parser.add_argument("--folder", metavar="FOLDER", action="append", dest="folders",
                        help="a folder with videos, caches or models to pick from; may be repeated (current folder)")
    parser.add_argument("--pipeline", metavar="FOLDER",
                        help="a saved LVDMPipeline, such as `lvdm train` writes (the shipped one)")
    parser.add_argument("--workers", metavar="N",
                        help="jobs that run at once, each on a GPU of its own; auto: as many as there are GPUs, or one "
                        "without (auto)")
    parser.add_argument("--mcp", action="store_true", default=None,
                        help="serve the API to language models too (needs `pip install 'gradio[mcp]'`)")
    parser.add_argument("--config", type=Path, help="a YAML file of settings")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any setting of app/config.py")
    options = parser.parse_args(argv)
    options.auth = options.auth or os.environ.get("LVDM_APP_AUTH", "").splitlines() or None
    names = ("host", "port", "auth", "data_dir", "folders", "pipeline", "workers", "mcp")
    values = {name: getattr(options, name) for name in names}
    overrides = [f"{name}={json.dumps(value)}" for name, value in values.items() if value is not None]
    return load_config(AppConfig, options.config, [*options.overrides, *overrides])


@cli_main
def main(argv: list[str] | None = None) -> int | None:
    """Serve until Ctrl-C."""
    setup_logging()
    config = parse(argv)
    config.check_exposure()
    from app.server import serve  # gradio takes seconds to import: report invalid settings first

    serve(config)
    return 0
