"""The store that the settings name."""

from inferfleet.tasks.ledger import AsyncLedger, Ledger
from inferfleet.tasks.settings import Settings
from inferfleet.tasks.stores.redis_store import AsyncRedisStore, RedisStore
from inferfleet.tasks.stores.s3_store import AsyncS3Store, S3Store
from inferfleet.tasks.stores.store import AsyncStore, Store


def open_store(settings: Settings, ledger: Ledger) -> Store:
    """The store for threads. Raises SettingsError where boto3 is needed and not there; asks nobody yet."""
    if settings.result_store.startswith("s3://"):
        return _s3(settings)
    return RedisStore(ledger, settings.result_ttl_seconds)


def open_async_store(settings: Settings, ledger: AsyncLedger) -> AsyncStore:
    """The same for one event loop."""
    if settings.result_store.startswith("s3://"):
        return AsyncS3Store(_s3(settings))
    return AsyncRedisStore(ledger, settings.result_ttl_seconds)


def _s3(settings: Settings) -> S3Store:
    bucket, _, prefix = settings.result_store.removeprefix("s3://").partition("/")
    prefix = prefix.strip("/")
    return S3Store(bucket, f"{prefix}/" if prefix else "", settings.s3)
