-- Who is here. Writes here:<kind> and cards:<kind> (forgets those whose time is over). ARGV: kind, '1' = those too who
-- were here a while ago ('' = not): their bodies say that they are unserved. Only models are remembered.
-- Answers name, body, name, body, ..., the one announced last at the end
local REMEMBERED_MS = {model = 600000}
local until_key, body_key = P .. 'here:' .. ARGV[1], P .. 'cards:' .. ARGV[1]
local over = NOW - (REMEMBERED_MS[ARGV[1]] or 0)
for _, name in ipairs(redis.call('ZRANGEBYSCORE', until_key, '-inf', whole(over), 'LIMIT', 0, 100)) do
  redis.call('ZREM', until_key, name)
  redis.call('HDEL', body_key, name)
end

local answer = {}
local function tell_those(from, to, ending)
  for _, name in ipairs(redis.call('ZRANGEBYSCORE', until_key, from, to, 'LIMIT', 0, 10000)) do
    answer[#answer + 1] = name
    answer[#answer + 1] = string.gsub(redis.call('HGET', body_key, name), '}$', ending)
  end
end
if ARGV[2] ~= '' then tell_those('-inf', whole(NOW), ',"state":"unserved"}') end
tell_those('(' .. whole(NOW), '+inf', '}')
return answer
