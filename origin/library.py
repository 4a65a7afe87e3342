"""Publishing as one call of Python: what ``mlcdn publish`` does, without a command line or a server.

Law: it opens what it needs and closes it, whichever way the call ends. It must not know options or HTTP.
"""

from __future__ import annotations

from origin.outcome import Outcome, outcome
from origin.publish import Publisher
from origin.receipts import FleetWatch
from origin.release_request import ReleaseRequest
from schemas.errors import SettingsInvalid
from schemas.settings import Settings
from streams.artifacts import ArtifactStore
from streams.log.keys import load_private, load_roots
from streams.log.producer import KafkaAppender
from streams.log.reader import KafkaReader
from streams.log.writer import Writer


async def publish(request: ReleaseRequest, given: Settings, *, wait_s: float | None = None) -> Outcome:
    """Releases `request` on the network that `given` names, signed with its `signing_key`.

    With `wait_s`, seconds, returns once every node with a fresh beat serves it or cannot, one entry of `nodes` for each,
    and otherwise as soon as the log took it. A node that does not serve it is no error: ask `not_live()`. The errors are
    those of `Publisher.publish`, and `SettingsInvalid` without a key.
    """
    if given.signing_key is None:
        raise SettingsInvalid("setting signing_key: a release is signed, so it needs a private key file")
    store = ArtifactStore(
        given.s3_endpoint, given.s3_bucket, given.s3_access_key, given.s3_secret_key.get_secret_value(), given.s3_region
    )
    reader = KafkaReader(given.kafka)
    key, roots = load_private(given.signing_key), load_roots(given.root_keys)
    appender = KafkaAppender(given.kafka, client_id="mlcdn-library")
    try:
        publisher = Publisher(
            store, Writer(appender, source=f"/operators/{given.author}", signing_key=key), reader, roots
        )
        watch = FleetWatch(reader) if wait_s is not None else None
        return await outcome(lambda: publisher.publish(request), watch, roots, wait_s or 0.0)
    finally:
        await appender.close()
