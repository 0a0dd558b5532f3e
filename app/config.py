"""How the app is started: where it listens, who may come in, where its files are."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from odvae.runtime.config import Config
from odvae.runtime.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost")


class AppConfig(Config):
    """Every setting of `lvdm-app`; the command line's options have the same names."""

    host: str = "127.0.0.1"  # the address to listen on; any other than this machine's own needs `auth`
    port: int = Field(default=7860, ge=0, le=65535)  # 0 takes any free port
    auth: str | None = None  # "user:password", asked of everybody for everything
    allowed_hosts: tuple[str, ...] = ()  # more names of this server; open to the network, none means any
    data_dir: Path = Path("outputs/app")  # the history and the videos
    pipeline: str | None = None  # the folder of a saved LVDMPipeline; None: the weights that ship
    max_seconds: float = Field(default=60.0, gt=0)  # the longest video that may be asked for
    max_queued: int = Field(default=100, ge=1)  # how many videos may wait

    @property
    def credentials(self) -> tuple[str, str] | None:
        """(user, password), or None where nobody is asked."""
        if self.auth is None:
            return None
        user, colon, password = self.auth.partition(":")
        if not (user and colon and password):
            raise UserError("auth: must be user:password, both not empty.")
        return user, password

    @property
    def hosts(self) -> list[str]:
        """The Host headers that are answered. A wrong one is a sign of DNS rebinding."""
        if self.host not in LOOPBACK and not self.allowed_hosts:
            return ["*"]  # safe only because `check_exposure` demands a password here
        return [*LOOPBACK, self.host, *self.allowed_hosts]

    def check_exposure(self) -> None:
        """Raises UserError where the app would be open to the network without a password."""
        if self.host not in LOOPBACK and self.credentials is None:
            raise UserError(
                f"host: {self.host} lets other machines in, so a password is needed: add --auth user:password, "
                "or stay on 127.0.0.1."
            )
