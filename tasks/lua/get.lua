-- Read one job. ARGV: id, tenant ('' = any), then the names of the fields wanted
-- Answers nil | {values, jobs ahead in the queue or '', gap ms or ''}
local job = load_for(ARGV[1], ARGV[2])
if not job then return false end
local names = {}
for i = 3, #ARGV do names[#names + 1] = ARGV[i] end
local ahead = ''
if job.state == 'queued' and not in_old_queue(job) then ahead = whole(num_ahead(job)) end
local gap = not is_paused(job.model) and gap_of(job.model)
return {redis.call('HMGET', job.key, unpack(names)), ahead, gap and whole(gap) or ''}
