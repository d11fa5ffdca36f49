-- Give the best waiting job of a model to a worker, in the order of queue.lua. Writes job, the queue, running, leases,
-- claim, in:*, events; ends overdue jobs that it meets. Looks at no more than `look_ahead` places.
-- A job with the affinity that the worker asks for goes before the tenant's first one, if both have the same deadline
-- and it came at most `look_ahead` jobs (of all) after it: so it is never passed over more often, and no turn of another
-- tenant is touched.
-- ARGV: model, worker, token, lease_ms, look_ahead, ageing, online ('1' = no lines of batches), affinity ('' = any)
-- Answers {'none'} | {'job', id, fence, envelope, attempts, deaths, created_ms, deadline_ms, now_ms, next_seq, suspect,
--   tenant, affinity, priority}. Nothing is given while the queue is paused.
local model, worker, lease_ms = ARGV[1], ARGV[2], tonumber(ARGV[4])
local look_ahead, ageing, online, affinity = tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7] ~= '', ARGV[8]
local token_key = P .. 'claim:' .. worker .. ':' .. ARGV[3]

local function answer(job)
  return {'job', job.id, job.fence, redis.call('HGET', job.key, 'envelope'), job.attempts, job.deaths,
    job.created_ms, job.deadline_ms, whole(NOW), job.next_seq, job.suspect, job.tenant,
    job.affinity, job.priority}
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
  charge(job)
  unqueue(job)
  move(job, 'in_progress')
  job.fence = next_fence(job.fence)
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

-- A member's deadline, its number and its affinity: see place.
local function parts(member)
  return string.sub(member, 1, 13), tonumber(string.sub(member, 15, 30)), string.sub(member, 32, 39)
end

-- The place of the tenant's first job, or of a younger one that the worker is warm for.
local function choose(waiting)
  if affinity == '' then return redis.call('ZRANGE', waiting, 0, 0)[1] end
  local members = redis.call('ZRANGE', waiting, 0, look_ahead - 1)
  local deadline, first = parts(members[1])
  for _, member in ipairs(members) do
    local its_deadline, seq, its_affinity = parts(member)
    if its_deadline ~= deadline or seq > first + look_ahead then break end
    if its_affinity == affinity then return member end
  end
  return members[1]
end

adopt(model)
if is_paused(model) then return {'none'} end
for _ = 1, look_ahead do
  local class = next_class(model, online, ageing)
  if not class then break end
  local q = model .. '\n' .. class
  local tenant = redis.call('ZRANGE', P .. 'turns:' .. q, 0, 0)[1]
  local job = load(job_at(choose(P .. 'waiting:' .. q .. '\n' .. tenant)))
  local at, code = expiry(job)
  if not (at and at <= NOW) then return give(job) end
  finish(job, 'expired', {error = ERRORS[code]})
end
return {'none'}
