"""What /metrics leaves out: the samples of models that are not served any more."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from edge_node.serving.exposition import OfModels


def said(source: CollectorRegistry, *models: str) -> str:
    registry = CollectorRegistry()
    registry.register(OfModels(source, models))
    return generate_latest(registry).decode()


def test_a_retired_model_is_in_no_family_and_what_is_of_no_model_in_all() -> None:
    source = CollectorRegistry()
    runs = Histogram("runs", "Time of one run.", ("model",), registry=source)
    swaps = Counter("swaps_total", "Swaps.", ("model", "outcome"), registry=source)
    size = Gauge("bytes", "Bytes.", ("tier",), registry=source)
    everyone = Counter("all_total", "All.", registry=source)
    for model in ("here", "gone"):
        runs.labels(model).observe(0.01)
        swaps.labels(model, "swapped").inc()
    size.labels("redis").set(3)
    everyone.inc()
    assert said(source, "here", "gone") == generate_latest(source).decode()
    text = said(source, "here")
    assert "gone" not in text
    for line in ('runs_count{model="here"} 1.0', 'swaps_total{model="here",outcome="swapped"} 1.0', "all_total 1.0"):
        assert line in text.splitlines()
    assert 'bytes{tier="redis"} 3.0' in text
    assert "# TYPE runs histogram" in said(source) and "{model=" not in said(source)
    # It comes back, and no counter has fallen.
    swaps.labels("gone", "swapped").inc()
    assert 'swaps_total{model="gone",outcome="swapped"} 2.0' in said(source, "here", "gone")
