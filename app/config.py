"""How the app is started: where it listens, who may come in, where its files are."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from odvae.utils.config import Config, OutputPath
from odvae.utils.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost")


class AppConfig(Config):
    """Every setting of `lvdm-app`; the command line's options have the same names."""

    host: str = "127.0.0.1"  # the address to listen on; any other than this machine's own needs `auth`
    port: int = Field(default=7860, ge=0, le=65535)  # 0 takes any free port
    auth: tuple[str, ...] = ()  # "user:password" each; asked of everybody for everything, and each has a history
    allowed_hosts: tuple[str, ...] = ()  # more names of this server; open to the network, none means any
    data_dir: OutputPath = Path("outputs/app")  # the history, the videos and what was uploaded
    folders: tuple[Path, ...] = ()  # where videos, caches, runs and pipelines may be picked from; none: this folder
    workspace: OutputPath = Path("outputs")  # where caches and runs are written that the app makes
    pipeline: Path | None = None  # the folder of a saved LVDMPipeline; None: the weights that ship
    max_seconds: float = Field(default=60.0, gt=0)  # the longest video that may be asked for
    max_queued: int = Field(default=100, ge=1)  # how many jobs may wait
    max_side: int = Field(default=1024, ge=8)  # the longest side in pixels that may be asked for
    max_upload: int = Field(default=2**30, ge=1)  # bytes of a file that is uploaded
    max_upload_seconds: float = Field(default=600.0, gt=0)  # of a video that is uploaded
    max_disk: int = Field(default=20 * 2**30, ge=0)  # bytes of the history; beyond, the oldest go, never a favorite
    mcp: bool = False  # also serve the API to language models, by MCP; needs the extra `mcp`

    @property
    def credentials(self) -> dict[str, str]:
        """Passwords by user; empty where nobody is asked."""
        users: dict[str, str] = {}
        for one in self.auth:
            user, colon, password = one.partition(":")
            if not (user and colon and password):
                raise UserError("auth: must be user:password, both not empty.")
            if user in users:
                raise UserError(f"auth: {user} is there twice.")
            users[user] = password
        return users

    @property
    def hosts(self) -> list[str]:
        """The Host headers that are answered. A wrong one is a sign of DNS rebinding."""
        if self.host not in LOOPBACK and not self.allowed_hosts:
            return ["*"]  # safe only because `check_exposure` demands a password here
        return [*LOOPBACK, self.host, *self.allowed_hosts]

    def roots(self) -> list[Path]:
        """Below which folders may be picked."""
        return [path.absolute() for path in dict.fromkeys((*(self.folders or (Path("."),)), self.workspace))]

    def check_exposure(self) -> None:
        """Raises UserError where the app would be open to the network without a password."""
        if self.host not in LOOPBACK and not self.credentials:
            raise UserError(
                f"host: {self.host} lets other machines in, so a password is needed: add --auth user:password, "
                "or stay on 127.0.0.1."
            )
