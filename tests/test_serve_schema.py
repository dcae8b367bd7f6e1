"""Cases that schemathesis makes of the OpenAPI document: no 5xx, nothing it does not say."""

from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serving import serving
from small_store import write_store

from zipmoe.serve.limits import Limits

SEED = 20261127
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
ROUTES = {
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/v1/models/{name}",
    "/health",
    "/metrics",
    "/machine",
}
CALM = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    store = write_store(tmp_path_factory.mktemp("schema"))
    with serving(store, context=100, limits=Limits(answer_tokens=4)) as served:
        yield schemathesis.openapi.from_url(f"{served.url}/openapi.json")


def try_all(api, examples):
    """Try so many cases of every operation; count the statuses."""
    counts = Counter()
    for found in api.get_all_operations():

        @seed(SEED)
        @settings(max_examples=examples, **CALM)
        @given(case=found.ok().as_strategy())
        def check(case):
            if isinstance(case.body, dict) and "model" in case.body and counts.total() % 2:
                case.body["model"] = "tiny"  # or nothing would get past the name
            counts[case.call_and_validate(checks=CHECKS).status_code] += 1

        check()
    return counts


def test_nothing_is_answered_that_the_document_does_not_say(api):
    counts = try_all(api, examples=8)
    assert counts[200] > 0


@pytest.mark.soak
def test_nothing_is_answered_that_the_document_does_not_say_at_length(api, soak_record):
    counts = try_all(api, examples=700)
    statuses = {f"status {status}": count for status, count in sorted(counts.items())}
    soak_record("schemathesis over /openapi.json", cases=counts.total(), **statuses)
    assert counts.total() >= 2000
    assert {200, 404} <= counts.keys()


def test_the_document_describes_every_route(api):
    assert set(api.raw_schema["paths"]) == ROUTES
