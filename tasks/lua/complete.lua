-- End a running job, with its terminal event. Writes job, running, leases, finished, in:*, events, pace, output:*.
-- ARGV: id, fence, state, response, error, usage, metrics, outputs JSON ('' = absent), token of what this fence published
--   last ('' = nothing), then keys of files in this Redis
-- Answers done | same | stale | missing (one of the files is not there; nothing was changed)
-- Files of a job that completes live as long as the job; those of any other end, and of a stale fence, are deleted.
local files = {unpack(ARGV, 10)}
local job = load(ARGV[1])
local fence, state = ARGV[2], ARGV[3]
if job and TERMINAL[job.state] and job.done_fence == fence then return 'same' end
if not job or not held(job, fence) or lost_words(job, ARGV[9]) then
  drop_files(files)
  return 'stale'
end

local result = {response = ARGV[4], error = ARGV[5], usage = ARGV[6], metrics = ARGV[7]}
if job.state == 'cancelling' then
  -- Whoever was told "cancelling" never sees another end, also when the answer was ready first.
  state, result.response, result.error = 'cancelled', '', ERRORS.cancelled
elseif state == 'cancelled' and overdue(job) then
  -- beat and publish told the worker to stop, and nobody but the clock had asked for it.
  state, result.error = 'expired', ERRORS.deadline_exceeded
end
if state == 'completed' then
  for _, key in ipairs(files) do
    if redis.call('EXISTS', P .. 'output:' .. key) == 0 then return 'missing' end
  end
  for _, key in ipairs(files) do redis.call('PERSIST', P .. 'output:' .. key) end
  result.outputs, result.output_keys = ARGV[8], table.concat(files, ' ')
else
  drop_files(files)
end
finish(job, state, result)
note_pace(job)
return 'done'
