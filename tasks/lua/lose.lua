-- Say that the process which ran a job died: a death is counted now, without waiting for the lease.
-- ARGV: id, fence, max_deaths, reason (how the process died)
-- Answers requeued | dead | cancelled | expired | stale; repeated with the same fence it answers the same
local job = load(ARGV[1])
if not job then return 'stale' end
local fence = ARGV[2]
local before = redis.call('HMGET', job.key, 'lost_fence', 'lost_how')
if before[1] == fence then return before[2] end
if not held(job, fence) then return 'stale' end
local how = bury_or_requeue(job, tonumber(ARGV[3]), ARGV[4])
redis.call('HSET', job.key, 'lost_fence', fence, 'lost_how', how)
return how
