"""Train every report's network by its own recipe, and better ones of ours."""

import time

STARTED = time.monotonic()  # before the imports, which take seconds of a time limit
