-- Renew the leases of one worker's jobs. Writes leases.
-- ARGV: worker, lease_ms, then id and fence of each job
-- Answers one word a job: ok | cancel | stale. A job past its deadline is told to stop, like a cancelled one.
local answers = {}
for i = 3, #ARGV, 2 do
  local job = load(ARGV[i])
  local word = 'stale'
  if job and held(job, ARGV[i + 1]) and job.worker == ARGV[1] then
    redis.call('ZADD', P .. 'leases', whole(NOW + tonumber(ARGV[2])), job.id)
    word = (job.state == 'cancelling' or overdue(job)) and 'cancel' or 'ok'
  end
  answers[#answers + 1] = word
end
return answers
