# docker build -t cifar10 .                     docker run --init -p 3000:3000 cifar10
# docker build -t cifar10 --build-arg GPU=1 .   docker run --init -p 3000:3000 --gpus all cifar10
# With GPU=1 the image has libraries of NVIDIA's, under its licence.
FROM python:3.12-slim

ARG GPU=0
# BentoML's files go to /tmp too, so it is the only place that has to be writable.
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 BENTOML_DO_NOT_TRACK=True BENTOML_HOME=/tmp/bentoml

# What serving needs, in a layer that changes only with the requirements. The extra installs
# onnxruntime-gpu, which runs on CPUs too, but plain onnxruntime is 270 MB smaller.
WORKDIR /tmp/requirements
COPY pyproject.toml constraints.txt ./
RUN mkdir -p training/report export serving && touch README.md LICENSE \
    && pip install --no-cache-dir --constraint constraints.txt ".[serve]" \
    && if [ "$GPU" = 1 ]; then \
        pip install --no-cache-dir --constraint constraints.txt "onnxruntime-gpu[cuda,cudnn]"; \
    else \
        pip uninstall --yes onnxruntime-gpu \
        && pip install --no-cache-dir --constraint constraints.txt --no-deps --force-reinstall onnxruntime; \
    fi \
    && rm -r ./*

WORKDIR /app

COPY bentofile.yaml LICENSE ./
COPY models/default.onnx models/
COPY serving serving/

# By number, as Kubernetes' runAsNonRoot does not accept a name.
RUN useradd --create-home --uid 10001 cifar10
USER 10001
EXPOSE 3000
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s \
    CMD ["python", "-c", "from http.client import HTTPConnection as C; c = C('localhost', 3000, timeout=2); \
c.request('GET', '/livez'); assert c.getresponse().status == 200"]
CMD ["bentoml", "serve", "--host", "0.0.0.0", "--port", "3000"]
