"""The README's transcripts of errors: a command, and the body that the service answers it with."""

import json
import subprocess

from tests import ROOT

CONSOLE = (
    (ROOT / "README.md").read_text(encoding="utf-8").partition("```console\n")[2].partition("```")[0]
)
PROMPT = "$ "


def transcripts() -> dict[str, tuple[str, str]]:
    """The command that provokes each error and the answer's body, by the error's code."""
    lines = [line for line in CONSOLE.splitlines() if not line.startswith("#")]
    found = {}
    for command, body in zip(lines[::2], lines[1::2], strict=True):
        assert command.startswith(PROMPT)
        found[json.loads(body)["error"]["code"]] = (command.removeprefix(PROMPT), body)
    return found


def assert_as_shown(code: str, url: str) -> None:
    """Run the README's command for an error against the service at `url`, and compare what it prints."""
    command, body = transcripts()[code]
    assert command.count("localhost:3000") == 1
    done = subprocess.run(
        command.replace("localhost:3000", url.removeprefix("http://")),
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == body, done.stderr
