"""What `/metrics` says of models: of those that are served or should be, and of no other.

    every family of the node's workers → without the samples of models that were retired

Laws: nothing is forgotten, only left out, since the library cannot take labels away where processes count together; a
model that comes back goes on from where it was, so no counter ever falls. It must not know what is counted, or why a
model went.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Final

from prometheus_client import Metric
from prometheus_client.registry import Collector

MODEL: Final = "model"


class OfModels(Collector):
    """The families of `source` with the samples that name one of `models`, or none."""

    def __init__(self, source: Collector, models: Collection[str]) -> None:
        self._source, self._models = source, models

    def collect(self) -> Iterator[Metric]:
        for family in self._source.collect():
            if any(sample.labels.get(MODEL, "") for sample in family.samples):
                kept = [s for s in family.samples if (name := s.labels.get(MODEL)) is None or name in self._models]
                family = Metric(family.name, family.documentation, family.type, family.unit)
                family.samples = kept
            yield family
