"""Where the files that jobs make are kept until their jobs are forgotten."""

from inferfleet.tasks.stores.bucket import Bucket
from inferfleet.tasks.stores.choice import async_store_at, open_async_store, open_store, store_at
from inferfleet.tasks.stores.redis_store import AsyncRedisStore, RedisStore
from inferfleet.tasks.stores.s3_store import AsyncS3Store, S3Store
from inferfleet.tasks.stores.store import AsyncStore, Store, StoredObject

__all__ = [
    "AsyncRedisStore",
    "AsyncS3Store",
    "AsyncStore",
    "Bucket",
    "RedisStore",
    "S3Store",
    "Store",
    "StoredObject",
    "async_store_at",
    "open_async_store",
    "open_store",
    "store_at",
]
