-- Hand a running job back, deaths unchanged. Writes job, running, leases, waiting, ages, deadlines, in:*, events.
-- ARGV: id, fence, suspect ('1' = it ran in a batch that crashed, run it alone next time; '' = no)
-- Answers released | stale
local job = load(ARGV[1])
if not job then return 'stale' end
local fence = ARGV[2]
if redis.call('HGET', job.key, 'released_fence') == fence then return 'released' end
if not held(job, fence) then return 'stale' end

if ARGV[3] ~= '' then note_try(job, 'crowd', 'its engine died or stood still with other jobs in it') end
redis.call('HSET', job.key, 'released_fence', fence)
if ARGV[3] ~= '' then redis.call('HSET', job.key, 'suspect', ARGV[3]) end
hand_back(job, 'released')
return 'released'
