-- Say that somebody is here for ttl_ms: a worker, or a model's card of one worker.
-- here:<kind> zset name -> ms until which it counts; cards:<kind> hash name -> body
-- ARGV: kind, name, body, ttl_ms (0 = leave now). Answers ok
local until_key, body_key = P .. 'here:' .. ARGV[1], P .. 'cards:' .. ARGV[1]
if tonumber(ARGV[4]) <= 0 then
  redis.call('ZREM', until_key, ARGV[2])
  redis.call('HDEL', body_key, ARGV[2])
else
  redis.call('ZADD', until_key, whole(NOW + tonumber(ARGV[4])), ARGV[2])
  redis.call('HSET', body_key, ARGV[2], ARGV[3])
end
return 'ok'
