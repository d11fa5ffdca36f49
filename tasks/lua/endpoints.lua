-- Read one webhook endpoint of a tenant, or all of them, newest first. ARGV: tenant, id ('' = all), then fields
-- Answers {{id, values, {disabled or '', failures, failing_since_ms}}, ...}
local ids = redis.call('ZREVRANGE', P .. 'endpoints:' .. ARGV[1], 0, -1)
local answer = {}
for _, id in ipairs(ids) do
  if ARGV[2] == '' or ARGV[2] == id then
    answer[#answer + 1] = {id, redis.call('HMGET', P .. 'endpoint:' .. id, unpack(ARGV, 3)),
      redis.call('HMGET', P .. 'receiver:' .. id, 'disabled', 'failures', 'failing_since_ms')}
  end
end
return answer
