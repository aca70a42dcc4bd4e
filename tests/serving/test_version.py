import hashlib
from collections.abc import Callable
from pathlib import Path

import onnx

from serving.settings import BUNDLED_MODEL
from serving.version import version


def test_version_is_of_the_model_without_its_metadata(model_file: Callable[..., Path]) -> None:
    for path in (BUNDLED_MODEL, model_file()):
        model = onnx.load(path)
        named = {entry.key: entry.value for entry in model.metadata_props}["version"]
        del model.metadata_props[:]
        digest = hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()
        assert version(path.read_bytes()) == named == digest[:12]
