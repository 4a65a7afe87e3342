"""Which network a command speaks to: the one that ``--dir`` names by its network.json, or the one the settings name."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import SecretStr

from schemas import settings
from schemas.errors import SettingsInvalid, Unreachable
from streams.log.keys import load_private, load_roots
from streams.log.producer import KafkaAppender
from streams.log.reader import KafkaReader
from streams.log.writer import Writer

Dir = Annotated[
    Path,
    typer.Option("--dir", envvar="MLCDN_DIR", help="The local network's directory.", show_default=True),
]
DEFAULT_DIR = Path(".mlcdn")


def read_document(directory: Path) -> dict[str, Any]:
    """network.json of a running local network; `Unreachable` when it does not run."""
    path = directory / "network.json"
    try:
        document: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise Unreachable("the local network", str(directory), "start one: mlcdn up --detach") from None
    except (OSError, ValueError) as error:
        raise SettingsInvalid(f"{path}: {error}") from None
    return document


@dataclass
class Target:
    """The network a command speaks to, and the ways to it; each is made when it is first used."""

    settings: settings.Settings
    document: dict[str, Any] | None

    @classmethod
    def at(cls, directory: Path) -> Target:
        """The local network in `directory`, unless ``MLCDN_KAFKA`` says that the settings name one elsewhere."""
        loaded = settings.load()
        if os.environ.get("MLCDN_KAFKA"):
            return cls(loaded, None)
        document = read_document(directory)
        s3, keys = document["s3"], document["keys"]
        return cls(
            loaded.model_copy(
                update={
                    "kafka": document["kafka"],
                    "s3_endpoint": s3["endpoint"],
                    "s3_bucket": s3["bucket"],
                    "s3_access_key": s3["access_key"],
                    "s3_secret_key": SecretStr(s3["secret_key"]),
                    "root_keys": Path(keys["trusted"]),
                    "signing_key": Path(keys["signing"]),
                },
            ),
            document,
        )

    @cached_property
    def roots(self) -> tuple[bytes, ...]:
        return load_roots(self.settings.root_keys)

    @cached_property
    def reader(self) -> KafkaReader:
        return KafkaReader(self.settings.kafka)

    def writer(self) -> Writer:
        """Signs with the configured key; close its appender when done."""
        if self.settings.signing_key is None:
            raise SettingsInvalid("setting signing_key: this command signs, so it needs a private key file")
        return Writer(
            KafkaAppender(self.settings.kafka, client_id="mlcdn-cli"),
            source=f"/operators/{self.settings.author}",
            signing_key=load_private(self.settings.signing_key),
        )

    def url(self, what: str) -> str:
        """A URL of the local network by its dotted name in network.json."""
        if self.document is None:
            raise SettingsInvalid(f"no local network: pass the URL of the {what}")
        found: Any = self.document
        for part in what.split("."):
            found = found[part]
        return str(found)
