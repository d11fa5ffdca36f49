-- Take back the jobs whose lease is over. Writes what bury_or_requeue writes. At most `limit` jobs a call.
-- ARGV: limit, max_deaths, silence_ms (0 = reap in any case), lease_ms
-- Answers id, how, id, how, ... (how: requeued | dead | cancelled | expired)
local answer = {}

-- Nobody asked for longer than silence_ms: this server was away or stood still, and its clock went on. Those who hold
-- jobs could not beat either, so they get a lease's time to do it before any job is taken from them.
local silence_ms = tonumber(ARGV[3])
if silence_ms > 0 then
  local seen = redis.call('HMGET', P .. 'reaper', 'asked_ms', 'not_before_ms')
  local not_before = number(seen[2]) or 0
  if NOW - (number(seen[1]) or 0) > silence_ms then not_before = NOW + tonumber(ARGV[4]) end
  redis.call('HSET', P .. 'reaper', 'asked_ms', whole(NOW), 'not_before_ms', whole(not_before))
  if NOW < not_before then return answer end
end

for _, id in ipairs(redis.call('ZRANGEBYSCORE', P .. 'leases', '-inf', whole(NOW), 'LIMIT', 0, ARGV[1])) do
  answer[#answer + 1] = id
  answer[#answer + 1] = bury_or_requeue(load(id), tonumber(ARGV[2]), 'its lease was over: the worker is lost, or its engine stood still')
end
return answer
