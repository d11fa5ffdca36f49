-- Read one job. ARGV: id, tenant ('' = any), then the names of the fields wanted
-- Answers nil | {values, place in the queue or false, gap ms or ''}
local job = load_for(ARGV[1], ARGV[2])
if not job then return false end
local names = {}
for i = 3, #ARGV do names[#names + 1] = ARGV[i] end
local rank = false
if job.state == 'queued' then rank = redis.call('ZRANK', P .. 'waiting:' .. job.model, job.place) end
return {redis.call('HMGET', job.key, unpack(names)), rank, redis.call('HGET', P .. 'pace:' .. job.model, 'gap') or ''}
