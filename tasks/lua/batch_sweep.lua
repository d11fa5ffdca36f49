-- Forget batches that ended long ago. Their files live and die by themselves. ARGV: limit
-- Answers the number forgotten
local ids = redis.call('ZRANGEBYSCORE', P .. 'batches:ended', '-inf', whole(NOW), 'LIMIT', 0, ARGV[1])
for _, id in ipairs(ids) do
  local batch = load_batch(id)
  if batch then
    redis.call('ZREM', P .. 'batches:' .. batch.tenant, id)
    if batch.idem ~= '' then redis.call('DEL', P .. 'idem:' .. batch.idem) end
    redis.call('UNLINK', batch.key, P .. 'batch_failed:' .. id, P .. 'batch_done:' .. id, P .. 'batch_only:' .. id)
  end
  redis.call('ZREM', P .. 'batches:ended', id)
end
return #ids
