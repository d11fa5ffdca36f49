-- Give the best waiting job of a model to a worker. Writes job, waiting, ages, deadlines, running, leases, claim,
-- in:*, events; ends overdue jobs that it meets. Looks at no more than `look_ahead` places.
-- ARGV: model, worker, token, lease_ms, look_ahead
-- Answers {'none'} | {'job', id, fence, envelope, attempts, deaths, created_ms, deadline_ms, now_ms, next_seq, suspect,
--   tenant}
local model, worker, lease_ms = ARGV[1], ARGV[2], tonumber(ARGV[4])
local token_key = P .. 'claim:' .. worker .. ':' .. ARGV[3]

local function answer(job)
  return {'job', job.id, job.fence, redis.call('HGET', job.key, 'envelope'), job.attempts, job.deaths,
    job.created_ms, job.deadline_ms, whole(NOW), job.next_seq, job.suspect, job.tenant}
end

-- A token is good for one claim: repeated after a lost reply it gives that claim, or nothing once the claim is over.
-- A late double can therefore never take a job that nobody would run.
local used = redis.call('GET', token_key)
if used then
  local fence, id = string.match(used, '^(%d+) (.*)$')
  local job = load(id)
  if job and held(job, fence) then return answer(job) end
  return {'none'}
end

local function give(job)
  unqueue(job)
  move(job, 'in_progress')
  job.fence = whole(tonumber(job.fence) + 1)
  job.attempts = whole(tonumber(job.attempts) + 1)
  local first = job.started_ms == ''
  if first then job.started_ms = whole(NOW) end
  redis.call('HSET', job.key, 'fence', job.fence, 'attempts', job.attempts, 'started_ms', job.started_ms,
    'claimed_ms', whole(NOW), 'worker', worker)
  redis.call('ZADD', P .. 'running:' .. model, whole(NOW), job.id)
  redis.call('ZADD', P .. 'leases', whole(NOW + lease_ms), job.id)
  redis.call('SET', token_key, job.fence .. ' ' .. job.id, 'PX', 600000)
  emit(job, '{"type":"job.in_progress","status":"in_progress","attempt":' .. job.attempts .. '}')
  if first then tell(job, 'started', '') end
  return answer(job)
end

for _, member in ipairs(redis.call('ZRANGE', P .. 'waiting:' .. model, 0, tonumber(ARGV[5]) - 1)) do
  local job = load(job_at(member))
  local at, code = expiry(job)
  if not (at and at <= NOW) then return give(job) end
  finish(job, 'expired', {error = ERRORS[code]})
end
return {'none'}
