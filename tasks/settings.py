"""What an operator may set, read once at the start: flags > INFERFLEET_* > inferfleet.toml > defaults.

`__` in an environment name goes one level down (INFERFLEET_MODELS__DEMO__PATH). Environment names have no case, so
a model whose name has upper case belongs into the file, or into INFERFLEET_MODELS as JSON. An unknown or bad value
stops the start with a SettingsError that names it.
"""

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from pydantic_settings import (
    SettingsError as SourceError,
)

from inferfleet.tasks.errors import SettingsError
from inferfleet.tasks.s3_url import parse_prefix

PREFIX = "INFERFLEET_"
CONFIG_FILE = Path("inferfleet.toml")

#: redis:// or s3://bucket/prefix
RESULT_STORE = r"^(redis://|s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[\w./-]*)?)$"

Seconds = Annotated[float, Field(gt=0, le=31 * 86400, allow_inf_nan=False)]
Port = Annotated[int, Field(ge=0, le=65535)]
ModelName = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f]+$")]


def is_a_prefix(text: str) -> str:
    return str(parse_prefix(text))


BucketPrefix = Annotated[str, AfterValidator(is_a_prefix)]


class ImageSettings(BaseModel):
    """What only an image model has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: Pictures that share one step of the transformer.
    max_batch_size: int = Field(default=8, ge=1, le=256)
    #: Largest width * height of a picture.
    max_pixels: int = Field(default=2048 * 2048, ge=256, le=1 << 22)
    #: "offloaded" text encoders come to the device part by part for each new prompt, from the host's memory to a GPU,
    #: from the files to a CPU.
    encoders: Literal["resident", "offloaded"] = "resident"
    #: Bytes of prompt embeddings that are kept for jobs with the same prompt; 0 = none.
    prompt_cache_bytes: int = Field(default=256 << 20, ge=0)
    #: Pictures of more pixels than this are decoded in tiles.
    vae_tiling_pixels: int = Field(default=1536 * 1536, ge=1)
    #: Name -> folder, file or hub id of a LoRA adapter for the transformer; jobs choose among them by name.
    loras: dict[Annotated[str, Field(min_length=1, max_length=128)], Annotated[str, Field(min_length=1)]] = {}
    #: The licence tag that you accept, where the model's licence has to be.
    accept_licence: str | None = Field(default=None, min_length=1)
    #: A quantised transformer whose pictures are further from full precision than this (dB) is refused ...
    min_psnr: float = Field(default=25.0, ge=0, le=200, allow_inf_nan=False)
    #: ... unless you allow it.
    allow_low_psnr: bool = False


class ModelSpec(BaseModel):
    """One model that workers serve."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: A folder in the hub layout, or a hub id; an id wants a revision to be reproducible.
    path: str = Field(min_length=1)
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    #: Keep weights in fewer bits, coded while they are read; `inferfleet quantize` measures what that changes.
    quantization: Literal["int8", "int4", "fp8"] | None = None
    #: Tokens of prompt and answer together; None = what the checkpoint allows.
    max_model_len: int | None = Field(default=None, ge=1, le=1 << 24)
    block_size: int = Field(default=16, ge=1, le=1024)
    #: Tokens that the KV cache holds; None = what fits into the device's memory.
    kv_cache_tokens: int | None = Field(default=None, ge=1)
    max_num_seqs: int = Field(default=32, ge=1, le=4096)
    max_num_batched_tokens: int = Field(default=2048, ge=1, le=1 << 20)
    paged_attn: bool = True
    prefix_caching: bool = True
    #: CPU threads of its engine; None = every core that the process may use. Models on one CPU should share them.
    threads: int | None = Field(default=None, ge=1, le=1024)
    #: Processes that hold the model together, each a share of it; on GPUs one each, from `device` on.
    tensor_parallel_size: int = Field(default=1, ge=1, le=64)
    #: A CSV of MatFormer slices (Gemma 3n) that jobs may ask for by name, all served from one set of weights. What none
    #: of its lines uses is not loaded, so a table of one line and its name below hold no more than that slice.
    matformer_config_path: str | None = None
    #: The slice of jobs that name none; None = the whole model.
    matformer_slice_name: str | None = Field(default=None, min_length=1)
    #: Load at the worker's start, not at the first job.
    eager: bool = True
    #: Only of an image model, a folder in diffusers' layout.
    image: ImageSettings | None = None


