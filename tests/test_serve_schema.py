"""Cases that schemathesis makes of the OpenAPI document: no 5xx, nothing it does not say."""

import pytest
import schemathesis
from hypothesis import HealthCheck, seed, settings
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

SAMPLE, SOAK, SEED = 8, 320, 20261127
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
        document = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
        document.counted = []
        yield document


schema = schemathesis.pytest.from_fixture("api")


def check(case, counted):
    if isinstance(case.body, dict) and "model" in case.body and len(counted) % 2:
        case.body["model"] = "tiny"  # or nothing would get past the name
    response = case.call_and_validate(checks=CHECKS)
    counted.append(response.status_code)


@schema.parametrize()
@seed(SEED)
@settings(max_examples=SAMPLE, **CALM)
def test_nothing_is_answered_that_the_document_does_not_say(case, api):
    check(case, api.counted)


@pytest.mark.soak
@schema.parametrize()
@seed(SEED)
@settings(max_examples=SOAK, **CALM)
def test_nothing_is_answered_that_the_document_does_not_say_at_length(case, api):
    check(case, api.counted)


@pytest.mark.soak
def test_two_thousand_cases_were_tried(api, soak_record):
    codes = sorted(set(api.counted))
    counts = {f"status {code}": api.counted.count(code) for code in codes}
    soak_record("schemathesis over /openapi.json", cases=len(api.counted), **counts)
    assert len(api.counted) >= 2000
    assert {200, 404, 422} <= set(codes)


def test_the_document_describes_every_route(api):
    assert set(api.raw_schema["paths"]) == ROUTES
