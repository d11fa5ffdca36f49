-- Which jobs idempotency keys have made. Reads idem, job.
-- ARGV: tenant, then the digest of each key
-- Answers for each {id, state}, or {} where the ledger holds no job of the tenant for it
local answer = {}
for i = 2, #ARGV do
  local id = redis.call('GET', P .. 'idem:' .. ARGV[i])
  local seen = id and redis.call('HMGET', P .. 'job:' .. id, 'state', 'tenant') or {}
  answer[i - 1] = seen[1] and seen[2] == ARGV[1] and {id, seen[1]} or {}
end
return answer
