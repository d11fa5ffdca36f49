"""Where the files that jobs make are kept until their jobs are forgotten."""

from inferfleet.tasks.stores.redis_store import AsyncRedisStore, RedisStore
from inferfleet.tasks.stores.store import AsyncStore, Store, StoredObject

__all__ = ["AsyncRedisStore", "AsyncStore", "RedisStore", "Store", "StoredObject"]
