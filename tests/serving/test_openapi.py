"""The service against its own OpenAPI document."""

import subprocess
import sys
from pathlib import Path

import httpx
from openapi_spec_validator import validate


def test_the_document_is_what_it_says_it_is(url: str) -> None:
    document = httpx.get(f"{url}/docs.json", timeout=60).json()
    assert document["openapi"] == "3.1.0"
    validate(document)


def test_requests_that_follow_the_document_and_that_break_it(url: str, tmp_path: Path) -> None:
    """Schemathesis makes both kinds from the document, and checks the answers against it."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{url}/docs.json"),
            *("--max-examples", "20", "--seed", "0", "--suppress-health-check", "too_slow"),
            # The service has no state, so a request's outcome never depends on those before it.
            *("--phases", "examples,coverage,fuzzing"),
            # The document cannot say which bytes are an image or a pickle.
            *("--exclude-checks", "positive_data_acceptance"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
