"""Train the networks of the reports from their recipes, and better ones of our own."""

import time

STARTED = time.monotonic()  # before the imports, whose seconds count towards a time limit
