-- Change priority or deadline of a waiting job. Writes job, waiting, deadlines.
-- ARGV: id, tenant ('' = any), priority, deadline_ms ('' = as it is)
-- Answers nil | the state; only a job in 'queued' was changed
local job = load_for(ARGV[1], ARGV[2])
if not job then return false end
if job.state ~= 'queued' then return job.state end
redis.call('ZREM', P .. 'waiting:' .. job.model, job.place)
if ARGV[3] ~= '' then job.priority = ARGV[3] end
if ARGV[4] ~= '' then job.deadline_ms = ARGV[4] end
job.place = place(job)
redis.call('HSET', job.key, 'priority', job.priority, 'deadline_ms', job.deadline_ms, 'place', job.place)
redis.call('ZADD', P .. 'waiting:' .. job.model, 0, job.place)
local at = expiry(job)
if at then redis.call('ZADD', P .. 'deadlines', whole(at), job.id) end
return job.state
