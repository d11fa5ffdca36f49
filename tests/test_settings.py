"""Settings: four sources in one order, and every mistake stops the start by its name."""

import pytest

from inferfleet.tasks.errors import SettingsError
from inferfleet.tasks.settings import ImageSettings, load_settings, local_url
from inferfleet.workers.host import engine_spec


@pytest.fixture(autouse=True)
def bare(tmp_path, monkeypatch):
    """An empty folder and an environment without our names."""
    import os

    for name in [name for name in os.environ if name.upper().startswith("INFERFLEET_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_without_anything_the_defaults_hold():
    settings = load_settings()
    assert settings.redis_url == "redis://127.0.0.1:6379/0"
    assert (settings.lease_seconds, settings.heartbeat_seconds, settings.max_deaths) == (15, 5, 3)
    assert settings.api_host == "127.0.0.1"
    assert settings.models == {}


def test_flags_go_before_the_environment_before_the_file_before_defaults(bare, monkeypatch):
    (bare / "inferfleet.toml").write_text("slots = 1\nmax_queued = 2\napi_port = 3\n")
    monkeypatch.setenv("INFERFLEET_SLOTS", "4")
    monkeypatch.setenv("INFERFLEET_MAX_QUEUED", "5")
    settings = load_settings({"slots": 6, "api_port": None})
    assert (settings.slots, settings.max_queued, settings.api_port, settings.max_deaths) == (6, 5, 3, 3)


def test_models_come_from_the_file_and_their_fields_from_the_environment(bare, monkeypatch):
    (bare / "inferfleet.toml").write_text('[models.demo]\npath = "/m"\nmax_num_seqs = 4\n')
    monkeypatch.setenv("INFERFLEET_MODELS__demo__MAX_NUM_SEQS", "8")
    spec = load_settings().models["demo"]
    assert (spec.path, spec.max_num_seqs, spec.block_size, spec.eager) == ("/m", 8, 16, True)


def test_a_model_name_with_case_and_slash_comes_as_json(monkeypatch):
    monkeypatch.setenv("INFERFLEET_MODELS", '{"Qwen/Qwen3-0.6B": {"path": "Qwen/Qwen3-0.6B", "revision": "abc"}}')
    assert load_settings().models["Qwen/Qwen3-0.6B"].revision == "abc"


def test_a_file_can_be_named(bare, monkeypatch):
    (bare / "other.toml").write_text("slots = 9\n")
    monkeypatch.setenv("INFERFLEET_CONFIG", str(bare / "other.toml"))
    assert load_settings().slots == 9


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"INFERFLEET_SLOT": "3"}, "INFERFLEET_SLOT; did you mean slots"),
        ({"INFERFLEET_SLOTS": "many"}, "slots: "),
        ({"INFERFLEET_SLOTS": "0"}, "slots: Input should be greater than or equal to 1"),
        ({"INFERFLEET_LEASE_SECONDS": "nan"}, "lease_seconds: "),
        ({"INFERFLEET_LEASE_SECONDS": "9"}, "at least twice heartbeat_seconds"),
        ({"INFERFLEET_MODELS": "{"}, "models"),
        ({"INFERFLEET_MODELS__demo__PAHT": "/m"}, "models.demo"),
        ({"INFERFLEET_REDIS_URL": "http://x"}, "redis_url: "),
        ({"INFERFLEET_NAMESPACE": "a{b}"}, "namespace: "),
        ({"INFERFLEET_API_PORT": "65536"}, "api_port: "),
        ({"INFERFLEET_CONFIG": "absent.toml"}, "absent.toml does not exist"),
    ],
)
def test_a_mistake_in_the_environment_is_named(monkeypatch, environment, said):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=said.replace("{", r"\{")):
        load_settings()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("slot = 3", "unknown setting slot; did you mean slots"),
        ("[models.demo]\npaht = '/m'", "models.demo"),
        (
            "[models.demo]\npath = '/m'\nblock_sise = 8",
            "models.demo.block_sise; did you mean block_size",
        ),
        ("[models.demo]\npath = '/m'\ndtype = 'int3'", "models.demo.dtype: "),
        ("slots = ", "inferfleet.toml: "),
    ],
)
def test_a_mistake_in_the_file_is_named(bare, text, said):
    (bare / "inferfleet.toml").write_text(text)
    with pytest.raises(SettingsError, match=said):
        load_settings()


def test_a_mistake_in_a_flag_is_named():
    with pytest.raises(SettingsError, match="api_port"):
        load_settings({"api_port": -1})
    with pytest.raises(SettingsError, match="unknown setting colour"):
        load_settings({"colour": "red"})


def test_a_password_in_a_bad_url_is_not_repeated(monkeypatch):
    monkeypatch.setenv("INFERFLEET_REDIS_URL", "http://user:secret@host")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_an_image_models_own_settings_stand_under_it_and_reach_the_engine_as_a_dict(bare):
    (bare / "inferfleet.toml").write_text(
        '[models.flux]\npath = "/f"\n[models.flux.image]\naccept_licence = "x"\nloras = {ink = "/l"}\n'
        '[models.chat]\npath = "/c"\n'
    )
    models = load_settings().models
    spec = engine_spec(models["flux"])
    assert spec["image"] == {**ImageSettings(accept_licence="x", loras={"ink": "/l"}).model_dump()}
    assert "image" not in engine_spec(models["chat"])


def test_the_image_settings_are_those_that_the_engine_knows():
    from dataclasses import fields

    from inferfleet.engine.diffusion.spec import SHARED, DiffusionSpec

    known = {field.name: field for field in fields(DiffusionSpec)}
    assert set(ImageSettings.model_fields) == set(known) - set(SHARED)
    spec = DiffusionSpec.from_dict({"path": "/f", **ImageSettings().model_dump()})
    assert spec == DiffusionSpec(path="/f")


def test_a_misspelt_image_setting_is_refused_with_the_nearest(bare):
    (bare / "inferfleet.toml").write_text('[models.flux]\npath = "/f"\n[models.flux.image]\nmax_batch = 1\n')
    with pytest.raises(SettingsError, match=r"models.flux.image.max_batch; did you mean max_batch_size"):
        load_settings()


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("::1", "http://[::1]:80"),
        ("a.test", "http://a.test:80"),
    ],
)
def test_a_server_is_reached_from_its_own_machine_where_it_listens(host, url):
    assert local_url(host, 80) == url
