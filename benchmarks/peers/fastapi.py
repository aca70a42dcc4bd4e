"""FastAPI: an endpoint that computes is a ``def``, which FastAPI runs in its threads."""

# mypy: disable-error-code="untyped-decorator"

import numpy as np
import uvicorn
from fastapi import FastAPI, UploadFile

from benchmarks import peers

app = FastAPI()
run = peers.engine()


@app.post("/classify")
def classify(image: UploadFile) -> dict[str, str | float]:
    """Classify an image."""
    return peers.answer(run(peers.pixels(image.file)[np.newaxis])[0])


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=peers.port())
