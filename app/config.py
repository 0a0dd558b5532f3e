"""The configuration of the app."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field

from odvae.utils.config import Config, OutputPath
from odvae.utils.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost")


class AppConfig(Config):
    """The settings of `lvdm-app`; the options of the command line have the same names."""

    host: str = "127.0.0.1"  # the address to listen on; any but the loopback address needs `auth`
    port: int = Field(default=7860, ge=0, le=65535)  # 0 takes any free port
    auth: tuple[str, ...] = ()  # "user:password" each; required for every request; each user has a history
    allowed_hosts: tuple[str, ...] = ()  # more names of this server; on a network, none means any
    data_dir: OutputPath = Path("outputs/app")  # history, videos and uploads
    folders: tuple[Path, ...] = ()  # roots of the assets; none: the current folder
    workspace: OutputPath = Path("outputs")  # for new caches and runs
    pipeline: Path | None = None  # the folder of a saved LVDMPipeline; None: the shipped weights
    # Jobs that run at once, each on an accelerator of its own; 0 or "auto": one for each, or one on the CPU.
    workers: Annotated[int, BeforeValidator(lambda value: 0 if value == "auto" else value), Field(ge=0, le=256)] = 0
    max_seconds: float = Field(default=60.0, gt=0)  # the longest video that may be requested
    max_queued: int = Field(default=100, ge=1)  # the largest number of queued jobs
    max_side: int = Field(default=1440, ge=8)  # the longest side in pixels that may be requested
    max_upload: int = Field(default=2**30, ge=1)  # bytes of an upload
    max_upload_seconds: float = Field(default=600.0, gt=0)  # of an uploaded video
    max_disk: int = Field(default=20 * 2**30, ge=0)  # bytes of the history; beyond it old jobs are deleted
    mcp: bool = False  # serve the API to language models too, by MCP; needs the extra `mcp`

    @property
    def credentials(self) -> dict[str, str]:
        """The passwords by user; empty if none is required."""
        users: dict[str, str] = {}
        for entry in self.auth:
            user, colon, password = entry.partition(":")
            if not (user and colon and password):
                raise UserError("auth: must be USER:PASSWORD, neither empty.")
            if user in users:
                raise UserError(f"auth: {user} is given twice.")
            users[user] = password
        return users

    @property
    def hosts(self) -> list[str]:
        """The accepted Host headers. Any other is a sign of DNS rebinding."""
        if self.host not in LOOPBACK and not self.allowed_hosts:
            return ["*"]  # safe only because `check_exposure` requires a password here
        return [*LOOPBACK, self.host, *self.allowed_hosts]

    def roots(self) -> list[Path]:
        """Return the folders below which assets are found."""
        return [path.absolute() for path in dict.fromkeys((*(self.folders or (Path("."),)), self.workspace))]

    def check_exposure(self) -> None:
        """Raise UserError if the app would be open to the network without a password."""
        if self.host not in LOOPBACK and not self.credentials:
            raise UserError(
                f"host: {self.host} is open to other machines and needs a password: add --auth USER:PASSWORD, or use "
                "127.0.0.1."
            )
