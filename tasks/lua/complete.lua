-- End a running job, with its terminal event. Writes job, running, leases, finished, in:*, events, pace.
-- ARGV: id, fence, state, response, error, usage, metrics ('' = absent)
-- Answers done | same | stale
local job = load(ARGV[1])
if not job then return 'stale' end
local fence, state = ARGV[2], ARGV[3]
if TERMINAL[job.state] then return job.done_fence == fence and 'same' or 'stale' end
if not held(job, fence) then return 'stale' end

local result = {response = ARGV[4], error = ARGV[5], usage = ARGV[6], metrics = ARGV[7]}
if job.state == 'cancelling' then
  -- Whoever was told "cancelling" never sees another end, also when the answer was ready first.
  state, result.response, result.error = 'cancelled', '', ERRORS.cancelled
elseif state == 'cancelled' and overdue(job) then
  -- beat and publish told the worker to stop, and nobody but the clock had asked for it.
  state, result.error = 'expired', ERRORS.deadline_exceeded
end
finish(job, state, result)
pace(job)
return 'done'
