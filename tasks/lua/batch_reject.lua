-- The input is not valid: the batch fails, or is cancelled if that was asked for first. Writes what end_batch writes.
-- ARGV: id, fence, errors JSON, keep_ms
-- Answers nil (stale) | the status
local batch = run_batch(ARGV[1], ARGV[2])
if not batch then return false end
redis.call('HSET', batch.key, 'errors', ARGV[3])
end_batch(batch, batch.status == 'cancelling' and 'cancelled' or 'failed', ARGV[4])
disown(batch.id, batch.id)
redis.call('DEL', P .. 'batch_only:' .. batch.id)
return batch.status
