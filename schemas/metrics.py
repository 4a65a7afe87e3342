"""Every metric, in one typed catalogue. A name outside it is an error where it is asked for.

The catalogue is data; `counter`, `gauge` and `histogram` make the Prometheus object of a name once per process. In a node
with several workers `PROMETHEUS_MULTIPROC_DIR` is set before the process starts, and any worker answers for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Final, Literal

from prometheus_client import Counter, Gauge, Histogram

Kind = Literal["counter", "gauge", "histogram"]
LATENCY_BUCKETS: Final = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
)  # fmt: skip
ROW_BUCKETS: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 1024.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: its kind, what it means, its labels; `merge` is how a gauge of several workers becomes one."""

    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    merge: Literal["livesum", "livemax", "livemostrecent"] = "livesum"


CATALOGUE: Final[dict[str, Metric]] = {
    "cdn_requests_total": Metric("counter", "Requests answered.", ("region", "status")),
    "cdn_request_latency_seconds": Metric("histogram", "Time to answer, cached or not.", ("region", "cache_level")),
    "cdn_cache_hit_rate": Metric("gauge", "Share of answers by tier, last beat.", ("region", "cache_level"), "livemax"),
    "mlcdn_model_requests_total": Metric("counter", "Requests by model and version.", ("model", "version", "status")),
    "mlcdn_cache_misses_total": Metric("counter", "Look-ups that a tier did not answer, by reason.", ("tier", "reason")),
    "mlcdn_cache_writes_dropped_total": Metric("counter", "Entries that a tier did not take, by reason.", ("tier", "reason")),
    "mlcdn_cache_bytes": Metric("gauge", "Bytes held by a tier.", ("tier",)),
    "mlcdn_breaker_open": Metric("gauge", "1 while a tier is left alone because it failed.", ("tier",), "livemax"),
    "mlcdn_tier_consulted": Metric("gauge", "1 while a tier is asked for a model's answers.", ("model", "tier"), "livemax"),
    "mlcdn_batch_rows": Metric("histogram", "Rows of one run, left with its tick or when busy.", ("model", "reason")),
    "mlcdn_run_seconds": Metric("histogram", "Time of one run.", ("model",)),
    "mlcdn_queue_seconds": Metric("histogram", "Time that the oldest job of a batch waited.", ("model",)),
    "mlcdn_swaps_total": Metric("counter", "Model swaps by outcome.", ("model", "outcome")),
    "mlcdn_candidate_percent": Metric("gauge", "Percent of requests its candidate answers.", ("model",), "livemax"),
    "mlcdn_swap_phase_seconds": Metric("histogram", "Time of a swap's phases.", ("phase",)),
    "mlcdn_fetch_bytes_total": Metric("counter", "Bytes of artifacts received, by where from.", ("source",)),
    "mlcdn_fetch_chunks_refused_total": Metric("counter", "Chunks with a wrong digest, by where from.", ("source",)),
    "mlcdn_artifact_bytes_given_total": Metric("counter", "Bytes of artifacts given to other nodes.", ()),
    "mlcdn_peers_left_total": Metric("counter", "Times another node was not asked for a while, by reason.", ("reason",)),
    "mlcdn_artifacts_rejected_total": Metric("counter", "Artifacts that a node would not activate.", ("phase",)),
    "mlcdn_log_position": Metric("gauge", "Last position obeyed.", ("topic",), "livemax"),
    "mlcdn_log_alarm": Metric("gauge", "1 while a signed topic is not what was promised.", ("topic", "reason"), "livemax"),
    "mlcdn_log_lag": Metric("gauge", "Records behind the high watermark.", ("topic",), "livemax"),
    "mlcdn_dead_letters_total": Metric("counter", "Records that did not act, by reason.", ("topic", "reason")),
    "mlcdn_dead_letters_suppressed_total": Metric("counter", "Dead letters above the bounded rate, counted only.", ()),
    "mlcdn_rows_dropped_total": Metric("counter", "Request rows dropped because a queue was full.", ()),
    "mlcdn_shadow_answers_total": Metric("counter", "Answers held against a candidate's, by outcome.", ("model", "outcome")),
    "mlcdn_recordings_total": Metric("counter", "Requests chosen to be recorded, by outcome.", ("model", "outcome")),
    "mlcdn_events_dropped_total": Metric("counter", "Fleet events dropped because a queue was full.", ("kind",)),
    "mlcdn_follower_rebuilds_total": Metric("counter", "Times a stalled or failed follower was rebuilt.", ("group",)),
    "mlcdn_control_plane_age_seconds": Metric("gauge", "Time since the agent's last heartbeat.", (), "livemax"),
    "mlcdn_connections_cut_total": Metric("counter", "Connections refused or cut, by reason.", ("reason",)),
    "mlcdn_tls_reloads_total": Metric("counter", "Certificates read again, by outcome.", ("outcome",)),
    "mlcdn_router_answers_total": Metric("counter", "Answers of the router: ranked, redirected, none.", ("answer",)),
    "mlcdn_router_panics_total": Metric("counter", "Answers given while fewer than half of the nodes were well.", ()),
    "mlcdn_router_table_age_seconds": Metric("gauge", "Age of the routing table; -1 for none.", (), "livemostrecent"),
    "mlcdn_router_table_nodes": Metric("gauge", "Nodes of the routing table by health.", ("health",), "livemostrecent"),
    "mlcdn_router_tables_refused_total": Metric("counter", "Routing tables refused, by reason.", ("reason",)),
    "mlcdn_router_probes_total": Metric("counter", "Probes of nodes by outcome.", ("outcome",)),
}  # fmt: skip


def _of(name: str, kind: Kind) -> Metric:
    metric = CATALOGUE[name]
    if metric.kind != kind:
        raise TypeError(f"{name} is a {metric.kind}, not a {kind}")
    return metric


@cache
def counter(name: str) -> Counter:
    metric = _of(name, "counter")
    return Counter(name, metric.help, metric.labels)


@cache
def gauge(name: str) -> Gauge:
    metric = _of(name, "gauge")
    return Gauge(name, metric.help, metric.labels, multiprocess_mode=metric.merge)


@cache
def histogram(name: str) -> Histogram:
    metric = _of(name, "histogram")
    return Histogram(
        name, metric.help, metric.labels, buckets=ROW_BUCKETS if name.endswith("_rows") else LATENCY_BUCKETS
    )
