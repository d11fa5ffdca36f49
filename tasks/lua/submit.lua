-- Accept a job once. Writes job, events, the queue, ages, deadlines, jobs, in:queued, idem, models, seq; reads pace.
-- ARGV: id, envelope, model, tenant, priority, deadline_ms, start_timeout_ms, idem digest, body_hash, max_queued,
--       custom_id, endpoint, metadata JSON, webhook, webhook_events, batch, cost, affinity ('' = absent)
-- Answers {'new', id} | {'replay', id} | {'reuse', id} | {'full', waiting, gap ms} | {'no_endpoint', id of the webhook}
local id, envelope, model, tenant = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local idem, body_hash, max_queued = ARGV[8], ARGV[9], number(ARGV[10])

local function verdict(existing)
  local seen = redis.call('HMGET', P .. 'job:' .. existing, 'body_hash', 'tenant')
  if not seen[1] then return nil end
  if seen[1] == body_hash and seen[2] == tenant then return {'replay', existing} end
  return {'reuse', existing}
end

local answer = verdict(id)
if not answer and idem ~= '' then
  local first = redis.call('GET', P .. 'idem:' .. idem)
  answer = first and verdict(first)
end
if answer then return answer end

local webhook = ARGV[14]
if string.sub(webhook, 1, 3) == 'we_' and redis.call('HGET', P .. 'endpoint:' .. webhook, 'tenant') ~= tenant then
  return {'no_endpoint', webhook}
end

local waiting = num_waiting(model)
if max_queued and waiting >= max_queued then
  local gap = gap_of(model)
  return {'full', waiting, gap and whole(gap) or ''}
end

local job = {id = id, key = P .. 'job:' .. id, state = 'queued', model = model, tenant = tenant, priority = ARGV[5],
  deadline_ms = ARGV[6], start_timeout_ms = ARGV[7], created_ms = whole(NOW), started_ms = '',
  seq = whole(redis.call('INCR', P .. 'seq')), next_seq = '0',
  batch = ARGV[16], cost = ARGV[17], affinity = ARGV[18]}
redis.call('HSET', job.key, 'state', 'queued', 'envelope', envelope, 'model', model, 'tenant', tenant,
  'priority', job.priority, 'deadline_ms', job.deadline_ms, 'start_timeout_ms', job.start_timeout_ms,
  'created_ms', job.created_ms, 'queued_ms', job.created_ms, 'seq', job.seq, 'fence', '0', 'deaths', '0', 'attempts', '0', 'idem', idem,
  'body_hash', body_hash, 'custom_id', ARGV[11], 'endpoint', ARGV[12], 'metadata', ARGV[13],
  'webhook', webhook, 'webhook_events', ARGV[15],
  'batch', job.batch, 'cost', job.cost, 'affinity', job.affinity)
redis.call('ZADD', P .. 'jobs:' .. tenant, job.seq, id)
redis.call('ZADD', P .. 'in:queued:' .. tenant, job.seq, id)
if idem ~= '' then redis.call('SET', P .. 'idem:' .. idem, id) end
enqueue(job, '{"type":"job.queued","status":"queued"}')
return {'new', id}
