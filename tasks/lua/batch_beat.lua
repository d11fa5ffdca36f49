-- Keep a batch for lease_ms more; 0 gives it back. Notes it once when the window ends before the lines do.
-- Writes batches:open, batch (overdue). ARGV: id, fence, lease_ms
-- Answers nil (somebody else has it, or it has ended) | {status, '1' if it is overdue or ''}
local batch = run_batch(ARGV[1], ARGV[2])
if not batch then return false end
redis.call('ZADD', P .. 'batches:open', whole(NOW + tonumber(ARGV[3])), batch.id)
if batch.status == 'in_progress' and batch.lines ~= batch.total and tonumber(batch.expires_ms) <= NOW then
  batch.overdue = '1'
  redis.call('HSET', batch.key, 'overdue', '1')
end
return {batch.status, batch.overdue or ''}
