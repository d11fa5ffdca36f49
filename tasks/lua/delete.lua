-- Forget an ended job. Writes what purge writes, and gone so that a repeated call answers the same.
-- ARGV: id, tenant ('' = any), token
-- Answers deleted | missing | the state of a job that has not ended
local gone = P .. 'gone:' .. ARGV[1]
if redis.call('GET', gone) == ARGV[3] then return 'deleted' end
local job = load_for(ARGV[1], ARGV[2])
if not job then return 'missing' end
if not TERMINAL[job.state] then return job.state end
purge(job)
redis.call('SET', gone, ARGV[3], 'PX', 60000)
return 'deleted'
