"""Signals to a worker."""

import subprocess
import sys

import pytest


def printed(program: str) -> str:
    """What a program prints, in a process of its own that signals may be sent to."""
    script = [sys.executable, "-c", program]
    return subprocess.run(script, capture_output=True, text=True, timeout=120, check=True).stdout


SIGNALLED = """
import asyncio, os, signal
import uvicorn
from serving.drain import Drain
from serving.errors import StoppingError

async def main() -> None:
    drain = Drain(600)
    drain.listen(uvicorn.Server(uvicorn.Config("none")))

    async def request() -> None:
        with drain.request():
            await asyncio.Event().wait()

    waiting = asyncio.create_task(request())
    await asyncio.sleep(0)
    for number in ({first}, signal.SIGINT):  # before the loop's next turn
        os.kill(os.getpid(), number)
    try:
        await asyncio.wait_for(waiting, 60)
    except StoppingError as error:
        print(error)
    try:
        with drain.request():
            print("taken")
    except StoppingError:
        print("refused")

asyncio.run(main())
"""


@pytest.mark.parametrize("first", ["signal.SIGTERM", "signal.SIGINT"])
def test_a_second_ctrl_c_counts_though_the_first_is_not_dealt_with(first: str) -> None:
    assert (
        printed(SIGNALLED.format(first=first))
        == "The service stopped before the request was finished.\nrefused\n"
    )


STOPPING = """
import asyncio, os, signal
import uvicorn
from serving import drain
from serving.errors import StoppingError

async def main() -> None:
    drain.ARRIVING_SECONDS, drain.REFUSING_SECONDS = {arriving}, 600
    worker, server = drain.Drain(600), uvicorn.Server(uvicorn.Config("none"))
    worker.listen(server)
    os.kill(os.getpid(), signal.SIGTERM)
    for turn in range(20):
        await asyncio.sleep(0)
    try:
        with worker.request():
            print("taken", worker.stopping, server.should_exit)
    except StoppingError:
        print("refused", worker.stopping, server.should_exit)

asyncio.run(main())
"""


@pytest.mark.parametrize(("arriving", "answer"), [(600, "taken"), (0, "refused")])
def test_requests_on_their_way_are_taken_and_later_ones_refused_before_the_end(
    arriving: int, answer: str
) -> None:
    assert printed(STOPPING.format(arriving=arriving)) == f"{answer} True False\n"


TERMINATED = """
import asyncio, os, signal
import uvicorn
from serving.drain import Drain

async def main() -> None:
    drain = Drain(600)
    drain.listen(uvicorn.Server(uvicorn.Config("none")))

    async def request() -> None:
        with drain.request():
            await answered.wait()

    answered = asyncio.Event()
    waiting = asyncio.create_task(request())
    await asyncio.sleep(0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
        os.kill(os.getpid(), number)
        for turn in range(20):
            await asyncio.sleep(0)
    answered.set()
    await waiting
    print("answered", drain.stopping)

asyncio.run(main())
"""


def test_sigterm_again_cuts_no_request_off() -> None:
    """Such as that for the end of the supervisor, after the supervisor's own."""
    assert printed(TERMINATED) == "answered True\n"
