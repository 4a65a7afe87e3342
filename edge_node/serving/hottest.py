"""The requests that are asked again and again, model by model: what a new release should know the answers of.

Laws: one is known from its second asking on; bounded in number and in bytes, the oldest goes; only plain requests, whose
key follows from their inputs alone, so that no answer moves between tenants. It must not know engines, boards or HTTP.
"""

from __future__ import annotations

from typing import Final

from edge_node.serving.batches import Ask

MOST: Final = 64
MAX_INPUT_BYTES: Final = 16 * 1024


class Hottest:
    """One event loop owns it."""

    def __init__(self) -> None:
        self._of: dict[str, dict[bytes, Ask]] = {}

    def asked_again(self, ask: Ask) -> None:
        known = self._of.get(ask.served.name)
        if known is None:
            known = self._of[ask.served.name] = {}
        if ask.key in known:
            # The latest is valid where an earlier one was purged.
            known[ask.key] = ask
            return
        if sum(array.nbytes for array in ask.inputs.values()) > MAX_INPUT_BYTES:
            return
        if len(known) >= MOST:
            del known[next(iter(known))]
        known[ask.key] = ask

    def take(self, model: str) -> list[Ask]:
        """The latest first; they are forgotten, since another release answers from here on."""
        asks = self.known(model)
        self._of.pop(model, None)
        return asks

    def known(self, model: str) -> list[Ask]:
        """The latest first."""
        asks = self._of.get(model, {}).values()
        return [
            ask
            for ask in reversed(asks)
            if ask.outputs is None and ask.key == ask.served.key_of(ask.inputs, None, None, "")
        ]
