-- Accept a job once. Writes job, events, the queue, ages, deadlines, jobs, in:queued, idem, models, quota,
-- seq; reads pace, tenants.
-- ARGV: id, envelope, model, tenant, priority, deadline_ms, start_timeout_ms, idem digest, body_hash, max_queued,
--       custom_id, endpoint, metadata JSON, webhook, webhook_events, batch, cost, affinity, tokens
--       ('' = absent)
-- Answers {'new', id} | {'replay', id} | {'reuse', id} | {'full', waiting, gap ms} | {'no_endpoint', id of the webhook}
--   | {'late', what it would end with, ms until its turn} | what refused_by_quota answers
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
local gap, sure = gap_of(model)
if max_queued and waiting >= max_queued then return {'full', waiting, gap and whole(gap) or ''} end

local limits = limits_of(tenant)
local job = {id = id, key = P .. 'job:' .. id, state = 'queued', model = model, tenant = tenant, priority = ARGV[5],
  deadline_ms = ARGV[6], start_timeout_ms = ARGV[7], created_ms = whole(NOW), started_ms = '', next_seq = '0',
  batch = ARGV[16], affinity = ARGV[18], bytes = #envelope,
  tokens = (limits.tokens_per_minute or limits.tokens_per_day) and ARGV[19] or '',
  cost = whole(math.max(1, tonumber(ARGV[17]) * 100 / (limits.weight or 1)))}
local tokens = tonumber(ARGV[19])
local amounts = {requests_per_minute = 1, tokens_per_minute = tokens, tokens_per_day = tokens, bytes = #envelope}
local refused = refused_by_quota(job, limits, amounts)
if refused then return refused end

-- Only where the pace is known: a queue that nobody has seen under load may be faster than it looks. Lines of batches
-- wait, and expire with their batch.
local at, code = expiry(job)
if at and sure and job.batch == '' and not is_paused(model) then
  job.seq = (number(redis.call('GET', P .. 'seq')) or 0) + 1
  job.place = place(job)
  local eta_ms = (num_ahead(job) + 1) * gap
  if NOW + eta_ms > at then return {'late', code, whole(eta_ms)} end
end

use_quotas(job, limits, amounts)
job.seq = whole(redis.call('INCR', P .. 'seq'))
redis.call('HSET', job.key, 'state', 'queued', 'envelope', envelope, 'model', model, 'tenant', tenant,
  'priority', job.priority, 'deadline_ms', job.deadline_ms, 'start_timeout_ms', job.start_timeout_ms,
  'created_ms', job.created_ms, 'queued_ms', job.created_ms, 'seq', job.seq, 'fence', '0', 'deaths', '0',
  'attempts', '0', 'idem', idem, 'body_hash', body_hash, 'custom_id', ARGV[11], 'endpoint', ARGV[12],
  'metadata', ARGV[13], 'webhook', webhook, 'webhook_events', ARGV[15], 'batch', job.batch, 'cost', job.cost,
  'affinity', job.affinity, 'bytes', job.bytes, 'tokens', job.tokens)
redis.call('ZADD', P .. 'jobs:' .. tenant, job.seq, id)
redis.call('ZADD', P .. 'in:queued:' .. tenant, job.seq, id)
if idem ~= '' then redis.call('SET', P .. 'idem:' .. idem, id) end
enqueue(job, '{"type":"job.queued","status":"queued"}')
return {'new', id}
