-- Queue an ended job again, from the start: deaths, result, time limits and event log are gone, numbers go on.
-- ARGV: id, tenant ('' = any), token
-- Answers nil | {'queued' | 'refused', state before}; repeated with the same token it answers the same
local job = load_for(ARGV[1], ARGV[2])
if not job then return false end
if redis.call('HGET', job.key, 'retry_token') == ARGV[3] then return {'queued', job.state} end
local before = job.state
if not TERMINAL[before] or before == 'completed' then return {'refused', before} end

redis.call('UNLINK', P .. 'events:' .. job.id, P .. 'tries:' .. job.id)
unfinish(job)
redis.call('HDEL', job.key, 'response', 'error', 'usage', 'metrics', 'dead_letter', 'finished_ms', 'done_fence',
  'started_ms', 'claimed_ms', 'suspect', 'published', 'outputs', 'output_keys', 'progress',
  'told_ms')
job.deadline_ms, job.start_timeout_ms, job.started_ms = '', '', ''
job.fence = next_fence(job.fence)
redis.call('HSET', job.key, 'retry_token', ARGV[3], 'queued_ms', whole(NOW), 'deaths', '0', 'attempts', '0', 'deadline_ms', '',
  'start_timeout_ms', '', 'fence', job.fence)
requeue(job, 'retry')
return {'queued', before}
