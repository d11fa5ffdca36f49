-- Give the batch that has waited longest to a runner. Writes batch (fence, runner), batches:open.
-- ARGV: runner, lease_ms
-- Answers nil | {id, fields}
local id = redis.call('ZRANGEBYSCORE', P .. 'batches:open', '-inf', whole(NOW), 'LIMIT', 0, 1)[1]
if not id then return false end
local batch = load_batch(id)
redis.call('HSET', batch.key, 'fence', next_fence(batch.fence), 'runner', ARGV[1])
redis.call('ZADD', P .. 'batches:open', whole(NOW + tonumber(ARGV[2])), id)
return {id, redis.call('HGETALL', batch.key)}
