-- Stop a job: one that waits at once, one that runs at its next beat or publish. Repeated, it answers the same.
-- The running one's id is also said on the channel cancel, so that its worker need not wait for the next beat.
-- ARGV: id, tenant ('' = any)
-- Answers nil | the state now; a state that is neither cancelled nor cancelling had already ended the job
local job = load_for(ARGV[1], ARGV[2])
if not job then return false end
if job.state == 'queued' then
  finish(job, 'cancelled', {error = ERRORS.cancelled})
elseif job.state == 'in_progress' then
  move(job, 'cancelling')
  redis.call('PUBLISH', P .. 'cancel', job.id)
end
return job.state
