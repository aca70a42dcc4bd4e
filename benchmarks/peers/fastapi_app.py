"""FastAPI: the endpoint blocks, so it is a plain `def`, which FastAPI runs in its thread pool."""

import sys
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, UploadFile
from PIL import Image

from benchmarks.peers import model

app = FastAPI()
run = model.load()


@app.post("/classify")
def classify(image: UploadFile) -> dict[str, Any]:
    """Classify one image."""
    images = model.pixels(Image.open(image.file))[np.newaxis]
    return model.answer(run(images)[0])


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
