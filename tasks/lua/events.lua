-- Read a job's events. ARGV: id, tenant ('' = any), after (sequence number), count
-- Answers nil | {state, next_seq, entries}
local job = load_for(ARGV[1], ARGV[2])
if not job then return false end
local from = '(' .. whole(tonumber(ARGV[3]) + 1) .. '-0'
return {job.state, job.next_seq, redis.call('XRANGE', P .. 'events:' .. job.id, from, '+', 'COUNT', ARGV[4])}
