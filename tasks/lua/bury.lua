-- Take back the jobs of a worker whose process is known to be gone. Writes what bury_or_requeue writes.
-- ARGV: worker, max_deaths
-- Answers as reap
local answer = {}
for _, id in ipairs(redis.call('ZRANGE', P .. 'leases', 0, -1)) do
  if redis.call('HGET', P .. 'job:' .. id, 'worker') == ARGV[1] then
    answer[#answer + 1] = id
    answer[#answer + 1] = bury_or_requeue(load(id), tonumber(ARGV[2]), 'its worker died')
  end
end
return answer
