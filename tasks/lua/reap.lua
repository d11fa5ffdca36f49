-- Take back the jobs whose lease is over. Writes what bury_or_requeue writes. At most `limit` jobs a call.
-- ARGV: limit, max_deaths
-- Answers id, how, id, how, ... (how: requeued | dead | cancelled | expired)
local answer = {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', P .. 'leases', '-inf', whole(NOW), 'LIMIT', 0, ARGV[1])) do
  answer[#answer + 1] = id
  answer[#answer + 1] = bury_or_requeue(load(id), tonumber(ARGV[2]), 'its lease was over: the worker is lost, or its engine stood still')
end
return answer
