"""The store that the settings name."""

from inferfleet.tasks.ledger import AsyncLedger, Ledger
from inferfleet.tasks.settings import S3Settings, Settings
from inferfleet.tasks.stores.redis_store import AsyncRedisStore, RedisStore
from inferfleet.tasks.stores.s3_store import AsyncS3Store, S3Store
from inferfleet.tasks.stores.store import AsyncStore, Store


def open_store(settings: Settings, ledger: Ledger) -> Store:
    """The store for threads. Raises SettingsError where boto3 is needed and not there; asks nobody yet."""
    return store_at(settings.result_store, settings.s3, ledger, settings.result_ttl_seconds)


def open_async_store(settings: Settings, ledger: AsyncLedger) -> AsyncStore:
    """The same for one event loop."""
    return async_store_at(settings.result_store, settings.s3, ledger, settings.result_ttl_seconds)


def store_at(place: str, s3: S3Settings, ledger: Ledger, ttl_seconds: float) -> Store:
    """The same by the settings that matter: `result_store`, `s3`, `result_ttl_seconds`."""
    return _s3(place, s3) if place.startswith("s3://") else RedisStore(ledger, ttl_seconds)


def async_store_at(place: str, s3: S3Settings, ledger: AsyncLedger, ttl_seconds: float) -> AsyncStore:
    """The same for one event loop."""
    return AsyncS3Store(_s3(place, s3)) if place.startswith("s3://") else AsyncRedisStore(ledger, ttl_seconds)


def _s3(place: str, s3: S3Settings) -> S3Store:
    bucket, _, prefix = place.removeprefix("s3://").partition("/")
    prefix = prefix.strip("/")
    return S3Store(bucket, f"{prefix}/" if prefix else "", s3)
