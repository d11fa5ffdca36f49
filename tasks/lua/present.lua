-- Who is here. Writes here:<kind> and cards:<kind> (forgets those whose time is over). ARGV: kind
-- Answers name, body, name, body, ..., the one announced last at the end
local until_key, body_key = P .. 'here:' .. ARGV[1], P .. 'cards:' .. ARGV[1]
for _, name in ipairs(redis.call('ZRANGEBYSCORE', until_key, '-inf', whole(NOW), 'LIMIT', 0, 100)) do
  redis.call('ZREM', until_key, name)
  redis.call('HDEL', body_key, name)
end
local answer = {}
for _, name in ipairs(redis.call('ZRANGEBYSCORE', until_key, '(' .. whole(NOW), '+inf', 'LIMIT', 0, 10000)) do
  answer[#answer + 1] = name
  answer[#answer + 1] = redis.call('HGET', body_key, name)
end
return answer
