"""Other ways to serve: the same `POST /classify`, written as each framework's documentation has it.

Each module serves one image per request, in the multipart field `image`; `benchmarks.serving` starts
them on a local port. They share `model`: the model, the pixels of an image, and the answer.
"""
