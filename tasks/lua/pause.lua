-- Stop giving a model's jobs to workers, or go on. Writes order, models. Repeated, it answers the same.
-- ARGV: model, '1' (pause) or '' (resume)
-- Answers jobs that wait
local state = P .. 'order:' .. ARGV[1]
if ARGV[2] == '' then
  redis.call('HDEL', state, 'paused_ms')
else
  redis.call('HSETNX', state, 'paused_ms', whole(NOW))
  redis.call('SADD', P .. 'models', ARGV[1])
end
return num_waiting(ARGV[1])
