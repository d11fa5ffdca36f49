-- The input is valid: its lines may run, or, of a batch that is being cancelled, end. Writes batch.
-- ARGV: id, fence, total, model ('' = several)
-- Answers nil (stale) | the status
local batch = run_batch(ARGV[1], ARGV[2])
if not batch then return false end
redis.call('HSET', batch.key, 'total', ARGV[3], 'model', ARGV[4])
if batch.status == 'validating' then set_status(batch, 'in_progress') end
return batch.status
