-- Shared by the scripts of runs, behind records.lua: `inferfleet.run` messages that a worker took from the broker.
--   runs        hash  task id -> "<list of the broker>\n<the message as it lay there>"
--   run_due     zset  task id -> ms at which a message may be taken (its ETA)
--   run_leases  zset  task id -> ms at which whoever waits for its job is given up

-- Put a message back where it came from, to be taken next. Answers whether it was here.
local function give_back(id)
  local kept = redis.call('HGET', P .. 'runs', id)
  redis.call('ZREM', P .. 'run_due', id)
  redis.call('ZREM', P .. 'run_leases', id)
  if not kept then return false end
  local cut = string.find(kept, '\n', 1, true)
  redis.call('RPUSH', string.sub(kept, 1, cut - 1), string.sub(kept, cut + 1))
  redis.call('HDEL', P .. 'runs', id)
  return true
end
