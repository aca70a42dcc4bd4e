import os

import pytest

from serving.errors import SettingsError
from serving.settings import BUNDLED_MODEL, Settings


def test_defaults_without_variables() -> None:
    settings = Settings.from_environment({"PATH": "/bin"})
    assert settings.model == BUNDLED_MODEL
    assert settings.provider == "auto"
    assert 1 <= settings.threads <= (os.cpu_count() or 1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no CPU affinity")
def test_no_more_threads_than_cores_that_the_process_may_use() -> None:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        assert Settings.from_environment({}).threads == 1
    finally:
        os.sched_setaffinity(0, cores)


def test_no_more_threads_than_the_quota_has_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")  # acts like a container's quota
    assert Settings.from_environment({}).threads == 1


def test_variables_are_read() -> None:
    settings = Settings.from_environment(
        {"SERVING_MODEL": "a.onnx", "SERVING_MAX_ROWS": "7", "SERVING_ACCESS_LOG": "true"}
    )
    assert (settings.model.name, settings.max_rows, settings.access_log) == ("a.onnx", 7, True)


def test_unknown_variable_is_named() -> None:
    with pytest.raises(SettingsError, match=r"SERVING_MAX_ROW is not a setting.*SERVING_MAX_ROWS"):
        Settings.from_environment({"SERVING_MAX_ROW": "7"})


@pytest.mark.parametrize("service", ["SERVING", "SERVING_API", "SERVING_MODEL"])
def test_links_to_services_of_kubernetes_are_no_settings(service: str) -> None:
    links = {
        f"{service}_SERVICE_HOST": "10.0.0.1",
        f"{service}_SERVICE_PORT": "80",
        f"{service}_SERVICE_PORT_HTTP": "80",
        f"{service}_PORT": "tcp://10.0.0.1:80",
        f"{service}_PORT_80_TCP": "tcp://10.0.0.1:80",
        f"{service}_PORT_80_TCP_PROTO": "tcp",
        f"{service}_PORT_80_TCP_PORT": "80",
        f"{service}_PORT_80_TCP_ADDR": "10.0.0.1",
    }
    assert Settings.from_environment(links) == Settings()
    with pytest.raises(SettingsError, match="SERVING_PORT is not a setting"):
        Settings.from_environment({"SERVING_PORT": "8080"})


@pytest.mark.parametrize("value", ["a_TCP_b=", "c2VjcmV0_UDP_x==", "k_SERVICE_HOST=1", "_PORT=tcp://a"])
def test_a_value_that_looks_like_such_a_link_is_a_value(value: str) -> None:
    key = Settings.from_environment({"SERVING_API_KEY": value}).api_key
    assert key is not None
    assert key.get_secret_value() == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SERVING_PROVIDER", "gpu"),
        ("SERVING_MAX_ROWS", "0"),
        ("SERVING_MAX_ROWS", "many"),
        ("SERVING_THREADS", "5000"),
        ("SERVING_MAX_BATCH_SIZE", "100000000"),
        ("SERVING_REQUEST_TIMEOUT", "-1"),
        ("SERVING_STOP_TIMEOUT", "-1"),
        ("SERVING_MAX_CONNECTIONS", "512"),  # not more than the requests that may wait
        ("SERVING_MAX_UPLOAD_BYTES", "1000"),  # less than a single body may have
    ],
)
def test_unusable_value_is_named(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"{name}='{value}'"):
        Settings.from_environment({name: value})


def test_all_bodies_have_room_for_the_largest() -> None:
    with pytest.raises(SettingsError, match=r"SERVING_MAX_UPLOAD_BYTES=.*SERVING_MAX_BODY_BYTES"):
        Settings.from_environment({"SERVING_MAX_BODY_BYTES": str(2**30)})
    both = {"SERVING_MAX_BODY_BYTES": str(2**30), "SERVING_MAX_UPLOAD_BYTES": str(2**30)}
    assert Settings.from_environment(both).max_upload_bytes == 2**30


def test_white_space_around_a_value_is_none_of_it() -> None:
    """A secret read from a file ends with a newline, which no client can send."""
    settings = Settings.from_environment(
        {
            "SERVING_API_KEY": " clé  secrète\r\n",
            "SERVING_PROVIDER": "cpu\n",
            "SERVING_MODEL": "a.onnx\n",
        }
    )
    assert settings.api_key is not None
    assert settings.api_key.get_secret_value() == "clé  secrète"
    assert (settings.provider, settings.model.name) == ("cpu", "a.onnx")


@pytest.mark.parametrize("blank", ["", " \t\n"])
def test_what_has_no_value_is_named(blank: str) -> None:
    with pytest.raises(SettingsError, match="SERVING_API_KEY, SERVING_MODEL: there is no value"):
        Settings.from_environment({"SERVING_API_KEY": blank, "SERVING_MODEL": blank})


def test_what_has_no_value_hides_no_other_error() -> None:
    with pytest.raises(SettingsError, match=r"SERVING_MODEL: there is no value.*\nSERVING_WORKERS='0'"):
        Settings.from_environment({"SERVING_MODEL": "", "SERVING_WORKERS": "0"})


def test_a_key_that_is_no_text_is_told_without_it() -> None:
    key = os.fsdecode(b"secret\xff")
    with pytest.raises(SettingsError, match="SERVING_API_KEY: it is not UTF-8") as told:
        Settings.from_environment({"SERVING_API_KEY": key})
    assert "secret" not in str(told.value)
