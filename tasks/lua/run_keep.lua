-- Keep a message that was just taken from the broker until its run has ended. Writes runs, run_due, run_leases.
-- ARGV: task id, list of the broker, message, ETA in ms ('' = none), lease_ms
-- Answers 1 if its time has come and the lease runs, 0 if it waits here for its ETA
local id, eta = ARGV[1], number(ARGV[4])
redis.call('HSET', P .. 'runs', id, ARGV[2] .. '\n' .. ARGV[3])
if eta and eta > NOW then
  redis.call('ZREM', P .. 'run_leases', id)
  redis.call('ZADD', P .. 'run_due', whole(eta), id)
  return 0
end
redis.call('ZREM', P .. 'run_due', id)
redis.call('ZADD', P .. 'run_leases', whole(NOW + tonumber(ARGV[5])), id)
return 1
