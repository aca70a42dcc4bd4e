"""What people run otherwise: the same `POST /classify` as their frameworks' documentation would have it.

Each module is a program that serves one image a request, multipart field `image`, on a port of
127.0.0.1; `benchmarks.serving` starts them. `model` is what they share: the model, and the pixels of an
image.
"""
