-- Change priority or deadline of a waiting job. Writes job, the queue, deadlines.
-- ARGV: id, tenant ('' = any), priority, deadline_ms ('' = as it is)
-- Answers nil | the state; only a job in 'queued' was changed
local job = load_for(ARGV[1], ARGV[2])
if not job then return false end
if job.state ~= 'queued' then return job.state end
leave_place(job)
if ARGV[3] ~= '' then job.priority = ARGV[3] end
if ARGV[4] ~= '' then job.deadline_ms = ARGV[4] end
redis.call('HSET', job.key, 'priority', job.priority, 'deadline_ms', job.deadline_ms)
take_place(job)
local at = expiry(job)
if at then redis.call('ZADD', P .. 'deadlines', whole(at), job.id) end
return job.state
