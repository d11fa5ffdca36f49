-- Cancel jobs that wait for a model, some at a time: those that were there when the first of these calls was made. Each
-- ends like any cancelled job. Writes what finish writes.
-- ARGV: model, tenant ('' = all), limit, number of the youngest job to take ('' = the youngest there is),
--   number of the last one looked at ('' = none)
-- Answers {number of the youngest, number of the last one looked at or '' when all were, jobs cancelled}
local model, tenant, limit = ARGV[1], ARGV[2], tonumber(ARGV[3])
local youngest = ARGV[4] ~= '' and ARGV[4] or redis.call('GET', P .. 'seq') or '0'
local cancelled, looked, last = 0, 0, ''

local function take(id)
  local job = load(id)
  last, looked = job.seq, looked + 1
  if job.model ~= model or tonumber(job.seq) > tonumber(youngest) then return end
  finish(job, 'cancelled', {error = ERRORS.cancelled})
  cancelled = cancelled + 1
end

if tenant ~= '' then
  local after = ARGV[5] ~= '' and '(' .. ARGV[5] or '-inf'
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', P .. 'in:queued:' .. tenant, after, youngest, 'LIMIT', 0, limit)) do
    take(id)
  end
else
  -- What is taken leaves the list, so the next call begins at its front; a job that came meanwhile stands behind.
  for _, id in ipairs(redis.call('ZRANGE', P .. 'ages:' .. model, 0, limit - 1)) do take(id) end
end
local more = looked == limit and (tenant ~= '' or cancelled > 0)
return {youngest, more and last or '', cancelled}
