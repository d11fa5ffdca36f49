-- Forget files whose time is over, unless a batch reads them: those are looked at again in an hour.
-- ARGV: limit
-- Answers {number forgotten, keys of the parts that nobody needs any more...}
local answer = {0}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', P .. 'expiring', '-inf', whole(NOW), 'LIMIT', 0, ARGV[1])) do
  local file = file_fields(id)
  if not file then
    redis.call('ZREM', P .. 'expiring', id)
  elseif redis.call('SCARD', P .. 'users:' .. id) > 0 then
    redis.call('ZADD', P .. 'expiring', whole(NOW + 3600000), id)
  else
    for _, key in ipairs(drop_file(id, file)) do answer[#answer + 1] = key end
    answer[1] = answer[1] + 1
  end
end
return answer