class S3Settings(BaseModel):
    """How an S3 server is spoken to."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    #: Of a server that is not AWS.
    endpoint_url: str | None = Field(default=None, pattern=r"^https?://")
    region: str = Field(default="us-east-1", min_length=1)
    #: http://host/bucket/key, http://bucket.host/key, or auto = as boto3 guesses from the endpoint.
    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    #: None = where boto3 looks: AWS_ACCESS_KEY_ID, ~/.aws, the machine's role.
    access_key_id: str | None = Field(default=None, min_length=1)
    secret_access_key: SecretStr | None = None
    connect_timeout_seconds: Seconds = 3
    read_timeout_seconds: Seconds = 10
    #: After this no call is tried again.
    deadline_seconds: Seconds = 30
    #: Clients reach endpoint_url too: the url of a picture leads them there, and not through the API.
    public_links: bool = False
    #: What goes with a file so that the server sees that all of it arrived; old servers know md5 alone.
    checksums: Literal["sha256", "md5", "none"] = "sha256"

    def model_post_init(self, context: Any, /) -> None:
        if (self.access_key_id is None) != (self.secret_access_key is None):
            raise SettingsError("give s3.access_key_id and s3.secret_access_key together", param="s3")


class TenantSettings(BaseModel):
    """What one tenant may have. None = no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: Share of a model's work where tenants compete, in relation to others'.
    weight: float = Field(default=1, ge=0.1, le=100, allow_inf_nan=False)
    requests_per_minute: int | None = Field(default=None, ge=1)
    #: Of prompts and answers, as estimated at the door. What is used of a rate comes back evenly over its period.
    tokens_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_day: int | None = Field(default=None, ge=1)
    #: Jobs that wait or run.
    concurrent_jobs: int | None = Field(default=None, ge=1)
    #: Jobs that wait, and their bytes.
    queued_jobs: int | None = Field(default=None, ge=1)
    queued_bytes: int | None = Field(default=None, ge=1)


