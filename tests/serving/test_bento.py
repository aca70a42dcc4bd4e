"""Starting and packing: `bentoml serve` with bad settings, and a Bento that serves elsewhere."""

import ast
import re
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import numpy.typing as npt
import pytest

from benchmarks.server import LOG, service_environment
from serving.providers import obstacle
from tests import ROOT
from tests.serving.samples import encoded
from tests.serving.server import serving


def bento(folder: Path, *arguments: str, **settings: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "bentoml", *arguments],
        cwd=ROOT,
        env=service_environment(folder, **settings),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SERVING_MODEL", "none.onnx", "no model file at none.onnx"),
        ("SERVING_MODLE", "a.onnx", "SERVING_MODLE is not a setting"),
        pytest.param(
            *("SERVING_PROVIDER", "cuda", "pip install 'onnxruntime-gpu[cuda,cudnn]'"),
            marks=pytest.mark.skipif(obstacle("cuda") is None, reason="CUDA may work here"),
        ),
    ],
)
def test_a_service_that_cannot_start_says_why_and_ends(
    tmp_path: Path, name: str, value: str, message: str
) -> None:
    result = bento(tmp_path, "serve", "--port", "0", **{name: value})
    assert result.returncode != 0
    assert message in result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("options", "host", "message"),
    [
        (["--host", "127.0.0.1"], "127.0.0.1", "something else listens there"),
        ([], "0.0.0.0", "something else listens there"),
        # Reserved for documentation by RFC 5737.
        (["--host", "192.0.2.1"], "192.0.2.1", "this machine has no such address"),
    ],
)
def test_an_address_that_cannot_be_had_is_told(
    tmp_path: Path, options: list[str], host: str, message: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = bento(tmp_path, "serve", *options, "--port", port)
    assert result.returncode != 0
    assert f"cannot listen on {host}, port {port}: " in result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_built_bento_serves_from_another_folder(
    tmp_path: Path, images: npt.NDArray[np.uint8], model_file: Callable[..., Path]
) -> None:
    result = bento(tmp_path, "build")
    assert result.returncode == 0, result.stderr
    (source,) = (tmp_path / "bentoml" / "bentos" / "cifar10").glob("*/src")
    packed = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    modules = {f"serving/{path.name}" for path in (ROOT / "serving").glob("*.py")}
    assert packed == modules | {"models/default.onnx", "bentofile.yaml", "LICENSE"}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with serving(tmp_path, "cifar10:latest", cwd=elsewhere) as url:
        response = httpx.post(f"{url}/classify", files={"image": encoded(images[0])}, timeout=60)
        assert len(response.json()["predictions"]) == 5
    own = model_file(name="own.onnx").rename(elsewhere / "own.onnx")
    with serving(tmp_path, "cifar10:latest", cwd=elsewhere, SERVING_MODEL=own.name) as url:
        answer = httpx.get(f"{url}/model", timeout=60).json()
    assert answer["name"] == "tiny"
    assert (
        f"tiny {answer['version']} on {answer['provider']}: {answer['provider_reason']}"
        in (tmp_path / LOG).read_text()
    )


def test_the_image_has_a_folder_for_each_package_that_it_installs(tmp_path: Path) -> None:
    """Empty folders stand in for the code while the requirements are installed."""
    (command,) = re.findall(r"^RUN (mkdir .*?) &&", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for package in project["tool"]["setuptools"]["packages"]:
        assert (tmp_path / package.replace(".", "/")).is_dir()


def test_a_bento_installs_what_serving_imports() -> None:
    pins = re.findall(r'^    - "([\w-]+)==([^";]+)', (ROOT / "bentofile.yaml").read_text(), re.MULTILINE)
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    assert {f"{name}=={version}" for name, version in pins} <= set(constraints)
    packages = [name for name, _ in pins]
    named = {"bentoml"} | {re.sub("-(gpu|api)$", "", name) for name in packages}
    imported: set[str] = set()
    for path in (ROOT / "serving").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    foreign = imported - sys.stdlib_module_names - {"serving"}
    modules = {"PIL": "pillow", "circus": "kantoku"}
    needed = {modules.get(name, name) for name in foreign}
    assert needed <= named
    by_others = {"opentelemetry-exporter-otlp-proto-http", "uvloop"}
    assert named - needed == by_others
