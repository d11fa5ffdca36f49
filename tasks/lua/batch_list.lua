-- A tenant's batches, newest first. ARGV: tenant, after (id; '' = start), limit
-- Answers nil (after is unknown) | {{id, fields}, ...}, one more than limit if there are more
local index, bound = P .. 'batches:' .. ARGV[1], '+inf'
if ARGV[2] ~= '' then
  local seq = redis.call('ZSCORE', index, ARGV[2])
  if not seq then return false end
  bound = '(' .. seq
end
local answer = {}
for _, id in ipairs(redis.call('ZREVRANGEBYSCORE', index, bound, '-inf', 'LIMIT', 0, tonumber(ARGV[3]) + 1)) do
  answer[#answer + 1] = {id, redis.call('HGETALL', P .. 'batch:' .. id)}
end
return answer