class Settings(BaseSettings):
    """Every setting of the fleet. Times are seconds, sizes bytes."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True, hide_input_in_errors=True
    )

    redis_url: str = Field(default="redis://127.0.0.1:6379/0", pattern=r"^(redis|rediss|unix)://")
    #: Keeps several fleets on one Redis apart.
    namespace: str = Field(default="inferfleet", pattern=r"^[A-Za-z0-9_.:-]{1,64}$")
    #: Start even if Redis evicts keys or keeps nothing on disk: for throw-away use, because jobs will be lost.
    allow_unsafe_redis: bool = False
    models: dict[ModelName, ModelSpec] = {}

    #: A job whose worker is silent this long goes back to the queue. Must be at least twice heartbeat_seconds.
    lease_seconds: Seconds = 15
    heartbeat_seconds: Seconds = 5
    sweep_seconds: Seconds = 1
    #: Lost workers after which a job is a dead letter.
    max_deaths: int = Field(default=3, ge=1, le=100)
    result_ttl_seconds: Seconds = 86400
    #: How long a dead letter is kept for inspection and replay.
    dead_letter_ttl_seconds: Seconds = 7 * 86400
    #: Of all pictures of one job.
    max_result_bytes: int = Field(default=256 << 20, ge=1 << 20, le=1 << 32)
    #: Where files are kept: in the ledger's own Redis, or s3://bucket/prefix (see `s3`).
    result_store: str = Field(default="redis://", pattern=RESULT_STORE)
    s3: S3Settings = S3Settings()
    #: Tenant -> what its batches may read their input from and write their output to, with the keys of `s3`: any object
    #: whose url begins with one of these. Not where `result_store` is, which holds the files of everybody.
    batch_buckets: dict[Annotated[str, Field(min_length=1, max_length=256)], list[BucketPrefix]] = {}
    #: Weights and quotas by tenant, "*" = of those not named. The API brings them to Redis when it starts, for all.
    tenants: dict[Annotated[str, Field(min_length=1, max_length=128)], TenantSettings] = {}
    #: Tenants that may pause queues, purge what others have waiting, and see whose jobs wait.
    operators: frozenset[str] = frozenset({"default"})
    #: Waiting jobs a model; more are answered 429.
    max_queued: int = Field(default=10_000, ge=1)
    max_body_bytes: int = Field(default=4 << 20, ge=1024, le=256 << 20)
    #: The same of POST /v1/images/edits, which carries a picture of up to 20 MiB, as a form or in base64.
    max_edit_bytes: int = Field(default=28 << 20, ge=1024, le=256 << 20)
    #: Of one file that is uploaded to /v1/files.
    max_file_bytes: int = Field(default=200 << 20, ge=1, le=1 << 30)
    #: Batches that one runner has under way, and lines of one model that one batch has waiting or running.
    batch_slots: int = Field(default=8, ge=1, le=256)
    batch_window: int = Field(default=256, ge=1, le=10_000)
    #: A request that stays silent this long before it is whole is refused. Its body also has to come at 1 KiB/s.
    read_timeout_seconds: Seconds = 30
    drain_grace_seconds: Seconds = 30
    #: Jobs that one worker carries at once.
    slots: int = Field(default=64, ge=1, le=4096)
    #: Of a model's slots in a worker, so many are never taken by lines of batches, though one always may be.
    reserved_slots: int = Field(default=1, ge=0, le=4096)
    #: `inferfleet.run` tasks that one worker waits for at once, beside its slots; 0 = it takes none.
    run_slots: int = Field(default=32, ge=0, le=4096)
    #: An engine that should move but did not for this long is ended.
    stall_seconds: Seconds = 60
    #: An engine that has not loaded its model within this long is ended and started again.
    load_seconds: Seconds = 1800

    #: Webhooks that one `inferfleet webhooks` sends at once.
    webhook_slots: int = Field(default=16, ge=1, le=1024)
    #: From the name's resolution to the end of the answer, for one attempt.
    webhook_timeout_seconds: Annotated[float, Field(ge=0.1, le=60, allow_inf_nan=False)] = 10
    #: Let webhooks go to http:// URLs and port 80 too: whoever is on the way reads and changes them.
    webhook_allow_insecure: bool = False
    #: For development: let webhooks go to this machine, over http and to any port. Else no address is allowed that is
    #: not public.
    webhook_allow_loopback: bool = False

    api_host: str = "127.0.0.1"
    api_port: Port = 8000
    #: What urls of pictures begin with, where a proxy stands before the API; None = as the request's Host says.
    public_url: str | None = Field(default=None, pattern=r"^https?://[^\s?#]+$")
    #: Where the command line finds the API; None = the fleet that `inferfleet up` runs, else api_host and api_port.
    api_url: str | None = Field(default=None, pattern=r"^https?://")
    #: What the command line shows the API.
    api_key: SecretStr | None = None
    #: Where `inferfleet up` keeps its Redis data and logs; None = $XDG_STATE_HOME/inferfleet.
    data_dir: Path | None = None
    metrics_host: str = "127.0.0.1"
    #: A worker's Prometheus page; None = none, 0 = any free port.
    metrics_port: Port | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    #: json, console, or auto = console on a terminal.
    log_format: Literal["auto", "json", "console"] = "auto"

    def model_post_init(self, context: Any, /) -> None:
        if self.lease_seconds < 2 * self.heartbeat_seconds:
            raise SettingsError(
                f"lease_seconds ({self.lease_seconds:g}) must be at least twice heartbeat_seconds "
                f"({self.heartbeat_seconds:g}): one late heartbeat would lose every job",
                param="lease_seconds",
            )
        if self.result_store.startswith("s3://"):
            self._keep_tenants_out(str(parse_prefix(self.result_store)))

    def _keep_tenants_out(self, store: str) -> None:
        for tenant, prefixes in self.batch_buckets.items():
            for prefix in prefixes:
                if prefix.startswith(store) or store.startswith(prefix):
                    raise SettingsError(
                        f"{prefix} holds the files of all tenants (result_store)", param=f"batch_buckets.{tenant}"
                    )

    @property
    def local_api_url(self) -> str:
        """Where this machine reaches an API that listens as these settings say."""
        return local_url(self.api_host, self.api_port)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        path = Path(os.environ.get(PREFIX + "CONFIG", CONFIG_FILE))
        return (init_settings, env_settings, InitSettingsSource(settings_cls, read_toml(path)))


def local_url(host: str, port: int) -> str:
    """Where this machine reaches a server that listens there."""
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{name}]' if ':' in name else name}:{port}"


def load_settings(flags: Mapping[str, Any] | None = None) -> Settings:
    """Read the settings once. `flags` are the command line's; None among them means "not given".

    The file is inferfleet.toml in the current folder, or what INFERFLEET_CONFIG names.
    """
    refuse_unknown_environment()
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        raise described(error) from None
    except SourceError as error:
        raise SettingsError(f"{error}: the value is not valid JSON") from None


def described(error: ValidationError) -> SettingsError:
    first = error.errors(include_url=False, include_input=False)[0]
    name = ".".join(str(part) for part in first["loc"] if part != "[key]")
    if first["type"] == "extra_forbidden":
        return SettingsError(f"unknown setting {name}{nearest(name)}", param=name)
    return SettingsError(f"{name}: {first['msg']}", param=name)


def nearest(name: str) -> str:
    fields = Settings.model_fields
    if name.startswith("models."):
        fields = ImageSettings.model_fields if ".image." in name else ModelSpec.model_fields
    if name.startswith("tenants."):
        fields = TenantSettings.model_fields
    if name.startswith("s3."):
        fields = S3Settings.model_fields
    close = difflib.get_close_matches(name.rpartition(".")[2], fields, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def refuse_unknown_environment() -> None:
    """pydantic-settings ignores what it does not know in the environment; a misspelt name must not pass."""
    for name in os.environ:
        if not name.upper().startswith(PREFIX) or name == PREFIX + "CONFIG":
            continue
        field = name[len(PREFIX) :].lower().partition("__")[0]
        if field not in Settings.model_fields:
            raise SettingsError(f"unknown environment variable {name}{nearest(field)}", param=name)


def read_toml(path: Path) -> dict[str, Any]:
    """The file's values. Only the default file may be absent."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if path == CONFIG_FILE:
            return {}
        raise SettingsError(f"{path} does not exist", param=PREFIX + "CONFIG") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{path}: {error}") from None
