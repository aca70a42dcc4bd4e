"""The figures of a real service, as Prometheus reads them."""

import httpx
from prometheus_client.parser import text_string_to_metric_families

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def read(client: httpx.Client) -> Samples:
    """All samples of /metrics by name and labels."""
    response = client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, /, **labels: str) -> float:
    """The value of a sample, 0 if there is none."""
    return samples.get((name, frozenset(labels.items())), 0.0)


def under_way(client: httpx.Client) -> int:
    """The number of requests that the service works on, without the one that asks for it."""
    return int(value(read(client), "cifar10_requests_under_way")) - 1
