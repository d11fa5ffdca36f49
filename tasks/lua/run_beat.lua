-- Renew the leases of runs. Writes run_leases.
-- ARGV: lease_ms, then task ids
-- Answers 'ok'
for i = 2, #ARGV do
  redis.call('ZADD', P .. 'run_leases', 'XX', whole(NOW + tonumber(ARGV[1])), ARGV[i])
end
return 'ok'
