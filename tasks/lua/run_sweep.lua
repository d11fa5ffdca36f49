-- Give back to the broker what has become due, and runs of processes that are gone.
-- Writes runs, run_due, run_leases and the broker's lists.
-- ARGV: how many of each at most
-- Answers {how many became due, how many were given up}
local counts = {}
for i, set in ipairs({'run_due', 'run_leases'}) do
  local ids = redis.call('ZRANGEBYSCORE', P .. set, '-inf', whole(NOW), 'LIMIT', 0, ARGV[1])
  for _, id in ipairs(ids) do give_back(id) end
  counts[i] = #ids
end
return counts
